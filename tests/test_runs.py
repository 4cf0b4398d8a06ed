"""Runs of recipes: made once, resumed, their failures told, their processes ended with the program."""

import fcntl
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from heterofusion.experiments import RunArguments, Runs
from heterofusion.experiments.runs import FAILED, FINISHED, NOT_RUN, SKIPPED, content_sha256
from heterofusion.runtime.errors import UserError

# A recipe that needs no model: notes its command line, and does what its flags say.
FAKE = """
import json, os, pathlib, sys, time, yaml
flags = yaml.safe_load(open(sys.argv[sys.argv.index("--config") + 1]))
output = pathlib.Path(flags["output_dir"])
for name in flags.get("checkpoints", []):
    (output / name).mkdir(parents=True, exist_ok=True)
output.mkdir(parents=True, exist_ok=True)
(output / "started").write_text(f"{os.getpid()}")
time.sleep(flags.get("sleep", 0))
with open(output / "said.jsonl", "a") as file:
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES")
    file.write(json.dumps({"argv": sys.argv[3:], "gpus": gpus, "inherited": "torch" in sys.modules}) + "\\n")
if (marker := flags.get("fails_unless")) and not os.path.exists(marker):
    print("error: the first\\nerror: it failed\\nmore")
    sys.exit(2)
(output / "results.json").write_text(json.dumps({"mean": 0.5}))
"""


@pytest.fixture
def make(tmp_path):
    """Makes `Runs` of fake recipes, in the same folder every time."""
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    for name in ("train", "eval"):
        (recipes / f"{name}.py").write_text(FAKE)

    def runs(**options) -> Runs:
        return Runs(RunArguments(str(tmp_path / "out"), **{"jobs": 2, **options}), recipes)

    return runs


def said(run) -> list[dict]:
    return [yaml.safe_load(line) for line in (run / "said.jsonl").read_text().splitlines()]


def test_run_is_named_by_recipe_flags_and_content(make, tmp_path):
    data = tmp_path / "data.json"
    data.write_text("1")
    config = tmp_path / "more.yaml"
    config.write_text("seed: 1\nmax_steps: 2\n")
    runs = make()
    first = runs.run("train", "a title", dataset_name=[data], seed=0)
    assert runs.run("train", dataset_name=[str(data)], seed=0, eval_steps=None) is first
    others = [
        runs.run("train", dataset_name=[data], seed=1),
        runs.run("eval", dataset_name=[data], seed=0),
        runs.run("train", dataset_name=[data], config=config, seed=0),
        runs.run("train", dataset_name=[first / "said.jsonl"], seed=0),
    ]
    assert len({first.folder, *(run.folder for run in others)}) == 5
    assert others[2].flags == {"seed": 0, "max_steps": 2, "dataset_name": [str(data)]}
    assert others[3].needs == (first,)
    copy = tmp_path / "copy.json"
    copy.write_text("1")
    assert runs.run("train", dataset_name=[copy], seed=0) is first  # the content counts, not the place
    copy.write_text("2")
    content_sha256.cache_clear()
    assert make().run("train", dataset_name=[copy], seed=0).folder != first.folder


def test_finished_runs_are_skipped_and_failed_ones_resumed(make, tmp_path, capsys):
    def ask(runs):
        bad = runs.run("train", "bad", fails_unless=str(tmp_path / "mended"), checkpoints=["checkpoint-1"])
        return [runs.run("train", "good", seed=0), bad, runs.run("eval", "of bad", adapters=[bad])]

    runs = make()
    good, bad, of_bad = ask(runs)
    runs.wait()
    assert (good.status, bad.status, of_bad.status) == (FINISHED, FAILED, NOT_RUN)
    assert good.results() == {"mean": 0.5} and of_bad.results() is None
    with pytest.raises(ChildProcessError, match="2 of 3 runs did not finish"):
        runs.finish()
    told = capsys.readouterr().err
    assert f"- bad: failed, it failed [exit code 2] ({bad.log})" in told
    assert "- of bad: not run, it needs bad" in told
    (tmp_path / "mended").touch()
    runs = make()
    good, bad, of_bad = ask(runs)
    runs.wait()
    runs.finish()
    # the marker's content enters the hash of the run, so it is another one now
    assert (good.status, bad.status, of_bad.status) == (SKIPPED, FINISHED, FINISHED)
    assert len(said(good)) == 1 and said(good)[0]["inherited"] and said(good)[0]["gpus"] == ""


def test_interrupted_runs_are_gone_on_with_and_checkpoints_deleted_on_request(make):
    runs = make(delete_checkpoints=True)
    asked = {
        "--resume_from_checkpoint=true": (runs.run("train", seed=0), "checkpoint-1"),
        "--overwrite=true": (runs.run("train", seed=1), "other"),
        "--resume=true": (runs.run("eval", seed=0), "other"),
    }
    for run, left in asked.values():
        (run / left).mkdir(parents=True)
    runs.wait()
    for flag, (run, left) in asked.items():
        assert said(run)[0]["argv"] == [flag] and (run / left).exists() == (left == "other")


def test_lock_keeps_two_programs_out_of_one_run(make):
    runs = make()
    run = runs.run("train", seed=0)
    run.folder.mkdir(parents=True)
    with (run.folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        runs.wait()
    assert run.status == FAILED and "another program is at work" in run.reason
    assert not run.output.exists()


def test_gpus_take_a_run_each(make):
    runs = make(jobs=None, gpus=["3", "5"])
    made = [runs.run("train", seed=seed) for seed in range(2)]
    runs.wait()
    assert {said(run)[0]["gpus"] for run in made} == {"3", "5"}
    assert not said(made[0])[0]["inherited"]  # a program of its own


def test_accelerate_config_launches_processes(make, tmp_path):
    config = tmp_path / "ddp.yaml"
    config.touch()
    runs = make(jobs=None, gpus=["0", "1"], accelerate_config=str(config))
    assert runs._launcher[1:5] == ["-m", "accelerate.commands.launch", "--config_file", str(config)]
    assert runs._launcher[-2:] == ["--num_processes", "2"]
    assert runs._slots == [{"CUDA_VISIBLE_DEVICES": "0,1"}]


@pytest.mark.parametrize(
    "flags, match",
    [
        ({"jobs": 0}, "--jobs is 0"),
        ({"jobs": 1, "gpus": ["0"]}, "--jobs is for the CPU"),
        ({"gpus": ["0", "0"]}, "names a GPU twice"),
        ({"accelerate_config": "nowhere.yaml"}, "nowhere.yaml does not exist"),
    ],
)
def test_bad_places_are_refused(flags, match):
    with pytest.raises(UserError, match=match):
        RunArguments("out", **flags)


def test_runs_end_when_the_program_is_killed(make, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "from heterofusion.experiments import RunArguments, Runs\n"
        "from pathlib import Path\n"
        "if __name__ == '__main__':\n"
        f"    runs = Runs(RunArguments({str(tmp_path / 'out')!r}, jobs=1), Path({str(tmp_path / 'recipes')!r}))\n"
        "    runs.run('train', sleep=100)\n"
        "    runs.wait()\n"
    )
    parent = subprocess.Popen([sys.executable, str(program)])
    started = make().run("train", sleep=100) / "started"
    _until(lambda: started.exists() and started.read_text(), 120)
    parent.kill()
    parent.wait()
    _until(lambda: not Path(f"/proc/{started.read_text()}").exists(), 20)


def test_runs_end_with_ctrl_c(make, monkeypatch):
    runs = make()
    run = runs.run("train", sleep=100)

    def interrupt(*_):
        monkeypatch.undo()
        _until(lambda: (run / "started").exists() and (run / "started").read_text(), 60)
        raise KeyboardInterrupt

    monkeypatch.setattr("heterofusion.experiments.runs.connection.wait", interrupt)
    with pytest.raises(ChildProcessError, match="interrupted; the same command goes on"):
        runs.wait()
    assert not Path(f"/proc/{(run / 'started').read_text()}").exists() and not run.is_finished


def _until(condition, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
