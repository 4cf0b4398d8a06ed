"""`--extra_rank` in the recipes: runs that resume, sequences, the plan, and the tuned adapter to compare with."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from heterofusion import load_adapter
from heterofusion.training.config import LORA_B
from heterofusion.training.expert import check_basis_engine
from recipe_runner import (
    ADAPTER,
    MISTRAL,
    QWEN,
    TARGET,
    error_line,
    flags,
    plan,
    recipe,
    record,
    remove,
    same_weights,
    succeeds,
    train,
)

pytestmark = pytest.mark.usefixtures("logging_restored")
expert = recipe("expert")
K = 5


@pytest.fixture(scope="module")
def expanded(common, tmp_path_factory) -> dict:
    """Flags of a fusion along the principal directions, and what it wrote."""
    folder = tmp_path_factory.mktemp("expanded")
    values = {
        **common, "target_adapter": TARGET, "source_adapters": [QWEN], "output_dir": folder / "out", "max_steps": 4,
        "extra_rank": K, "extra_basis": "activations", "save_steps": 2,
    }  # fmt: skip
    log = succeeds(train.main, flags(values))
    return {"values": values, "out": folder / "out", "log": log}


@pytest.fixture(scope="module")
def twin(common, tmp_path_factory) -> dict:
    """Flags of the same adapter tuned, and what it wrote."""
    folder = tmp_path_factory.mktemp("twin")
    values = {
        "model_name_or_path": common["model_name_or_path"], "dataset_name": common["dataset_name"],
        "init_adapter": TARGET, "output_dir": folder / "out", "use_cpu": True, "max_steps": 4, "learning_rate": 0.02,
        "save_steps": 2, "logging_steps": 1, "lora_dropout": 0.0, "train_only": LORA_B, "extra_rank": K,
        "extra_basis": "activations", "gradient_accumulation_steps": 2,
    }  # fmt: skip
    succeeds(expert.main, flags(values))
    return {"values": values, "out": folder / "out"}


# ---- fusions ----------------------------------------------------------------------------------------------------


def test_fused_adapter_keeps_the_anchors_rows_and_is_a_plain_one(expanded):
    fused, anchor = load_adapter(expanded["out"]), load_adapter(TARGET)
    for path, module in fused.modules.items():
        assert module.rank == 4 + K and torch.equal(module.lora_A[:4], anchor.modules[path].lora_A)
        assert module.lora_B[:, 4:].any() and module.scaling == anchor.modules[path].scaling
    basis = record(expanded["out"])["basis"]
    assert basis["scaled_by"] == "inputs" and basis["examples"] == 6
    assert "extra rank 5 (activations): rows fitted to" in expanded["log"]


def test_resumed_run_equals_the_uninterrupted(expanded, tmp_path):
    """Its rows come from the checkpoint: they would be others on other data."""
    shutil.copytree(expanded["out"], tmp_path / "out")
    remove(tmp_path / "out", "checkpoint-4", "fusion.json", ADAPTER)
    log = succeeds(
        train.main, flags({**expanded["values"], "output_dir": tmp_path / "out", "resume_from_checkpoint": True})
    )
    assert same_weights(tmp_path / "out" / ADAPTER, expanded["out"] / ADAPTER)
    assert record(tmp_path / "out")["basis"] == record(expanded["out"])["basis"]
    assert "rows fitted" not in log


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"extra_rank": 3}, ["another extra_rank: 5, this run has 3"]),
        ({"extra_rank": None, "extra_basis": None}, ["another extra_rank: 5, this run has 0"]),
        ({"extra_basis": "random"}, ["another extra_basis", "activations", "random"]),
    ],
)
def test_resume_with_another_basis_is_refused(changed, words, expanded, capsys, monkeypatch):
    monkeypatch.setattr(train, "load_base", lambda *args: pytest.fail("the base was loaded"))
    values = {**expanded["values"], "resume_from_checkpoint": expanded["out"] / "checkpoint-2", **changed}
    error_line(capsys, train.main, flags(values), *words)


def test_hypernetworks_of_another_rank_do_not_fit(expanded, fails):
    words = ["no group of this fusion", "--extra_rank was another"]
    fails(*words, init_hypernetwork_from=expanded["out"] / "checkpoint-2", save_steps=None)


def test_dry_run_and_plan_show_the_ranks(expanded, tmp_path, capsys):
    words = ("extra rank: 5 (activations)", "q_proj r4 s2")
    assert train.main(flags({**expanded["values"], "output_dir": tmp_path / "out", "dry_run": True})) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in words) and "re-factored" not in shown
    names = ("target_adapter", "source_adapters", "extra_rank", "extra_basis")
    values = {name: expanded["values"][name] for name in names}
    succeeds(plan.main, flags({**values, "output": tmp_path / "plan.json"}))
    summary = json.loads((tmp_path / "plan.json").read_text())
    assert "q_proj_r9" in summary["groups"]
    assert {(row["rank"], row["sources_at_rank"]) for row in summary["modules"]} == {(9, 4)}
    error_line(capsys, plan.main, flags({**values, "extra_rank": 45}), "--extra_rank is 45", "at most 44")


def test_every_fusion_in_a_row_adds_its_own_rank(common, tmp_path):
    """The second takes all that the first has written for its own, and adds to it."""
    values = {**common, "source_adapters": [MISTRAL], "max_steps": 1, "save_steps": 1}
    start = {"target_adapter": tmp_path / "two", "init_hypernetwork_from": tmp_path / "two"}
    succeeds(train.main, flags({**values, "target_adapter": TARGET, "extra_rank": K, "output_dir": tmp_path / "one"}))
    second = {"target_adapter": tmp_path / "one", "extra_rank": 2, "output_dir": tmp_path / "two"}
    succeeds(train.main, flags({**values, **second}))
    assert "q_proj_r11" in succeeds(train.main, flags({**values, **start, "output_dir": tmp_path / "three"}))
    one, two, three = (load_adapter(tmp_path / name) for name in ("one", "two", "three"))
    for path, module in load_adapter(TARGET).modules.items():
        assert [adapter.modules[path].rank for adapter in (one, two, three)] == [9, 11, 11]
        assert torch.equal(one.modules[path].lora_A[:4], module.lora_A)
        assert torch.equal(two.modules[path].lora_A[:9], one.modules[path].lora_A)
        assert torch.equal(three.modules[path].lora_A, two.modules[path].lora_A)
        assert three.modules[path].scaling == module.scaling


# ---- the tuned adapter ------------------------------------------------------------------------------------------


def test_tuned_adapter_has_the_rows_of_the_fusion(twin, expanded):
    """Same seed, same data: lora_A is the same, bit for bit, so that what differs is how lora_B was found."""
    tuned, fused = load_adapter(twin["out"]), load_adapter(expanded["out"])
    for path, module in fused.modules.items():
        assert torch.equal(tuned.modules[path].lora_A, module.lora_A), path
        assert tuned.modules[path].scaling == module.scaling
        assert tuned.modules[path].lora_B[:, 4:].any()
        assert not torch.equal(tuned.modules[path].lora_B[:, :4], load_adapter(TARGET).modules[path].lora_B)
    found = json.loads((twin["out"] / "expert.json").read_text())
    assert found["basis"] == record(expanded["out"])["basis"]
    assert found["lora"]["r"] == 9 and "Every lora_A has 5 rows more" in (twin["out"] / "README.md").read_text()


def test_resumed_tuning_equals_the_uninterrupted(twin, tmp_path, capsys):
    shutil.copytree(twin["out"], tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    values = {**twin["values"], "output_dir": tmp_path / "out", "resume_from_checkpoint": True}
    succeeds(expert.main, flags(values))
    assert same_weights(tmp_path / "out" / ADAPTER, twin["out"] / ADAPTER)
    records = [json.loads((folder / "expert.json").read_text())["basis"] for folder in (tmp_path / "out", twin["out"])]
    assert records[0] == records[1]
    error_line(capsys, expert.main, flags({**values, "extra_rank": 3}), "another extra_rank: 5, this run has 3")
    error_line(capsys, expert.main, flags({**values, "extra_basis": "random"}), "another extra_basis")
    plain = {name: value for name, value in values.items() if not name.startswith("extra")}
    error_line(capsys, expert.main, flags(plain), "another extra_rank: 5, this run has null")


def test_extra_rank_without_an_adapter_to_begin_as_is_refused(twin, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(expert, "load_base", lambda *args: pytest.fail("the base was loaded"))
    run = {**twin["values"], "output_dir": tmp_path / "out"}
    error_line(capsys, expert.main, flags({**run, "init_adapter": None}), "--extra_rank is 5", "--init_adapter", "--r")
    error_line(capsys, expert.main, flags({**run, "extra_rank": 45}), "--extra_rank is 45", "at most 44")
    error_line(capsys, expert.main, flags({**run, "extra_rank": 0}), "--extra_basis is activations", "no rows")


def test_deepspeed_is_refused_where_it_would_not_take_the_rows(capsys):
    lora = SimpleNamespace(expansion=object(), train_only=None)
    with_deepspeed = SimpleNamespace(deepspeed_plugin=object())
    with pytest.raises(ValueError, match=r"DeepSpeed.*--train_only lora_B"):
        check_basis_engine(lora, with_deepspeed)
    lora.train_only = LORA_B
    check_basis_engine(lora, with_deepspeed)
