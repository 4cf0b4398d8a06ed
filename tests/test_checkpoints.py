"""Checkpoints: which are complete, which one is the last, which ones go, and whose they are."""

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import EarlyStoppingCallback

from conftest import GOLDEN, TokenRows, fresh_base, make_args, make_model, make_trainer
from heterofusion import HeteroFusionModel, load_adapter
from heterofusion.training.checkpoints import (
    COMPLETE_FILE,
    HYPERNETWORKS_FILE,
    IDENTITY_FILE,
    last_complete_checkpoint,
    load_hypernetworks,
    mark_complete,
    missing_part,
)
from recipe_runner import copy_adapter


def write_checkpoint(folder, complete=True):
    """A folder as a checkpoint has it, with a file in a folder of its own as DeepSpeed writes them."""
    (folder / "global_step2").mkdir(parents=True)
    for name in ("hypernetworks.safetensors", "optimizer.pt", "global_step2/rank_0.pt"):
        (folder / name).write_bytes(b"0123456789")
    if complete:
        mark_complete(folder)
    return folder


# ---- which are complete -----------------------------------------------------------------------------------------


def test_marked_checkpoint_is_complete(tmp_path):
    folder = write_checkpoint(tmp_path / "checkpoint-2")
    (folder / "notes.txt").write_text("a user's")
    assert missing_part(folder) is None
    mark_complete(folder)  # a second time: it does not list itself
    names = {"global_step2/rank_0.pt", "hypernetworks.safetensors", "optimizer.pt", "notes.txt"}
    assert json.loads((folder / COMPLETE_FILE).read_text())["files"].keys() == names


@pytest.mark.parametrize(
    ("name", "content", "lack"),
    [
        (COMPLETE_FILE, None, f"{COMPLETE_FILE}, the last file to be written, is missing"),
        ("optimizer.pt", None, "optimizer.pt is missing"),
        ("optimizer.pt", b"0123", "optimizer.pt has 4 bytes instead of 10"),
        ("optimizer.pt", b"", "optimizer.pt has 0 bytes instead of 10"),
        ("global_step2/rank_0.pt", None, "global_step2/rank_0.pt is missing"),
        *((COMPLETE_FILE, damaged, f"{COMPLETE_FILE} is damaged") for damaged in (b"", b"[]", b"{}", b"\x00" * 200)),
    ],
)
def test_missing_part_is_named(tmp_path, name, content, lack):
    folder = write_checkpoint(tmp_path / "checkpoint-2")
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    assert missing_part(folder) == lack


# ---- which is the last ------------------------------------------------------------------------------------------


def test_last_checkpoint_is_that_of_the_highest_step(tmp_path):
    for name in ("checkpoint", "checkpoint-", "checkpoint-300x", "old-checkpoint-300", "checkpoint--300"):
        write_checkpoint(tmp_path / name)
    (tmp_path / "checkpoint-400").write_text("a file")
    assert last_complete_checkpoint(tmp_path) is None and last_complete_checkpoint(tmp_path / "nowhere") is None
    for step in (10, 9, 100, 99):  # by name 99 would be the last, by time too
        write_checkpoint(tmp_path / f"checkpoint-{step}")
    assert last_complete_checkpoint(tmp_path).name == "checkpoint-100"


def test_unfinished_checkpoints_are_passed_over_and_told(tmp_path, caplog):
    write_checkpoint(tmp_path / "checkpoint-1")
    write_checkpoint(tmp_path / "checkpoint-2", complete=False)
    (write_checkpoint(tmp_path / "checkpoint-3") / "optimizer.pt").write_bytes(b"")
    with caplog.at_level(logging.WARNING, "heterofusion"):
        assert last_complete_checkpoint(tmp_path).name == "checkpoint-1"
    first, second = caplog.messages
    assert str(tmp_path / "checkpoint-3") in first and "0 bytes instead of 10" in first
    assert str(tmp_path / "checkpoint-2") in second and COMPLETE_FILE in second


def test_unfinished_checkpoint_is_not_resumed_from(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=2)
    trainer.train()
    (tmp_path / "checkpoint-2" / "optimizer.pt").write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"not a complete checkpoint: optimizer\.pt has 3 bytes"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    with pytest.raises(ValueError, match="no complete checkpoint-N folder"):
        trainer.train(resume_from_checkpoint=True)


# ---- writing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "kept"), [(1, [4]), (2, [3, 4]), (None, [1, 2, 3, 4])])
def test_only_the_newest_checkpoints_are_kept(tmp_path, limit, kept):
    """That they go only once the new one is complete: test_faults.py."""
    make_trainer(tmp_path, max_steps=4, save_strategy="steps", save_steps=1, save_total_limit=limit).train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{step}" for step in kept]


def test_what_a_killed_run_left_is_replaced(tmp_path):
    left = write_checkpoint(tmp_path / "checkpoint-2", complete=False)
    make_trainer(tmp_path, save_strategy="steps", save_steps=2).train()
    assert missing_part(left) is None and not (left / "global_step2").exists()
    listed = json.loads((left / COMPLETE_FILE).read_text())["files"]
    assert set(listed) | {COMPLETE_FILE} == {path.name for path in left.iterdir()}
    assert {HYPERNETWORKS_FILE, IDENTITY_FILE, "optimizer.pt", "scheduler.pt", "trainer_state.json"} < set(listed)


# ---- resuming ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint of the fusion of `make_model`."""
    folder = tmp_path_factory.mktemp("trained")
    make_trainer(folder, max_steps=1, save_strategy="steps", save_steps=1).train()
    return folder / "checkpoint-1"


def negate(weights):
    name = sorted(weights)[0]
    weights[name] = -weights[name]


def other_fusion(tmp_path, change):
    """The fusion of `make_model`, but for one thing."""
    names = {"target": "target_llama", "first source": "source_qwen2", "last source": "source_mistral"}
    folders = {part: GOLDEN / name for part, name in names.items()}
    settings = change if isinstance(change, dict) else {}
    if not settings:
        part, config = change if isinstance(change, tuple) else (change, None)
        folders[part] = copy_adapter(tmp_path / "other", folders[part], config, None if config else negate)
    target, *sources = map(load_adapter, folders.values())
    return HeteroFusionModel.from_adapters(fresh_base(), target, sources, make_args(tmp_path, **settings))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ("target", r"target_sha256: \"cd724cea"),
        ("first source", r"source_sha256\[0\]: \"f24e2384"),
        ("last source", r"source_sha256\[1\]: \"55476300"),
        (("target", {"lora_alpha": 16}), r"target_config\.lora_alpha: 8, this run has 16"),
        (("last source", {"lora_alpha": 16}), r"source_config\[1\]\.lora_alpha: \d+, this run has 16"),
        ({"embed_dim": 16}, r"hypernetwork\.embed_dim: 32, this run has 16"),
        ({"block_size": 16}, r"hypernetwork\.block_size: 32, this run has 16"),
        ({"preset": "compact"}, r"hypernetwork\.form: \"paper\", this run has \"compact\""),
        ({"canonicalize": True}, "canonicalize: false, this run has true"),
        ({"layer_alignment": "proportional"}, 'layer_alignment: "tail", this run has "proportional"'),
        ({"transfer_ratio": "1/2"}, 'transfer_ratio: "1", this run has "1/2"'),
    ],
    ids=str,
)
def test_resuming_another_fusion_names_what_differs(tmp_path, trained, change, field):
    with pytest.raises(ValueError, match=f"was trained with another {field}"):
        load_hypernetworks(other_fusion(tmp_path, change), trained)


@pytest.mark.parametrize(
    ("record", "field"),
    [
        ({"engine": "zero2", "processes": 2}, r'engine: "zero2", this run has "plain"'),
        ({"processes": 4}, "processes: 4, this run has null"),
        ({"groups": {}}, r"groups\.\w+: null, this run has \[\"model\.layers"),
    ],
    ids=lambda value: "".join(value) if isinstance(value, dict) else "",
)
def test_trainer_refuses_a_checkpoint_of_another_engine_or_plan(tmp_path, trained, record, field):
    """Which files of optimizer states there are depends on the engine, and under ZeRO on the number of ranks."""
    folder = shutil.copytree(trained, tmp_path / "checkpoint-1")
    identity = json.loads((folder / IDENTITY_FILE).read_text())
    assert (identity["engine"], identity["processes"]) == ("plain", None)
    (folder / IDENTITY_FILE).write_text(json.dumps({**identity, **record}))
    mark_complete(folder)
    with pytest.raises(ValueError, match=f"was trained with another {field}"):
        make_trainer(tmp_path).train(resume_from_checkpoint=True)


def test_weights_that_cannot_be_loaded_raise(tmp_path, trained):
    model = make_model(make_args(tmp_path))
    folder = shutil.copytree(trained, tmp_path / "checkpoint-1")
    weights = folder / HYPERNETWORKS_FILE
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf"{HYPERNETWORKS_FILE} cannot be loaded"):
        load_hypernetworks(model, folder)
    save_file(
        {name: tensor for name, tensor in load_file(trained / HYPERNETWORKS_FILE).items() if "q_proj" in name}, weights
    )
    with pytest.raises(ValueError, match="other tensors than expected"):
        load_hypernetworks(model, folder)
    weights.unlink()
    with pytest.raises(ValueError, match="is missing"):
        load_hypernetworks(model, folder)


def test_checkpoint_without_an_optimizer_is_not_resumed(tmp_path):
    """Trainer would begin a new optimizer and schedule without a word."""
    settings = {"save_strategy": "steps", "save_steps": 1, "save_only_model": True}
    make_trainer(tmp_path, **settings).train()
    with pytest.raises(ValueError, match=r"--save_only_model and holds no optimizer.*--init_hypernetwork_from"):
        make_trainer(tmp_path, **settings).train(resume_from_checkpoint=True)


def test_best_and_early_stopping_and_a_stopped_run_does_not_go_on_when_resumed(tmp_path):
    """Killed in its export, say: the last checkpoint is that of its end."""

    def early():
        options = {"eval_dataset": TokenRows(4, seed=5), "callbacks": [EarlyStoppingCallback(1)]}
        return make_trainer(
            tmp_path, trainer_options=options, max_steps=8, eval_strategy="steps", eval_steps=1,
            learning_rate=0.3,  # diverges, so that the first evaluations are the best
            save_strategy="steps", save_steps=1, load_best_model_at_end=True,
        )  # fmt: skip

    whole = early()
    whole.train()
    stopped = whole.state.global_step
    assert stopped < 8
    best = load_file(f"{whole.state.best_model_checkpoint}/{HYPERNETWORKS_FILE}")
    for name, tensor in whole.model.hypernetworks.state_dict().items():
        assert torch.equal(tensor, best[name]), name
    assert whole.evaluate()["eval_loss"] == pytest.approx(whole.state.best_metric, abs=1e-6)
    again = early()
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == stopped
    for a, b in zip(whole.model.hypernetworks.parameters(), again.model.hypernetworks.parameters(), strict=True):
        assert torch.equal(a, b)
