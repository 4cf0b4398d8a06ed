"""Running a sweep: finished runs are skipped, interrupted ones resumed, failures told, GPUs shared."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import yaml

from heterofusion.sweeps import Pool, read_sweep, run_all
from heterofusion.sweeps.places import visible_gpus
from recipe_runner import ROOT, flags, recipe, shell
from sweep_builders import tiny_sweep

sweep_recipe = recipe("sweep")

# Stands for recipes/train.py and recipes/eval.py: notes how it was called, and does what the seed says.
STUB = """
import json, os, sys, time, pathlib, yaml
config = yaml.safe_load(open(sys.argv[2]))
folder = pathlib.Path(config["output_dir"])
folder.mkdir(parents=True, exist_ok=True)
with open(folder / "calls", "a") as calls:
    calls.write(json.dumps([sys.argv[3:], os.environ.get("CUDA_VISIBLE_DEVICES"), time.time()]) + "\\n")
behaviour = pathlib.Path(__file__).parent / f"seed-{config.get('seed')}"
if behaviour.exists():
    exec(behaviour.read_text())
with open(folder / "calls", "a") as calls:
    calls.write(json.dumps(time.time()) + "\\n")
"""


@pytest.fixture
def table(tmp_path):
    """A sweep over three seeds, and recipes that only note how they were called."""
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    for name in ("train", "eval"):
        (recipes / f"{name}.py").write_text(STUB)
    (tmp_path / "table.yaml").write_text(
        yaml.safe_dump(
            {
                "output_dir": str(tmp_path / "out"),
                "sweep": {"seed": [0, 1, 2]},
                "train": {
                    "model_name_or_path": "BASE", "target_adapter": "T", "source_adapters": ["S"],
                    "dataset_name": ["r.jsonl"], "seed": "{seed}",
                },
                "eval": {"model_name_or_path": "BASE", "dataset_name": ["a.jsonl"]},
            }
        )
    )  # fmt: skip
    return tmp_path


def run(folder, **options):
    return run_all(read_sweep(folder / "table.yaml"), Pool(folder / "recipes", **options))


def edit(folder, recipe, **changes):
    """Change flags of a recipe in the sweep file."""
    content = yaml.safe_load((folder / "table.yaml").read_text())
    content[recipe].update(changes)
    (folder / "table.yaml").write_text(yaml.safe_dump(content))


def calls(folder, seed, what="adapter"):
    """The calls of a recipe for one seed: flags besides --config, GPU, and when they began."""
    lines = (folder / "out" / "fused" / f"seed={seed}" / what / "calls").read_text().splitlines()
    return [call for line in lines if isinstance(call := json.loads(line), list)]


def statuses(outcomes):
    return [outcome.status for outcome in outcomes]


def test_runs_are_run_once(table):
    assert statuses(run(table)) == ["finished"] * 3
    assert statuses(run(table)) == ["was finished"] * 3
    assert [arguments for arguments, *_ in calls(table, 0)] == [[]]
    assert [arguments for arguments, *_ in calls(table, 0, "eval")] == [[]]


def test_failure_is_told_and_the_others_run(table):
    (table / "recipes" / "seed-1").write_text("print('error: no such adapter', file=sys.stderr); sys.exit(2)")
    first, second, third = run(table)
    assert statuses([first, second, third]) == ["finished", "failed", "finished"]
    assert second.reason.startswith("train: no such adapter [exit code 2") and "train.log" in second.reason
    assert not (table / "out" / "fused" / "seed=1" / "eval").exists()
    (table / "recipes" / "seed-1").unlink()
    assert statuses(run(table)) == ["was finished", "finished", "was finished"]


def test_interrupted_run_resumes(table):
    (table / "recipes" / "seed-1").write_text("(folder / 'checkpoint-5').mkdir(); os.kill(os.getpid(), 9)")
    (table / "recipes" / "seed-2").write_text("os.kill(os.getpid(), 9)")
    assert statuses(run(table)) == ["finished", "failed", "failed"]
    for seed in (1, 2):
        (table / "recipes" / f"seed-{seed}").unlink()
    assert statuses(run(table)) == ["was finished", "finished", "finished"]
    assert calls(table, 1)[1][0] == ["--resume_from_checkpoint=true"]
    assert calls(table, 2)[1][0] == ["--overwrite=true"]  # nothing to resume from


def test_interrupted_evaluation_resumes_and_the_training_stays(table):
    (table / "recipes" / "eval.py").write_text(f"{STUB}\nsys.exit(1)")
    assert statuses(run(table)) == ["failed"] * 3
    (table / "recipes" / "eval.py").write_text(STUB)
    assert statuses(run(table)) == ["finished"] * 3
    assert len(calls(table, 0)) == 1 and calls(table, 0, "eval")[1][0] == ["--resume=true"]


def test_interrupted_labelling_resumes_before_what_trains_on_it(table):
    content = yaml.safe_load((table / "table.yaml").read_text())
    labels = {"source_models": ["BASE"], "source_adapters": ["S"], "dataset_name": ["r.jsonl"], "prompts": ["replay"]}
    content["label"] = {**labels, "routing": "map.yaml"}
    (table / "table.yaml").write_text(yaml.safe_dump(content))
    (table / "recipes" / "label.py").write_text(f"{STUB}\nsys.exit(1)")
    assert statuses(run(table)) == ["failed"] * 3
    assert not (table / "out" / "fused" / "seed=0" / "adapter").exists()
    (table / "recipes" / "label.py").write_text(STUB)
    assert statuses(run(table)) == ["finished"] * 3
    assert [arguments for arguments, *_ in calls(table, 0, "labels")] == [[], ["--resume=true"]]
    assert [arguments for arguments, *_ in calls(table, 0)] == [[]]


def test_evaluation_of_a_new_adapter_starts_afresh(table):
    run(table)
    assert statuses(run(table, overwrite=True)) == ["finished"] * 3
    assert calls(table, 0)[1][0] == ["--overwrite=true"] and calls(table, 0, "eval")[1][0] == ["--overwrite=true"]


def test_other_flags_are_not_mixed_with_what_is_there(table):
    run(table)
    edit(table, "train", learning_rate=0.5)
    outcomes = run(table)
    assert statuses(outcomes) == ["failed"] * 3
    assert "made with another learning_rate: None, this sweep has 0.5" in outcomes[0].reason
    assert statuses(run(table, overwrite=True)) == ["finished"] * 3


def test_folder_that_no_sweep_made_is_left_alone(table):
    folder = table / "out" / "fused" / "seed=0" / "adapter"
    folder.mkdir(parents=True)
    (folder / "mine").write_text("")
    outcome = run(table)[0]
    assert outcome.status == "failed" and "holds something that no sweep made" in outcome.reason
    assert [path.name for path in folder.iterdir()] == ["mine"]


def test_one_run_at_a_time_on_each_gpu(table):
    for seed in range(3):
        (table / "recipes" / f"seed-{seed}").write_text("time.sleep(0.3)")
    pool = Pool.on_gpus(table / "recipes", ["4", "7"])
    assert statuses(run_all(read_sweep(table / "table.yaml"), pool)) == ["finished"] * 3
    spans = {"4": [], "7": []}
    for seed in range(3):
        for what in ("adapter", "eval"):
            lines = (table / "out" / "fused" / f"seed={seed}" / what / "calls").read_text().splitlines()
            begin, end = map(json.loads, lines)
            spans[begin[1]].append((begin[2], end))
    assert all(spans.values())
    for intervals in spans.values():
        ordered = sorted(intervals)
        assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(ordered))


def test_jobs_stay_on_the_cpu_and_share_its_cores(table, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert Pool.on_cpu(table, 4).slots == [{"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "2"}] * 4
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert Pool.on_cpu(table, 1).slots == [{"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "3"}]


def test_default_gpus_are_those_that_this_process_may_use(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,MIG-7")
    assert visible_gpus() == ["6", "MIG-7"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert visible_gpus() == ["0", "1"]


def test_launched_runs_have_a_process_per_gpu(table, monkeypatch):
    launcher = table / "launcher.py"  # stands for accelerate launch: notes its words and starts the recipe
    launcher.write_text("import sys, subprocess; sys.exit(subprocess.call([sys.executable, *sys.argv[1:]]))")
    pool = Pool.launched(table / "recipes", "ddp.yaml", ["4", "7"])
    assert pool.launcher[1:] == [
        "-m", "accelerate.commands.launch", "--config_file", "ddp.yaml", "--main_process_port", "0",
        "--num_processes", "2",
    ]  # fmt: skip
    pool.launcher = [sys.executable, str(launcher)]
    assert statuses(run_all(read_sweep(table / "table.yaml"), pool)) == ["finished"] * 3
    assert calls(table, 0)[0][1] == "4,7"
    assert Pool.launched(table, "ddp.yaml", []).slots == ({},)


def test_reason_is_that_of_the_last_try(table):
    (table / "recipes" / "seed-1").write_text("print('error: disk full'); sys.exit(2)")
    assert "disk full" in run(table)[1].reason
    (table / "recipes" / "seed-1").write_text("print('out of luck'); sys.exit(1)")
    assert run(table)[1].reason.startswith("train: out of luck [exit code 1")


def test_damaged_record_fails_its_run_alone(table):
    run(table)
    (table / "out" / "fused" / "seed=1" / "train.yaml").write_text("a: [1,")
    outcomes = run(table)
    assert statuses(outcomes) == ["was finished", "failed", "was finished"]
    assert "train.yaml is damaged" in outcomes[1].reason


def test_scores_of_a_renewed_adapter_are_renewed_even_after_a_failure(table):
    run(table)
    (table / "recipes" / "eval.py").write_text("import sys; sys.exit(1)")
    assert statuses(run(table, overwrite=True)) == ["failed"] * 3
    (table / "recipes" / "eval.py").write_text(STUB)
    assert statuses(run(table)) == ["finished"] * 3
    assert len(calls(table, 0)) == 2 and calls(table, 0, "eval")[-1][0] == ["--overwrite=true"]
    assert statuses(run(table)) == ["was finished"] * 3


def test_failed_overwriting_never_resumes_what_it_was_to_replace(table):
    (table / "recipes" / "seed-1").write_text("(folder / 'checkpoint-5').mkdir()")
    run(table)
    edit(table, "train", learning_rate=0.5)
    for name in ("train", "eval"):
        (table / "recipes" / f"{name}.py").write_text("import sys; sys.exit(1)")  # before it looks at its folder
    assert statuses(run(table, overwrite=True)) == ["failed"] * 3
    for name in ("train", "eval"):
        (table / "recipes" / f"{name}.py").write_text(STUB)
    (table / "recipes" / "seed-1").write_text("")
    assert statuses(run(table)) == ["finished"] * 3
    assert calls(table, 1)[-1][0] == ["--overwrite=true"] and calls(table, 1, "eval")[-1][0] == ["--overwrite=true"]


def test_overwriting_that_was_interrupted_later_resumes_from_its_own_checkpoint(table):
    run(table)
    stop = "time.sleep(0.01); (folder / 'checkpoint-5').mkdir(); os.kill(os.getpid(), 9)"
    (table / "recipes" / "seed-1").write_text(stop)
    assert statuses(run(table, overwrite=True)) == ["finished", "failed", "finished"]
    (table / "recipes" / "seed-1").unlink()
    assert statuses(run(table)) == ["was finished", "finished", "was finished"]
    assert calls(table, 1)[-1][0] == ["--resume_from_checkpoint=true"]
    assert calls(table, 1, "eval")[-1][0] == ["--overwrite=true"]


def test_run_of_another_sweep_is_left_alone(table):
    (table / "recipes" / "seed-1").write_text("time.sleep(20)")
    with ThreadPoolExecutor(1) as background:
        pool = Pool(table / "recipes")
        first = background.submit(run_all, read_sweep(table / "table.yaml"), pool)
        while not (table / "out" / "fused" / "seed=1" / "adapter" / "calls").exists():
            time.sleep(0.02)
        second = run(table)
        assert statuses(second) == ["was finished", "failed", "finished"]
        assert "another sweep is at work" in second[1].reason
        pool.stop()
        first.result()
    assert len(calls(table, 1)) == 1


def test_checkpoints_go_only_if_asked(table):
    for name in ("5", "best"):  # a user's own, and a result of that name, are no checkpoints
        made = f"(folder / 'checkpoint-{name}').mkdir(exist_ok=True);"
        with (table / "recipes" / "seed-1").open("a") as stub:
            stub.write(made)
    checkpoint = table / "out" / "fused" / "seed=1" / "adapter" / "checkpoint-5"
    run(table)
    evaluated = checkpoint.parents[1] / "eval" / "checkpoint-5"
    evaluated.mkdir()
    assert checkpoint.is_dir()
    assert statuses(run(table, delete_checkpoints=True)) == ["was finished"] * 3
    assert not checkpoint.exists() and (checkpoint.parent / "calls").is_file()
    assert (checkpoint.parent / "checkpoint-best").is_dir()
    assert evaluated.is_dir()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=["batch system", "closed session"])
def test_stopped_sweep_ends_its_processes_and_goes_on_later(table, number):
    """In a real shell."""
    pids = table / "pids"
    (table / "recipes" / "seed-0").write_text(f"open({str(pids)!r}, 'a').write(f'{{os.getpid()}}\\n'); time.sleep(60)")
    program = (
        "import sys, importlib.util as u; from pathlib import Path; "
        f"s = u.spec_from_file_location('sweep', {str(ROOT / 'recipes' / 'sweep.py')!r}); "
        "m = u.module_from_spec(s); sys.modules['sweep'] = m; s.loader.exec_module(m); "
        f"m.FOLDER = Path({str(table / 'recipes')!r}); sys.exit(m.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, "--sweeps", str(table / "table.yaml"), "--jobs", "1"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not pids.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2 and "3 of 3 runs did not finish" in err
    assert "| table: fused seed=1 | not run |" in out
    for pid in pids.read_text().split():
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)
    (table / "recipes" / "seed-0").unlink()
    assert statuses(run(table)) == ["finished"] * 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sweeps": None}, "--sweeps is missing"),
        ({"only": ["nothing"]}, "--only nothing matches no run"),
        ({"jobs": 2, "gpus": ["0"]}, "leave it out with --gpus"),
        ({"gpus": ["0", "0"]}, "names a GPU twice"),
        ({"accelerate_config": "nowhere.yaml"}, "does not exist"),
        ({"sweeps": ["table.yaml", "table.yaml"]}, "both write to"),
    ],
)
def test_wrong_flags_raise(table, changes, message, monkeypatch, capsys, logging_restored):
    monkeypatch.chdir(table)
    assert sweep_recipe.main(flags({"sweeps": ["table.yaml"], **changes})) == 2
    assert message in capsys.readouterr().err
    assert not (table / "out").exists()


def test_dry_run_shows_the_flags_and_runs_nothing(table, capsys, logging_restored):
    assert sweep_recipe.main(flags({"sweeps": [table / "table.yaml"], "dry_run": True})) == 0
    out = capsys.readouterr().out
    assert "==== table: fused seed=2 ====" in out and "  seed: 2\n" in out and out.endswith("3 runs\n")
    assert not (table / "out").exists()


@pytest.mark.slow
def test_real_recipes_end_to_end(tmp_path):
    """A fusion and its anchor: trained, scored, and ready for the report."""
    content = tiny_sweep(tmp_path, steps=1) | {"output_dir": str(tmp_path / "out")}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(content))
    done = shell(sys.executable, "recipes/sweep.py", "--sweeps", tmp_path / "tiny.yaml")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "1 finished\n"
    results = json.loads((tmp_path / "out" / "fused" / "seed=0" / "eval" / "results.json").read_text())
    assert results["labels"] == {"experiment": "tiny", "seed": "0"} and results["name"] == "fused"
    assert results["fusion"]["seed"] == 0 and results["datasets"]["test"]["examples"] == 3
