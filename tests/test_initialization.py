"""`--init_hypernetwork_from`, and single runs that resume or write over an old one."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from heterofusion.runtime.files import file_sha256
from recipe_runner import (
    ADAPTER,
    HYPERNETWORKS,
    QWEN,
    copy_adapter,
    error_line,
    flags,
    record,
    remove,
    same_weights,
    stop_at,
    succeeds,
    train,
)

pytestmark = pytest.mark.usefixtures("logging_restored")


# ---- --init_hypernetwork_from -----------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["one/checkpoint-2", "one", "."])
def test_run_starts_from_other_hypernetworks(place, two, single, watch, tmp_path):
    """A checkpoint, or an output_dir, whose last complete checkpoint counts."""
    folder = tmp_path / "from"
    shutil.copytree(two.out, folder)
    remove(folder, "checkpoint-3/checkpoint_complete.json")
    log = succeeds(train.main, flags({**single, "init_hypernetwork_from": folder / place}))
    file = folder / {"one": "one/checkpoint-2", ".": "checkpoint-2"}.get(place, place) / HYPERNETWORKS
    saved = load_file(file)
    for name, tensor in watch.begun["out"].items():
        assert name not in saved or torch.equal(tensor, saved[name]), name
    found = record(tmp_path / "out")["training"]["initialization"]
    assert found["sha256"] == file_sha256(file)
    assert len(found["groups"]) == (3 if place == "." else 7) and f"hypernetworks of {found['from']}" in log
    assert str(tmp_path) not in (tmp_path / "out" / "fusion.json").read_text()


def test_checkpoint_wins_over_other_hypernetworks_on_resume(two, single, watch, tmp_path):
    """The folder may even be gone; the record stays."""
    source = tmp_path / "from"
    shutil.copytree(two.out / "one", source)
    values = {**single, "init_hypernetwork_from": source, "max_steps": 2, "save_steps": 1}
    succeeds(train.main, flags(values))
    whole = tmp_path / "whole"
    shutil.copytree(tmp_path / "out", whole)
    remove(tmp_path / "out", "fusion.json", ADAPTER, "checkpoint-2")
    shutil.rmtree(source)
    log = succeeds(train.main, flags({**values, "resume_from_checkpoint": True}))
    assert same_weights(tmp_path / "out" / ADAPTER, whole / ADAPTER)
    assert record(tmp_path / "out")["training"] == record(whole)["training"]
    assert "hypernetworks of from" not in log


def damage_shape(folder: Path) -> None:
    state = load_file(folder / HYPERNETWORKS)
    name = "networks.q_proj_r4.alpha"
    save_file({**state, name: state[name].repeat(2)}, folder / HYPERNETWORKS)


def leave_out(folder: Path) -> None:
    state = load_file(folder / HYPERNETWORKS)
    del state["networks.q_proj_r4.fusion_norm.bias"]
    save_file(state, folder / HYPERNETWORKS)


BAD_START = {
    "a folder that is missing": (shutil.rmtree, {}, ["is no folder"]),
    "an empty folder": (lambda folder: remove(folder, "*"), {}, ["holds neither"]),
    "an identity without sizes": (lambda folder: (folder / "fusion_state.json").write_text("{}"), {}, ["form None"]),
    "a damaged file": (lambda folder: (folder / HYPERNETWORKS).write_bytes(b"12345678"), {}, ["cannot be read"]),
    "another shape": (damage_shape, {}, ["networks.q_proj_r4.alpha", "(2,)", "(1,)"]),
    "a tensor that is missing": (leave_out, {}, ["networks.q_proj_r4.fusion_norm.bias", "missing"]),
    "other sizes": (None, {"block_size": 64}, ["block_size 32", "64", "--block_size"]),
    "another form": (None, {"preset": "compact"}, ["form paper", "compact", "--preset"]),
}


@pytest.mark.parametrize("case", BAD_START)
def test_hypernetworks_that_do_not_fit_raises(case, two, fails, tmp_path):
    damage, changed, words = BAD_START[case]
    folder = tmp_path / "from"
    shutil.copytree(two.out / "one" / "checkpoint-2", folder)
    if damage is not None:
        damage(folder)
    fails(f"--init_hypernetwork_from {folder}", *words, init_hypernetwork_from=folder, **changed)


def test_hypernetworks_of_other_groups_raises(two, fails, tmp_path):
    def only_keys(tensors: dict) -> None:
        for name in [name for name in tensors if "k_proj" not in name]:
            del tensors[name]

    other = copy_adapter(tmp_path / "other", QWEN, {"target_modules": ["k_proj"]}, only_keys)
    words = ["no group of this fusion (k_proj_r4)", "other roles or ranks"]
    fails(*words, init_hypernetwork_from=two.out / "checkpoint-2", source_adapters=[other])


def test_hypernetworks_that_would_be_overwritten_raises(two, fails, arguments):
    shutil.copytree(two.out, arguments["output_dir"])
    fails("--overwrite true removes", init_hypernetwork_from=arguments["output_dir"], overwrite=True)


# ---- single runs ------------------------------------------------------------------------------------------------


def test_resuming_where_there_is_no_checkpoint_raises(fails, arguments):
    """A folder that was mistyped, most likely; half-written checkpoints are none: see test_faults.py."""
    fails(arguments["output_dir"], "no checkpoint-N folder", resume_from_checkpoint=True)
    arguments["output_dir"].mkdir()
    fails(arguments["output_dir"], "no checkpoint-N folder", resume_from_checkpoint=True)


def test_overwritten_run_is_not_resumed_from_the_old_one(single, monkeypatch, capsys):
    succeeds(train.main, flags(single))
    again = {**single, "learning_rate": 0.02}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, 0)
        train.main(flags({**again, "overwrite": True}))
    error_line(capsys, train.main, flags({**again, "resume_from_checkpoint": True}), "no checkpoint-N folder")


def test_run_that_resumes_at_its_end_makes_no_further_step(single, tmp_path):
    succeeds(train.main, flags({**single, "lr_scheduler_type": "constant"}))
    shutil.copytree(tmp_path / "out", tmp_path / "whole")
    succeeds(train.main, flags({**single, "lr_scheduler_type": "constant", "resume_from_checkpoint": True}))
    assert record(tmp_path / "out")["training"]["steps"] == 1
    assert same_weights(tmp_path / "out" / ADAPTER, tmp_path / "whole" / ADAPTER)
