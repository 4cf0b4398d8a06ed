"""Sequences of fusions by `stages:` in a YAML file: what they make, and how they resume."""

import itertools
import shutil
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from heterofusion import load_adapter
from heterofusion.runtime.files import file_sha256
from recipe_runner import MISTRAL, QWEN, TARGET, flags, shell, succeeds, train
from sequence_runner import (
    ADAPTER,
    HYPERNETWORKS,
    Watch,
    only_stage_one,
    record,
    remove,
    same_weights,
    stop_at,
    write_yaml,
)

pytestmark = pytest.mark.usefixtures("logging_restored")


def test_target_of_a_stage_is_the_fused_adapter_before(two):
    one, last = record(two.out / "one"), record(two.out)
    assert one["target"]["sha256"] == load_adapter(TARGET).sha256
    assert last["target"]["sha256"] == file_sha256(two.out / "one" / ADAPTER) == load_adapter(two.out / "one").sha256
    assert one["training"]["sequence"] == {"stage": "one", "number": 1, "stages": 2}
    assert last["training"]["sequence"] == {"stage": "two", "number": 2, "stages": 2}
    assert (one["training"]["steps"], last["training"]["steps"]) == (2, 3)
    assert (one["training"]["seed"], last["training"]["seed"]) == (1, 42)
    assert (two.out / "one" / "checkpoint-2").is_dir() and (two.out / "checkpoint-3").is_dir()
    assert not (two.out / "two").exists() and not (two.out / HYPERNETWORKS).exists()
    assert (two.out / "one" / "tokenizer.json").is_file() and (two.out / "tokenizer.json").is_file()


def test_carried_hypernetworks_are_those_of_the_stage_before(two):
    saved = load_file(two.out / "one" / HYPERNETWORKS)
    begun = two.watch.begun["two"]
    assert set(begun) < set(saved) and any(name.endswith("alpha") for name in begun)
    for name, tensor in begun.items():
        assert torch.equal(tensor, saved[name]), name
    carried = record(two.out)["training"]["initialization"]
    assert carried["groups"] == ["down_proj_r4", "q_proj_r4", "v_proj_r4"] and carried["fresh_groups"] == []
    assert carried["sha256"] == file_sha256(two.out / "one" / HYPERNETWORKS)
    assert "hypernetworks of stage 'one' (1 of 2): down_proj_r4, q_proj_r4, v_proj_r4" in two.log
    assert "initialization" not in record(two.out / "one")["training"]


def test_model_of_a_stage_is_gone_when_the_next_base_is_loaded(two):
    assert len(two.watch.seen) == 14 and two.watch.left_over == []


def test_sequence_equals_single_runs_one_after_the_other(two, common, tmp_path, watch):
    values = {
        **common, "target_adapter": two.out / "one", "source_adapters": [MISTRAL], "output_dir": tmp_path / "out",
        "init_hypernetwork_from": two.out / "one", "max_steps": 3,
    }  # fmt: skip
    log = succeeds(train.main, flags(values))
    assert "hypernetworks of one" in log
    assert same_weights(tmp_path / "out" / ADAPTER, two.out / ADAPTER)
    found = record(tmp_path / "out")["training"]
    assert found["initialization"]["sha256"] == file_sha256(two.out / "one" / HYPERNETWORKS)
    assert "sequence" not in found


# ---- resuming ---------------------------------------------------------------------------------------------------


LEFT = {
    "killed between the stages": (only_stage_one, ["two"]),
    "killed in stage two after a checkpoint": (lambda out: remove(out, "fusion.json", ADAPTER, "checkpoint-3"), []),
    "killed while it saved a checkpoint": (
        lambda out: remove(out, "fusion.json", ADAPTER, "checkpoint-3/checkpoint_complete.json"), [],
    ),
    "killed before the export": (lambda out: remove(out, "fusion.json", ADAPTER), []),
    "killed before the export of stage one": (
        lambda out: (only_stage_one(out), remove(out / "one", "fusion.json", ADAPTER)), ["two"],
    ),
    "killed before the first checkpoint": (
        lambda out: (only_stage_one(out), remove(out / "one", "*"), (out / "one" / "checkpoint-2").mkdir()),
        ["one", "two"],
    ),
    "never started": (shutil.rmtree, ["one", "two"]),
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT)
def test_resumed_sequence_equals_an_uninterrupted_one(case, two, copied, watch):
    damage, anew = LEFT[case]
    damage(copied.out)
    begun = []
    log = succeeds(train.main, flags(copied.values))
    for folder in ("one", "."):
        assert same_weights(copied.out / folder / ADAPTER, two.out / folder / ADAPTER)
        found, wanted = record(copied.out / folder), record(two.out / folder)
        assert found["training"] == wanted["training"] and found["alpha"] == wanted["alpha"]
    for name, state in watch.begun.items():
        if name in anew:
            begun.append(name)
            assert all(torch.equal(tensor, two.watch.begun[name][key]) for key, tensor in state.items())
    assert begun == anew
    assert ("stage 'one' (1 of 2) is finished" in log) == ("one" not in watch.begun)
    assert ("'one' (1 of 2): no complete checkpoint" in log) == ("one" in anew)


def test_interrupted_run_resumes(two, tmp_path, monkeypatch):
    values = {**two.values, "output_dir": tmp_path / "two", "resume_from_checkpoint": True}
    for name, step in (("one", 1), ("two", 2)):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            stop_at(patch, name, step)
            train.main(flags(values))
    succeeds(train.main, flags(values))
    assert same_weights(tmp_path / "two" / ADAPTER, two.out / ADAPTER)


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv.pop(1))
import train
step = train.HeteroFusionTrainer.training_step
def step_or_die(self, *args, **kwargs):
    if self.args.output_dir.endswith("out") and self.state.global_step == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *args, **kwargs)
train.HeteroFusionTrainer.training_step = step_or_die
train.main(sys.argv[1:])
"""


def test_killed_process_resumes(two, tmp_path):
    values = {**two.values, "output_dir": tmp_path / "out"}
    threads = str(torch.get_num_threads())
    done = shell(sys.executable, "-c", KILLED, "recipes", *flags(values), OMP_NUM_THREADS=threads)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (tmp_path / "out" / "checkpoint-2").is_dir() and not (tmp_path / "out" / ADAPTER).exists()
    log = succeeds(train.main, flags({**values, "resume_from_checkpoint": True}))
    assert "stage 'one' (1 of 2) is finished" in log
    assert same_weights(tmp_path / "out" / ADAPTER, two.out / ADAPTER)


def test_finished_sequence_is_not_repeated_but_pushed(copied, monkeypatch):
    pushed = []

    def push(folder, name, **rest):
        pushed.append((folder, name))
        return "there"

    monkeypatch.setattr("heterofusion.publish.hub.push_adapter", push)
    monkeypatch.setattr(train, "fuse", lambda *args: pytest.fail("a finished stage is repeated"))
    before = {path: path.read_bytes() for path in copied.out.rglob("*") if path.is_file()}
    log = succeeds(train.main, flags({**copied.values, "push_to_hub": True, "hub_model_id": "fused"}))
    assert "stage 'one' (1 of 2) is finished" in log and "stage 'two' (2 of 2) is finished" in log
    assert pushed == [(copied.out, "fused")]
    assert before == {path: path.read_bytes() for path in copied.out.rglob("*") if path.is_file()}


# ---- three stages -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def three(common, tmp_path_factory) -> SimpleNamespace:
    """`compact`: stage 2 has roles that stage 1 lacks, stage 3 does not carry; names by default."""
    folder = tmp_path_factory.mktemp("three")
    evaluation = str(common["dataset_name"][0])
    stages = [
        {"source_adapters": [MISTRAL]},
        {"source_adapters": [QWEN, MISTRAL], "carry_hypernetworks": True, "eval_dataset_name": evaluation},
        {"source_adapters": [QWEN], "transfer_ratio": 0.5},
    ]
    values = {
        **common, "config": write_yaml(folder / "run.yaml", stages, max_steps=1), "output_dir": folder / "out",
        "target_adapter": TARGET, "preset": "compact", "max_steps": None, "save_strategy": "no",
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        watch = Watch(patch)
        log = succeeds(train.main, flags(values))
    return SimpleNamespace(out=folder / "out", values=values, log=log, watch=watch)


def test_chain_of_three(three):
    folders = [three.out / "stage-1", three.out / "stage-2", three.out]
    for before, after in itertools.pairwise(folders):
        assert record(after)["target"]["sha256"] == file_sha256(before / ADAPTER)
        assert not same_weights(before / ADAPTER, after / ADAPTER)
    assert "eval_loss" in record(folders[1])["metrics"] and "eval_loss" not in record(three.out)["metrics"]
    assert [len(record(folder)["sources"]) for folder in folders] == [1, 2, 1]
    assert three.watch.left_over == [] and list(three.watch.begun) == ["stage-1", "stage-2", "stage-3"]
    assert {path.name for path in three.out.iterdir() if path.is_dir()} == {"stage-1", "stage-2"}


def test_groups_that_the_stage_before_lacks_start_fresh(three):
    saved = load_file(three.out / "stage-1" / HYPERNETWORKS)
    begun = three.watch.begun["stage-2"]
    carried = record(three.out / "stage-2")["training"]["initialization"]
    assert sorted(carried["groups"]) == ["down_proj_r4", "q_proj_r4", "v_proj_r4"]
    assert sorted(carried["fresh_groups"]) == ["gate_proj_r4", "k_proj_r4", "o_proj_r4", "up_proj_r4"]
    shared = [name for name in begun if name.startswith("shared.")]
    assert shared and set(shared) <= set(saved)
    for name, tensor in begun.items():
        if name.split(".")[1] in carried["fresh_groups"]:
            assert name not in saved
            assert not name.endswith("decoder.output.weight") or not tensor.any()
        else:
            assert torch.equal(tensor, saved[name]), name
    # all of it was trained before: nothing is as it was at the start of stage 1
    assert not torch.equal(begun["shared.rows_in.weight"], three.watch.begun["stage-1"]["shared.rows_in.weight"])


def test_stage_without_carry_starts_fresh(three):
    begun = three.watch.begun["stage-3"]
    for name, tensor in begun.items():
        if name.endswith("decoder.output.weight"):
            assert not tensor.any(), name
    assert all(tensor == 0.3 for name, tensor in begun.items() if name.endswith("alpha"))
    assert not (three.out / "stage-2" / HYPERNETWORKS).exists() and not (three.out / "initialization.json").exists()


def test_dry_run_prints_the_plan_of_every_stage(three, tmp_path, capsys):
    values = {**three.values, "output_dir": tmp_path / "out", "dry_run": True}
    capsys.readouterr()
    assert train.main(flags(values)) == 0
    out = capsys.readouterr().out
    for number in (1, 2, 3):
        assert f"stage 'stage-{number}' ({number} of 3)" in out
    assert f"target  {tmp_path / 'out' / 'stage-1'} " in out and "transfer ratio 1/2" in out
    assert not (tmp_path / "out").exists()


# ---- several processes ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_go_through_the_stages_together(two, tmp_path):
    values = {**two.values, "output_dir": tmp_path / "out"}
    config = ("--config_file", "accelerate_configs/cpu_ddp.yaml")
    done = shell("accelerate", "launch", *config, "recipes/train.py", *flags(values))
    assert done.returncode == 0, done.stderr
    last = record(tmp_path / "out")
    assert last["training"]["processes"] == 2 and len(last["training"]["initialization"]["groups"]) == 3
    assert last["target"]["sha256"] == file_sha256(tmp_path / "out" / "one" / ADAPTER)
