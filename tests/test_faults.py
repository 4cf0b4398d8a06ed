"""Runs that are killed or cannot write: what is left, and that a resumed run ends as one that nothing happened to."""

import itertools
import json
import re
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from forked import Server
from heterofusion.training.checkpoints import last_complete_checkpoint, missing_part
from recipe_runner import MISTRAL, QWEN, ROOT, SIZES, TARGET, flags, shell, write_replay

WORKER = ROOT / "tests" / "fault_worker.py"
SAVE = "heterofusion.training.trainer:HeteroFusionTrainer._save_checkpoint"
STEP = "transformers.trainer:Trainer.training_step"  # of the micro-batch that closes a window
EXPORT = "heterofusion.training.trainer:export_adapter"
MOVE = "heterofusion.publish.write:_move_files"
ROTATE = "heterofusion.training.checkpoints:rotate_checkpoints"
SECOND_SAVE = {"within": (SAVE, 2)}  # checkpoint-4


class Runs:
    """Starts training runs, in children of one warm process."""

    def __init__(self, base: Path, folder: Path) -> None:
        self.folder = folder
        rows = write_replay(folder / "replay.json", count=10)
        # 5 micro-batches an epoch: 3 steps, the last of them half a window
        self.values = {
            "model_name_or_path": base, "target_adapter": TARGET, "source_adapters": [QWEN, MISTRAL],
            "dataset_name": [rows], "use_cpu": True, "num_train_epochs": 2, "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2, "learning_rate": 0.01, "save_strategy": "steps", "save_steps": 2,
            "logging_steps": 1, "disable_tqdm": True, **SIZES,
        }  # fmt: skip
        self.with_best = {
            "eval_dataset_name": [rows], "eval_strategy": "steps", "eval_steps": 2,
            # the loss of what is trained on falls, whatever the processor: by this measure the first one is the best
            "metric_for_best_model": "eval_loss", "greater_is_better": True,
            "load_best_model_at_end": True, "save_total_limit": 1,
        }  # fmt: skip
        self.server = Server(WORKER)

    def start(self, out: Path, fault: dict | None = None, **changes: object) -> SimpleNamespace:
        """One run to its end, which may be an untimely one: exit code, negative for a signal, and what it said."""
        return self.server.ask(argv=flags({**self.values, "output_dir": out, **changes}), fault=fault)

    def killed(self, out: Path, fault: dict, **changes: object) -> None:
        done = self.start(out, fault, **changes)
        assert done.code == -signal.SIGKILL, done.log

    def refused(self, out: Path, fault: dict | None = None, **changes: object) -> str:
        """A run that ends with an error as users get to see it: its line."""
        done = self.start(out, fault, **changes)
        errors = [line for line in done.log.splitlines() if line.startswith("error: ")]
        assert done.code == 2 and len(errors) == 1 and "Traceback" not in done.log, done.log
        return errors[0]

    def finished(self, out: Path, **changes: object) -> dict:
        done = self.start(out, **changes)
        assert done.code == 0, done.log
        return result(out)

    def resumed(self, out: Path, **changes: object) -> dict:
        return self.finished(out, resume_from_checkpoint=True, **changes)


@pytest.fixture(scope="module")
def runs(base_dir, tmp_path_factory):
    runs = Runs(base_dir, tmp_path_factory.mktemp("faults"))
    yield runs
    runs.server.close()


@pytest.fixture(scope="module")
def whole(runs) -> dict:
    """What an uninterrupted run makes."""
    made = runs.finished(runs.folder / "whole")
    assert made["fusion.json"]["training"]["steps"] == 6
    return made


def result(out: Path) -> dict:
    """All that a run has to leave, whatever happened on its way: everything but how long it took."""
    left = [path.name for path in out.rglob("*") if ".export-" in path.name or path.suffix == ".partial"]
    assert not left
    for checkpoint in out.glob("checkpoint-*"):
        assert missing_part(checkpoint) is None
    record = json.loads((out / "fusion.json").read_text())
    metrics = record["metrics"].items()
    record["metrics"] = {name: value for name, value in metrics if not re.search("_(runtime|per_second)$", name)}
    assert "train_loss" in record["metrics"]
    assert record["made_by"].pop("cost")["peak_memory_bytes"] > 0  # of the run too, and where it was resumed
    names = {path.name for path in out.iterdir() if path.is_file()}
    files = {name: (out / name).read_bytes() for name in names - {"fusion.json", "trainer_state.json"}}
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md", "tokenizer.json"} <= files.keys()
    return files | {"fusion.json": record}


def assert_same(found: dict, wanted: dict) -> None:
    assert found.keys() == wanted.keys()
    for name, content in wanted.items():
        assert found[name] == content, name


def last(out: Path) -> str | None:
    found = last_complete_checkpoint(out)
    return None if found is None else found.name


# ---- kills ------------------------------------------------------------------------------------------------------

IN_A_STEP = {
    "the forward that opens step 4": {"at": "heterofusion.method.model:HeteroFusionModel.forward", "call": 6},
    "the backward of step 3": {"at": "heterofusion.method.live:LiveUpdates._window_gradient", "within": (STEP, 3)},
    "the optimizer at step 4": {"at": "torch.optim:AdamW.step", "call": 4, "when": "after"},
    "the end of step 4, before its save": {"at": SAVE, "call": 2},
}  # fmt: skip

IN_A_SAVE = {
    "half of the hypernetworks": {"at": "heterofusion.training.checkpoints:save_file", "when": "half"},
    "half of the optimizer": {"at": "torch:save", "when": "half"},
    "half of the trainer's state": {"at": "transformers.trainer_callback:TrainerState.save_to_json", "when": "half"},
    "in the marker": {"at": "os:fsync", "when": "after"},
}

IN_THE_EXPORT = {
    "half of the weights": {"at": "heterofusion.publish.write:save_file", "when": "half"},
    "between two moves": {"at": "os:replace", "call": 2, "within": (MOVE, 1)},
}

KILLS = {**IN_A_STEP, **{name: {**fault, **SECOND_SAVE} for name, fault in IN_A_SAVE.items()}, **IN_THE_EXPORT}


@pytest.mark.parametrize("moment", KILLS)
def test_killed(runs, whole, tmp_path, moment):
    out = tmp_path / "out"
    runs.killed(out, KILLS[moment])
    latest = "checkpoint-6" if moment in IN_THE_EXPORT else "checkpoint-2"
    assert last(out) == latest and not (out / "fusion.json").exists()
    if moment in IN_A_SAVE:
        assert missing_part(out / "checkpoint-4") is not None
    assert_same(runs.resumed(out), whole)


@pytest.mark.slow
@pytest.mark.parametrize(("within", "fewest"), [((SAVE, 1), 5), ((EXPORT, 1), 15)], ids=["save", "export"])
def test_killed_before_any_file_operation(runs, whole, tmp_path, within, fewest):
    """Every file that Python opens, moves or removes, one after the other, until a run gets through.

    Every run begins where only that is left to do: a checkpoint or an export.
    """
    start, kept = tmp_path / "start", 2 if within[0] == SAVE else 6
    shutil.copytree(runs.folder / "whole", start)
    for path in start.iterdir():
        if path.name not in [f"checkpoint-{step}" for step in range(2, kept + 1, 2)]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for number in itertools.count(1):
        out = shutil.copytree(start, tmp_path / str(number))
        done = runs.start(
            out, {"at": "a file operation", "call": number, "within": within}, resume_from_checkpoint=True
        )
        if done.code == 0:
            break
        assert done.code == -signal.SIGKILL, done.log
        assert_same(runs.resumed(out), whole)
        shutil.rmtree(out)
    assert number > fewest
    assert_same(result(out), whole)


def test_killed_while_older_checkpoints_go(runs, whole, tmp_path):
    """The third file of checkpoint-2 is the last to go; checkpoint-4 is complete by then."""
    out = tmp_path / "out"
    limit = {"save_total_limit": 1}
    runs.killed(out, {"at": "os:unlink", "call": 3, "when": "after", "within": (ROTATE, 2)}, **limit)
    assert missing_part(out / "checkpoint-2") is not None
    assert last(out) == "checkpoint-4"
    assert_same(runs.resumed(out, **limit), whole)
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-6"]


def test_the_last_complete_checkpoint_goes_only_when_there_is_another(runs, whole, tmp_path):
    out = tmp_path / "out"
    limit = {"save_total_limit": 1}
    runs.killed(out, {"at": "heterofusion.training.checkpoints:mark_complete", **SECOND_SAVE}, **limit)
    assert last(out) == "checkpoint-2"
    assert_same(runs.resumed(out, **limit), whole)


def test_killed_again_and_again(runs, whole, tmp_path):
    out = tmp_path / "out"
    save, again = {**IN_A_SAVE["half of the optimizer"], "within": (SAVE, 2)}, {"resume_from_checkpoint": True}
    runs.killed(out, save)
    runs.killed(out, {**save, "within": (SAVE, 1)}, **again)
    runs.killed(out, {"at": "torch.optim:AdamW.step", "call": 3}, **again)
    assert last(out) == "checkpoint-4"
    runs.killed(out, IN_THE_EXPORT["half of the weights"], **again)
    assert_same(runs.resumed(out), whole)
    runs.killed(out, IN_THE_EXPORT["between two moves"], **again)  # over a complete adapter
    assert not (out / "fusion.json").exists()
    assert_same(runs.resumed(out), whole)


def test_mean_loss_of_a_resumed_run_is_that_of_all_its_steps(runs, tmp_path):
    """The run logs after steps that are not those of its checkpoints."""
    wanted = runs.finished(tmp_path / "whole", logging_steps=4)
    runs.killed(tmp_path / "out", IN_A_STEP["the optimizer at step 4"], logging_steps=4)
    assert_same(runs.resumed(tmp_path / "out", logging_steps=4), wanted)


def test_best_hypernetworks_are_exported_after_any_kill(runs, tmp_path):
    """The best checkpoint is not the last, and it must outlive rotation and kill."""
    wanted = runs.finished(tmp_path / "whole", **runs.with_best)
    state = json.loads((tmp_path / "whole" / "trainer_state.json").read_text())
    assert state["best_global_step"] == 2 and last(tmp_path / "whole") == "checkpoint-2"
    faults = (
        {"at": "heterofusion.training.checkpoints:mark_complete", "within": (SAVE, 3)},
        {"at": "os:unlink", "when": "after", "within": (ROTATE, 3)},  # checkpoint-4
        {"at": "heterofusion.training.trainer:load_hypernetworks"},
        IN_THE_EXPORT["between two moves"],
    )
    for number, fault in enumerate(faults):
        out = tmp_path / str(number) / "whole"  # the card names the folder
        runs.killed(out, fault, **runs.with_best)
        assert missing_part(out / "checkpoint-2") is None
        assert_same(runs.resumed(out, **runs.with_best), wanted)


# ---- full disks and folders that cannot be written --------------------------------------------------------------


@pytest.fixture
def earlier(runs, whole, tmp_path) -> Path:
    """A folder with an adapter that another run left, shorter than the one that will be started there."""
    if not (runs.folder / "earlier").exists():
        assert runs.finished(runs.folder / "earlier", num_train_epochs=1) != whole
    return shutil.copytree(runs.folder / "earlier", tmp_path / "out")


def files(out: Path) -> dict[str, bytes]:
    """Files in the folder itself, but the Trainer's log of its steps."""
    return {
        path.name: path.read_bytes() for path in out.iterdir() if path.is_file() and "trainer_state" not in path.name
    }


def full(at: str, size: int, call: int = 1) -> dict:
    """Files cannot grow beyond a limit: of 0.6 MB for hypernetworks, 1.3 MB of optimizer states."""
    return {"at": at, "call": call, "do": "limit_files", "value": size}


MARK, WRITE = "heterofusion.training.checkpoints:mark_complete", "heterofusion.publish.write"
NOT_WRITTEN = {  # by what cannot be; libraries raise errors of their own there
    "hypernetworks": (full(SAVE, 300_000, 2), "checkpoint-4 could not be written"),
    "optimizer": (full(SAVE, 900_000, 2), "checkpoint-4 could not be written"),
    "marker": (full(MARK, 100, 2), "checkpoint-4 could not be written"),
    "checkpoint": ({"at": SAVE, "call": 2, "do": "make_unwritable"}, "Permission denied"),
    "weights": (full(EXPORT, 20_000), "File too large"),
    "tokenizer": (full(f"{WRITE}:write_json", 2000), "File too large"),
    "card": (full(f"{WRITE}:model_card", 500), "File too large"),
    "adapter": ({"at": EXPORT, "do": "make_unwritable"}, "Permission denied"),
}


@pytest.mark.parametrize("part", NOT_WRITTEN)
def test_disk_is_full_or_folder_unwritable(runs, whole, earlier, part):
    before, (fault, words) = files(earlier), NOT_WRITTEN[part]
    error = runs.refused(earlier, {"value": str(earlier), **fault}, overwrite=True)
    assert words in error and str(earlier) in error
    if fault.get("call") == 2:
        assert f"the last good checkpoint is {earlier / 'checkpoint-2'}" in error
        assert [path.name for path in earlier.glob("checkpoint-*")] == ["checkpoint-2"]
    else:
        assert f"the adapter could not be written to {earlier}" in error and "what it held before is kept" in error
        assert last(earlier) == "checkpoint-6"
    earlier.chmod(0o755)
    assert files(earlier) == before and not list(earlier.glob(".export-*"))
    assert_same(runs.resumed(earlier), whole)


def test_disk_full_in_the_first_save(runs, tmp_path):
    error = runs.refused(tmp_path / "out", full(SAVE, 300_000))
    assert "checkpoint-2 could not be written" in error and "no checkpoint was saved before" in error
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("at", [SAVE, EXPORT])
def test_folder_is_gone_and_a_file_has_its_name(runs, whole, tmp_path, at):
    out = tmp_path / "out"
    fault = {"at": at, "call": 2 if at == SAVE else 1, "do": "put_file_in_place", "value": str(out)}
    error = runs.refused(out, fault)
    assert str(out) in error and "could not be written" in error
    out.unlink()
    (tmp_path / "out.moved").rename(out)
    assert_same(runs.resumed(out), whole)


# ---- several ranks ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.distributed
def test_a_rank_is_killed_in_a_save(runs, tmp_path):
    """Rank 1 writes its part of the states; rank 0 waits for it before it marks the checkpoint complete.

    That the real launch ends at all, with an error, and does not wait for the dead is part of the test.
    """
    config = ["--config_file", str(ROOT / "accelerate_configs" / "zero3.yaml"), "--num_processes", "2",
              "--mixed_precision", "no"]  # fmt: skip

    def argv(out: Path, **changes: object) -> list[str]:
        return flags({**runs.values, "output_dir": out, "per_device_train_batch_size": 1, **changes})

    whole, out = tmp_path / "whole", tmp_path / "out"
    done = runs.server.ask(argv=argv(whole), launch=config)
    assert done.code == 0, done.log
    fault = {"at": "torch:save", "when": "half", **SECOND_SAVE, "rank": 1}
    launcher = (sys.executable, "-m", "accelerate.commands.launch", *config)
    killed = shell(*launcher, WORKER, json.dumps(fault), *argv(out), DS_ACCELERATOR="cpu")
    assert killed.returncode != 0 and "SIGKILL" in killed.stderr, killed.stderr
    assert last(out) == "checkpoint-2" and missing_part(out / "checkpoint-4") is not None
    done = runs.server.ask(argv=argv(out, resume_from_checkpoint=True), launch=config)
    assert done.code == 0, done.log
    assert_same(result(out), result(whole))
