"""recipes/expert.py with source labels: the tuning that a fusion is compared with sees what the fusion sees."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from torch.optim import AdamW

from conftest import fresh_base
from heterofusion import load_adapter
from heterofusion.training.base import AdapterTrainer
from heterofusion.training.config import ExpertConfig
from heterofusion.training.mixture import PART
from recipe_runner import QWEN, SIZES, TARGET, error_line, flags, recipe, succeeds, train, write_replay
from test_source_labels import label, write_labels
from test_source_labels_training import in_order, mixture

pytestmark = pytest.mark.usefixtures("logging_restored")
expert = recipe("expert")
PARTS = ("loss_replay", "loss_labels")


def history(folder: Path) -> list[dict]:
    return [line for line in json.loads((folder / "trainer_state.json").read_text())["log_history"] if "loss" in line]


def record_of(folder: Path, name: str = "expert.json") -> dict:
    return json.loads((folder / name).read_text())


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("labels")
    rows = [label(10 + i, task=("town", "stage")[i % 2], good=i != 3) for i in range(9)]
    return {
        "dataset_name": [write_replay(folder / "replay.json", count=5)],
        "source_labels": [write_labels(folder / "labels.jsonl", *rows)],
    }


@pytest.fixture(scope="module")
def shared(base_dir, files) -> dict:
    """Flags that a fusion and its twin have alike; an epoch of 16 examples is two steps."""
    return {
        "model_name_or_path": base_dir, **files, "use_cpu": True, "max_steps": 5, "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2, "learning_rate": 0.01, "logging_steps": 1, "extra_rank": 2, "seed": 7,
    }  # fmt: skip


@pytest.fixture(scope="module")
def twin(shared, tmp_path_factory) -> dict:
    """Flags of the tuning that is compared with a fusion."""
    return {
        **shared, "init_adapter": TARGET, "train_only": "lora_B", "lora_dropout": 0.0,
        "output_dir": tmp_path_factory.mktemp("twin") / "out", "save_strategy": "steps", "save_steps": 3,
    }  # fmt: skip


def watched(main, argv: list[str]) -> list[tuple]:
    """The micro-batches that a recipe trains on: token ids, labels and parts."""
    seen = []
    compute = AdapterTrainer.compute_loss

    def note(self, model, inputs, *args, **kwargs):
        seen.append(tuple(inputs[name].tolist() for name in ("input_ids", "labels", PART)))
        return compute(self, model, inputs, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdapterTrainer, "compute_loss", note)
        succeeds(main, argv)
    return seen


@pytest.fixture(scope="module")
def tuned(twin) -> SimpleNamespace:
    return SimpleNamespace(out=twin["output_dir"], seen=watched(expert.main, flags(twin)))


@pytest.fixture(scope="module")
def fused(shared, tmp_path_factory) -> SimpleNamespace:
    out = tmp_path_factory.mktemp("fused") / "out"
    run = {
        **shared, **SIZES, "target_adapter": TARGET, "source_adapters": [QWEN], "output_dir": out,
        "save_strategy": "no",
    }  # fmt: skip
    return SimpleNamespace(out=out, seen=watched(train.main, flags(run)))


# ---- what it sees -----------------------------------------------------------------------------------------------


def test_twin_sees_the_examples_of_the_fusion_in_its_order(tuned, fused):
    assert len(tuned.seen) == 10 and tuned.seen == fused.seen
    assert {sum(parts) for _, _, parts in tuned.seen} <= {2, 3}  # of 4 labels: 2.5
    epochs = [[row for batch in tuned.seen[first : first + 4] for row in batch[0]] for first in (0, 4)]
    assert epochs[0] != epochs[1]


def test_both_begin_with_the_same_losses_and_rows(tuned, fused):
    """A fusion begins as its target; then they part."""
    one, other = history(tuned.out), history(fused.out)
    for name in PARTS:
        assert one[0][name] == pytest.approx(other[0][name], abs=1e-6), name
        assert one[-1][name] != pytest.approx(other[-1][name], abs=1e-6), name
    assert all({*PARTS} <= set(line) for line in one)
    rows = [load_adapter(folder).state_dict() for folder in (tuned.out, fused.out)]
    for key, tensor in rows[0].items():
        assert torch.equal(tensor, rows[1][key]) == key.endswith("lora_A.weight"), key


def test_record_tells_of_the_labels_as_that_of_the_fusion(tuned, fused):
    record, wanted = record_of(tuned.out), record_of(fused.out, "fusion.json")
    assert record["training"]["source_labels"] == wanted["training"]["source_labels"]
    assert record["training"]["data"]["datasets"][0]["kept"] == 5
    assert record["training"]["source_labels"]["kept"] == 8
    assert record["made_by"]["ran_source_models"] is wanted["made_by"]["ran_source_models"] is True
    card = (tuned.out / "README.md").read_text()
    assert "| replay.json | 5 |\n| labels.jsonl | 8 |" in card and "8 source labels (labels.jsonl)" in card
    assert "38.5% of the examples" in card


# ---- how it trains ----------------------------------------------------------------------------------------------


def make(folder: Path, data, accumulation: int, evaluation=None, **changes) -> AdapterTrainer:
    model = PeftModel.from_pretrained(fresh_base(), TARGET, is_trainable=True)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    options = {
        "use_cpu": True, "max_steps": 1, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True,
        "per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation,
    }  # fmt: skip
    args = ExpertConfig(str(folder), **{**options, **changes})
    return AdapterTrainer(model, args, train_dataset=data, eval_dataset=evaluation)


def test_gradient_is_that_of_the_plain_loss_whatever_the_accumulation(tmp_path, monkeypatch):
    data = mixture()
    reference = make(tmp_path, data, 1).model.train()
    rows = in_order(data)[:8]
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0] if name != PART}
    reference(**batch).loss.backward()  # a mean over all label tokens
    wanted = {name: p.grad for name, p in reference.named_parameters() if p.requires_grad}
    found: dict[str, torch.Tensor] = {}

    def keep(optimizer, *args, **kwargs):
        found.update({name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.requires_grad})

    monkeypatch.setattr(AdamW, "step", keep)
    for accumulation in (1, 2):
        found.clear()
        trainer = make(tmp_path, data, accumulation, max_grad_norm=0.0)
        trainer.train()
        assert found.keys() == wanted.keys() and max(tensor.abs().max() for tensor in wanted.values()) > 1e-3
        for name, tensor in wanted.items():
            torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-5)


def test_a_checkpoint_tells_of_all_its_steps(twin, tmp_path):
    """Between two log lines too: what was not logged when it is written is lost to a run that resumes."""
    run = {**twin, "output_dir": tmp_path / "out", "logging_steps": 4, "save_steps": 1, "max_steps": 2}
    succeeds(expert.main, flags(run))
    assert [line["step"] for line in history(tmp_path / "out" / "checkpoint-1")] == [1]


# ---- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"source_labels": None, "dataset_name": None}, ["--dataset_name is missing", "training data set"]),
        ({"replay_fraction": 0}, ["--replay_fraction is 0", "never be seen"]),
        ({"min_log_probability": -0.01}, ["no source label is left", "8 below --min_log_probability -0.01"]),
    ],
    ids=str,
)
def test_bad_flags_are_refused_before_the_base_is_loaded(changed, words, twin, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(expert, "load_base", lambda *args: pytest.fail("the base was loaded"))
    error_line(capsys, expert.main, flags({**twin, "output_dir": tmp_path / "out", **changed}), *words)
    assert not (tmp_path / "out").exists()
