"""The trainer: what moves, what is counted once, what is logged."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainingArguments

from conftest import GOLDEN, TokenRows, first_gradients, make_args, make_model, make_trainer, perturb
from heterofusion import HeteroFusionTrainer, load_adapter
from heterofusion.training.metrics import mean_over_roles


@pytest.mark.parametrize("case", ["both", "mistral_half"])
def test_training_moves_every_aligned_b_and_nothing_else(tmp_path, case):
    names = ("source_mistral",) if case == "mistral_half" else ("source_qwen2", "source_mistral")
    args = make_args(tmp_path, transfer_ratio="1/2" if case == "mistral_half" else "1")
    model = make_model(args, names)
    trainer = HeteroFusionTrainer(model, args, train_dataset=TokenRows())
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    moving = {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}
    trainer.train()
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name
        else:
            assert not torch.equal(parameter, moving[name]), name
    trainer.save_model()
    fused, anchor = (
        load_file(tmp_path / "adapter_model.safetensors"),
        load_adapter(GOLDEN / "target_llama").state_dict(),
    )
    aligned = {f"base_model.model.{item.target.module.path}.lora_B.weight" for item in model.plan.aligned}
    assert 0 < len(aligned) < len(anchor)
    for key, tensor in anchor.items():
        assert torch.equal(fused[key], tensor) == (key not in aligned), key


@pytest.mark.parametrize("checkpointing", [False, True])
def test_once_per_window_equals_once_per_micro_batch(tmp_path, monkeypatch, checkpointing):
    """Micro-batches have unequal label counts. Whatever the accumulation it is the same: test_distributed.py."""

    def run(folder):
        trainer = make_trainer(
            folder, gradient_accumulation_steps=4, max_steps=1, rdm_weight=0.5, train_sampling_strategy="sequential",
            activation_checkpointing=checkpointing,
        )  # fmt: skip
        return first_gradients(monkeypatch, trainer), trainer.state.log_history[0]

    once, log = run(tmp_path / "once")
    monkeypatch.setattr("heterofusion.training.trainer.ONCE_PER_WINDOW", set())
    every, other = run(tmp_path / "every")
    assert max(g.abs().max() for g in once) > 1e-3
    for a, b in zip(once, every, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    for name in ("lm_loss", "rdm_loss", "loss"):
        assert log[name] == pytest.approx(other[name], abs=1e-5), name
    assert log["loss"] == pytest.approx(log["lm_loss"] + 0.5 * log["rdm_loss"], abs=1e-5)


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_hypernetworks_run_twice_and_backpropagate_once_per_window(tmp_path, accumulation):
    trainer = make_trainer(
        tmp_path, gradient_accumulation_steps=accumulation, per_device_train_batch_size=1, logging_steps=100
    )
    network = trainer.model.hypernetworks.networks["q_proj_r4"]
    forwards, backwards = [], []
    network.register_forward_hook(lambda *_: forwards.append(torch.is_grad_enabled()))
    network.decoder.output.weight.register_hook(lambda gradient: backwards.append(1))
    trainer.train()
    steps = trainer.state.global_step
    assert forwards.count(True) == len(backwards) == steps
    assert forwards.count(False) == (steps if accumulation > 1 else 0)


def test_rdm_noise_depends_on_seed_and_step_only(tmp_path):
    model = perturb(make_model(make_args(tmp_path)))
    row = {name: tensor.unsqueeze(0) for name, tensor in TokenRows(1)[0].items()}

    def rdm(step):
        model(**row, rdm_step=step)
        return model.rdm_loss.item()

    torch.manual_seed(0)
    first, other = rdm(3), rdm(4)
    torch.manual_seed(1)
    assert rdm(3) == first
    assert other != first
    model(**row)
    assert model.rdm_loss is None


def test_all_parameters_decay_and_warmup_is_rounded_down(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=39)
    trainer.create_optimizer_and_scheduler(39)
    decays = {id(p): g["weight_decay"] for g in trainer.optimizer.param_groups for p in g["params"]}
    assert set(decays) == {id(p) for p in trainer.model.parameters() if p.requires_grad}
    assert set(decays.values()) == {0.01}
    assert trainer.args.get_warmup_steps(39) == 1  # 1.95 rounded down
    assert trainer.args.get_warmup_steps(19) == 0
    assert make_args(tmp_path, warmup_steps=7).get_warmup_steps(39) == 7
    assert trainer.args.max_grad_norm == 0


def test_log_has_losses_and_state_per_role_and_source(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    log = trainer.state.log_history[1]
    for role in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        assert 0 <= log[f"gate_sparsity/{role}"] <= 1
        assert log[f"delta_ratio/{role}"] > 0
        assert log[f"alpha/{role}"] == pytest.approx(0.3, abs=0.01)
    shares = [value for name, value in log.items() if name.startswith("attention/")]
    assert len(shares) == 2 and sum(shares) == pytest.approx(1, abs=1e-5)
    assert log["hypernetwork_seconds"] > 0
    assert log["lm_loss"] > 0 and log["rdm_loss"] > 0
    short = mean_over_roles(log)
    assert short["mean alpha"] == pytest.approx(0.3, abs=0.01)
    assert not [name for name in short if name.startswith("alpha/")]


def test_evaluation_loss_is_the_lm_loss(tmp_path):
    trainer = make_trainer(
        tmp_path, trainer_options={"eval_dataset": TokenRows(4, seed=5)}, rdm_weight=10.0, per_device_eval_batch_size=4
    )
    found = trainer.evaluate()["eval_loss"]
    rows = TokenRows(4, seed=5)
    batch = {name: torch.stack([rows[i][name] for i in range(4)]) for name in rows[0]}
    with torch.no_grad():
        wanted = trainer.model(**batch).loss.item()
    assert found == pytest.approx(wanted, abs=1e-5)


def test_bf16_checkpointing_and_tensorboard_run_together(tmp_path):
    trainer = make_trainer(
        tmp_path, bf16=True, activation_checkpointing=True, report_to="tensorboard", logging_steps=1
    )
    before = trainer.model.hypernetworks.state_dict()["networks.q_proj_r4.decoder.output.weight"].clone()
    trainer.train()
    after = trainer.model.hypernetworks.state_dict()["networks.q_proj_r4.decoder.output.weight"]
    assert after.dtype == torch.float32 and not torch.equal(before, after)
    assert list(tmp_path.rglob("events.out.tfevents*"))


def test_other_model_or_args_or_settings_raise(tmp_path, base):
    args = make_args(tmp_path)
    with pytest.raises(TypeError, match="from_adapters"):
        HeteroFusionTrainer(base, args)
    with pytest.raises(TypeError, match="HeteroFusionConfig"):
        HeteroFusionTrainer(make_model(args), TrainingArguments(str(tmp_path), use_cpu=True))
    with pytest.raises(ValueError, match=r"rdm_weight is 0\.005 in the model and 0\.5 in args"):
        HeteroFusionTrainer(make_model(args), make_args(tmp_path, rdm_weight=0.5))


def test_a_gradient_scaler_turns_collecting_off(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, gradient_accumulation_steps=4)
    trainer.train()
    assert trainer._once_per_window
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    trainer._prepare_for_training(2, trainer.get_train_dataloader(), None)
    assert not trainer._once_per_window


def test_reentrant_checkpointing_raises(tmp_path):
    reentrant = {"activation_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(ValueError, match="use_reentrant"):
        make_args(tmp_path, activation_checkpointing=True, **reentrant)
    trainer = make_trainer(tmp_path)
    trainer.model.get_base_model().activation_checkpointing_enable(**reentrant)
    with pytest.raises(ValueError, match="reentrant"):
        trainer.train()
