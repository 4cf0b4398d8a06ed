"""Losses, gradients and weights that are not finite: told with step and role, never kept."""

import pytest
import torch
from accelerate import Accelerator
from transformers import TrainerCallback

from conftest import TokenRows, make_trainer
from heterofusion.publish.write import ExportError, export_adapter
from heterofusion.training.checkpoints import last_complete_checkpoint
from heterofusion.training.nonfinite import FiniteGuard, NonFiniteError
from recipe_runner import flags, train

ONE = torch.tensor(1.0)
GROUPS = ("q_proj_r4", "k_proj_r4", "v_proj_r4")


# ---- the guard on values made by hand ---------------------------------------------------------------------------


def finite(*bad: str) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(name not in bad) for name in GROUPS}


@pytest.fixture
def process() -> Accelerator:
    return Accelerator(cpu=True)


def test_finite_steps_are_not_told(process):
    guard = FiniteGuard(GROUPS)
    assert guard.first_bad(process) is None
    for step in range(1, 4):
        guard.note(step, ONE, ONE, finite(), finite())
    guard.note(4, ONE, None, {}, {})  # an engine that tells neither norm nor groups
    assert guard.first_bad(process) is None


@pytest.mark.parametrize(
    ("loss", "norm", "bad", "updates", "text"),
    [
        (True, False, (), (), "the loss is not finite"),
        (False, True, (), (), "the gradient norm is not finite"),
        (True, True, (), (), "the loss and the gradient norm are not finite"),
        (False, False, ("k_proj_r4",), (), "the gradient of k_proj_r4 is not finite"),
        (True, True, GROUPS, (), "the loss and the gradient of q_proj_r4, k_proj_r4, v_proj_r4 are not finite"),
        (True, True, GROUPS, ("v_proj_r4",), "the update of v_proj_r4 is not finite"),
    ],
)
def test_what_was_not_finite_is_named(process, loss, norm, bad, updates, text):
    guard = FiniteGuard(GROUPS)
    value = torch.tensor(float("nan"))
    guard.note(7, value if loss else ONE, value if norm else ONE, finite(*bad), finite(*updates))
    assert guard.first_bad(process) == f"step 7: {text}"


def test_first_step_of_any_rank_wins_and_ranks_add_up(process, monkeypatch):
    """Rank 1 is bad at step 2 in one group, rank 2 in another; rank 0 only later."""
    ranks = [FiniteGuard(GROUPS) for _ in range(3)]
    for step in (1, 2, 3):
        bad = {(0, 3): ("q_proj_r4",), (1, 2): ("v_proj_r4",), (2, 2): ("k_proj_r4",)}
        for rank, guard in enumerate(ranks):
            guard.note(step, ONE, ONE, finite(*bad.get((rank, step), ())), {})
    monkeypatch.setattr(process, "gather", lambda own: torch.cat([guard._first.unsqueeze(0) for guard in ranks]))
    for guard in ranks:
        assert guard.first_bad(process) == "step 2: the gradient of k_proj_r4, v_proj_r4 is not finite"


# ---- runs -------------------------------------------------------------------------------------------------------


def poison_loss(trainer, micro_batch: int, value: float) -> None:
    """Let the base's loss be this value at a micro-batch, counted from 1."""
    calls = iter(range(1, 1000))

    def spoil(module, args, output):
        if module.training and next(calls) == micro_batch:
            output.loss = output.loss * value
        return output

    trainer.fusion_model.register_forward_hook(spoil)


def poison_gradient(trainer, group: str, *steps: int, inside: bool = False) -> None:
    """Let the gradient be NaN at some steps: of a group's updates, or of one of its parameters alone."""

    def spoil(gradient):
        return gradient * float("nan") if trainer.state.global_step + 1 in steps else gradient

    def spoil_update(module, args, output):
        if torch.is_grad_enabled():
            output.update.register_hook(spoil)

    network = trainer.fusion_model.hypernetworks.networks[group]
    if inside:
        network.decoder.hidden.weight.register_hook(spoil)
    else:
        network.register_forward_hook(spoil_update)


@pytest.mark.parametrize(
    ("accumulation", "micro_batch", "value"), [(1, 3, float("nan")), (3, 7, float("inf")), (3, 9, float("-inf"))]
)
def test_bad_loss_stops_the_run_and_nothing_bad_is_saved(tmp_path, accumulation, micro_batch, value):
    """The run logs at step 100 only; what looks at step 3 is the save."""
    options = {"max_steps": 6, "gradient_accumulation_steps": accumulation, "logging_steps": 100}
    trainer = make_trainer(tmp_path, rows=TokenRows(24), save_strategy="steps", save_steps=1, **options)
    poison_loss(trainer, micro_batch, value)
    with pytest.raises(NonFiniteError, match=r"step 3: the loss and the gradient of (\w+, ){6}\w+ are not") as raised:
        trainer.train()
    assert f"the last good checkpoint is {tmp_path / 'checkpoint-2'}" in str(raised.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2"]


@pytest.mark.parametrize(
    ("accumulation", "max_grad_norm", "inside"), [(1, 0.0, False), (3, 1.0, False), (2, 0.0, True), (2, 1.0, True)]
)
def test_bad_gradient_of_one_role_names_that_role_alone(tmp_path, accumulation, max_grad_norm, inside):
    """Clipping spreads it over all parameters, once the culprit is known."""
    trainer = make_trainer(
        tmp_path, max_steps=4, gradient_accumulation_steps=accumulation, logging_steps=100, max_grad_norm=max_grad_norm
    )
    poison_gradient(trainer, "v_proj_r4", 2, inside=inside)
    with pytest.raises(NonFiniteError, match="step 2: the gradient of v_proj_r4 is not finite"):
        trainer.train()


@pytest.mark.parametrize("part", ["decoder", "source context"])
def test_role_with_bad_weights_or_context_is_named_alone(tmp_path, part):
    """Loss and gradients of all roles are bad then; the update is the cause."""
    trainer = make_trainer(tmp_path, logging_steps=100)
    model = trainer.fusion_model
    if part == "decoder":
        with torch.no_grad():
            model.hypernetworks.networks["o_proj_r4"].decoder.hidden.weight[0, 0] = float("nan")
    else:
        inputs = model.updates.predictor.contexts["o_proj_r4"].inputs
        inputs.split(inputs.blocks)[1][0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match="step 1: the update of o_proj_r4 is not finite"):
        trainer.train()


# ---- what is kept -----------------------------------------------------------------------------------------------


def test_nothing_is_exported_after_the_error_whoever_asks(tmp_path):
    trainer = make_trainer(tmp_path / "out", max_steps=3)
    poison_gradient(trainer, "v_proj_r4", 2)
    with pytest.raises(NonFiniteError, match="step 2"):
        trainer.train()
    with pytest.raises(NonFiniteError, match="step 2: the gradient of v_proj_r4"):
        trainer.save_model(str(tmp_path / "adapter"))
    with pytest.raises(ExportError, match=r"lora_B\.weight is not finite"):
        export_adapter(trainer.fusion_model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists() and not list(tmp_path.glob("out/*"))


def test_weights_that_a_finite_gradient_made_infinite_are_not_saved(tmp_path):
    """The learning rate alone does it: loss and gradient are finite at every step that is taken."""
    trainer = make_trainer(
        tmp_path, max_steps=4, save_strategy="steps", save_steps=1, logging_steps=100, lr_scheduler_type="constant",
        warmup_steps=0, weight_decay=0.0,
    )  # fmt: skip

    class Jump(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
            if state.global_step == 2:
                optimizer.param_groups[0]["lr"] = 1e39

    trainer.add_callback(Jump())
    with pytest.raises(
        NonFiniteError, match=r"checkpoint-3 is not saved: weights of (\w+, ){6}\w+ are not finite"
    ) as raised:
        trainer.train()
    assert f"the last good checkpoint is {tmp_path / 'checkpoint-2'}" in str(raised.value)
    assert last_complete_checkpoint(tmp_path).name == "checkpoint-2" and not (tmp_path / "checkpoint-3").exists()


def test_recipe_stops_with_one_line(arguments, base_dir, capsys, monkeypatch, logging_restored):
    """A user sees step, role, the checkpoint to go on from, and no adapter."""
    trained = train.HeteroFusionTrainer.train

    def poisoned(trainer, *args, **kwargs):
        poison_gradient(trainer, "v_proj_r4", 3)
        return trained(trainer, *args, **kwargs)

    monkeypatch.setattr(train.HeteroFusionTrainer, "train", poisoned)
    values = {
        **arguments, "model_name_or_path": base_dir, "max_steps": 5, "save_steps": 2, "save_strategy": "steps",
        "disable_tqdm": True,  # an unfinished bar would stand in the way of those of later tests
    }  # fmt: skip
    capsys.readouterr()
    assert train.main(flags(values)) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "step 3: the gradient of v_proj_r4 is not finite" in errors[0]
    assert str(arguments["output_dir"] / "checkpoint-2") in errors[0]
    assert {path.name for path in arguments["output_dir"].iterdir()} == {"checkpoint-2"}
