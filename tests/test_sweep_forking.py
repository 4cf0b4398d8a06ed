"""Runs forked from a process that has made their imports: what a run of its own process is in every respect."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

import heterofusion
from heterofusion.sweeps import Pool, Run, Step, forking, places, read_sweep, run_all
from heterofusion.sweeps.forking import ForkServer
from recipe_runner import RECIPES, flags, recipe
from sweep_builders import tiny_sweep

VARIABLES = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PLACE": "the slot"}
# Instead of the seconds that torch takes, the server imports the package's parts that it needs itself.
LIGHT = f"""
import os, sys, types
for name in ("heterofusion", "heterofusion.sweeps", "heterofusion.evaluation", "heterofusion.evaluation.run"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [os.path.join({str(Path(heterofusion.__file__).parents[1])!r}, *name.split("."))]
"""


@pytest.fixture
def pool(tmp_path, monkeypatch):
    """A pool over a server that starts at once."""
    (tmp_path / "sitecustomize.py").write_text(LIGHT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return Pool(tmp_path, [VARIABLES] * 2, server=ForkServer(VARIABLES))


def make_run(folder, name="run"):
    step = Step("train", {"output_dir": str(folder / name / "adapter")}, folder / name / "adapter")
    return Run("table", name, {}, folder / name, (step,))


def execute(pool, body, name="run"):
    """Run a recipe with this body; gives the outcome and its log without the first line."""
    (pool.recipes / "train.py").write_text(body)
    run = make_run(pool.recipes, name)
    (outcome,) = run_all([run], pool)
    return outcome, (run.folder / "train.log").read_text().partition("\n")[2]


def wait_until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def wait_for(path, end="\n"):
    """The content of a file that a run is about to write."""
    wait_until(lambda: path.exists() and path.read_text().endswith(end))
    return path.read_text()


def is_alive(pid):
    """Whether a process runs; one that only waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_run_finds_what_a_program_finds(pool):
    (pool.recipes / "beside.py").write_text("value = 'a module beside the recipe'")
    body = (
        "import atexit, beside, json, os, sys\n"
        "atexit.register(print, 'at the end')\n"
        "found = [__name__, __file__, sys.argv, sys.path[0], '' in sys.path, beside.value, os.environ['PLACE'],"
        " os.getcwd(), sys.stdin.read(), os.getsid(0) == os.getpid(), sys.modules['__main__'].__file__]\n"
        "print(json.dumps(found))\n"
    )
    outcome, log = execute(pool, body)
    assert outcome.status == "finished"
    found, end = log.splitlines()
    recipe, config = str(pool.recipes / "train.py"), str(pool.recipes / "run" / "train.yaml")
    assert json.loads(found) == [
        "__main__", recipe, [recipe, "--config", config], str(pool.recipes), False, "a module beside the recipe",
        "the slot", os.getcwd(), "", True, recipe,
    ]  # fmt: skip
    assert end == "at the end"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("import sys; print('error: no adapter', file=sys.stderr); sys.exit(2)", "train: no adapter [exit code 2"),
        ("raise KeyError('scale')", "train: KeyError: 'scale' [exit code 1"),
        ("raise SystemExit('that was all')", "train: that was all [exit code 1"),
        ("import os; print('x', flush=True); os.kill(os.getpid(), 9)", "train: x [exit code -9"),
        ("import os; os._exit(7)", "train: it said nothing [exit code 7"),
    ],
)
def test_failure_is_told_as_of_a_program(pool, body, reason):
    outcome, _ = execute(pool, body)
    assert outcome.status == "failed" and outcome.reason.startswith(reason)


def test_runs_are_apart_from_each_other(pool):
    body = (
        "import os, sys, numpy, random, json\n"
        "print(json.dumps([os.environ.get('LEFT'), 'left' in sys.modules, numpy.random.rand(), random.random()]))\n"
        "os.environ['LEFT'] = 'x'; sys.modules['left'] = sys\n"
    )
    first, second = (json.loads(execute(pool, body, name)[1]) for name in ("a", "b"))
    assert first[:2] == second[:2] == [None, False]
    assert first[2] != second[2] and first[3] != second[3]  # what no one seeded


def test_stop_ends_the_session_of_a_run(pool):
    pids = pool.recipes / "pids"
    body = (
        "import os, subprocess, time\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        f"open({str(pids)!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}\\n')\n"
        "time.sleep(60)\n"
    )
    with ThreadPoolExecutor(1) as background:
        future = background.submit(execute, pool, body)
        run, child = map(int, wait_for(pids).split())
        pool.stop()
        outcome, _ = future.result()
    assert outcome.status == "failed" and "exit code -15" in outcome.reason
    wait_until(lambda: not is_alive(run) and not is_alive(child))  # the child gets the signal too, but at its own time


def test_run_that_does_not_end_when_asked_is_killed(pool, monkeypatch):
    monkeypatch.setattr("heterofusion.sweeps.pool._KILL_AFTER", 0.3)
    body = (
        "import pathlib, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"pathlib.Path({str(pool.recipes / 'begun')!r}).write_text('1\\n'); time.sleep(60)\n"
    )
    with ThreadPoolExecutor(1) as background:
        future = background.submit(execute, pool, body)
        wait_for(pool.recipes / "begun")
        pool.stop()
        assert "exit code -9" in future.result()[0].reason


def test_run_holds_its_lock_as_long_as_it_lives(pool):
    go, path = pool.recipes / "go", pool.recipes / ".lock"
    (pool.recipes / "train.py").write_text(f"import os, time\nwhile not os.path.exists({str(go)!r}): time.sleep(0.02)")
    with (pool.recipes / "log").open("wb") as log, path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        forked = pool.server.run([str(pool.recipes / "train.py")], log, lock)
    with path.open("w") as lock:
        with pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(subprocess.TimeoutExpired):
            forked.wait(0.01)
        go.touch()
        assert forked.wait() == 0 == forked.wait(1)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_end_of_the_server_is_told_and_spares_what_runs(pool):
    go = pool.recipes / "go"
    body = f"import os, time\nprint('on', flush=True)\nwhile not os.path.exists({str(go)!r}): time.sleep(0.02)"
    log = pool.recipes / "run" / "train.log"
    with ThreadPoolExecutor(1) as background:
        future = background.submit(execute, pool, body)
        wait_for(log, end="on\n")
        pool.server._server[0].kill()
        later, _ = execute(pool, body, "later")
        go.touch()
        assert future.result()[0].status == "finished"
    assert later.status == "failed" and "the process of --preload true has ended [exit code -9]" in later.reason


def test_run_whose_watcher_was_killed_is_not_taken_for_finished(pool):
    outcome, _ = execute(pool, "import os; os.kill(os.getppid(), 9)")
    assert outcome.status == "failed" and "nobody knows how that ends" in outcome.reason
    assert not pool._processes and not (pool.recipes / "run" / "train.done").exists()


@pytest.mark.parametrize(
    ("trouble", "message", "said"),
    [
        ("sys.modules['heterofusion.evaluation.run'] = None", r"has ended \[exit code 1\]", "ModuleNotFoundError"),
        (
            "from threading import Thread; import time\n"
            "Thread(target=time.sleep, args=(9,), daemon=True, name='eager').start()",
            r"has ended \[exit code 1\]", r"an import started threads (eager)",
        ),
        (
            "real, first = os.fork, os.getpid()\n"
            "def fork():\n"
            "    if os.getpid() != first: raise BlockingIOError('no more processes')\n"
            "    return real()\n"
            "os.fork = fork",
            "could not fork", "no more processes",
        ),
    ],
    ids=["import", "thread", "fork"],
)  # fmt: skip
def test_server_that_cannot_fork_is_told(pool, trouble, message, said, monkeypatch, capfd):
    monkeypatch.setattr(forking, "_ENDS_WITHIN", 2.0)
    (pool.recipes / "sitecustomize.py").write_text(LIGHT + trouble)
    (pool.recipes / "train.py").write_text("")
    with (
        (pool.recipes / "log").open("wb") as log,
        (pool.recipes / ".lock").open("w") as lock,
        pytest.raises(ChildProcessError, match=message),
    ):
        pool.server.run([str(pool.recipes / "train.py")], log, lock)
    assert said in capfd.readouterr().err


def test_server_ends_with_its_pool(pool):
    execute(pool, "")
    process = pool.server._server[0]
    pool.server = None
    assert process.returncode == -signal.SIGKILL


def test_server_ends_with_its_program(pool):
    """Even with one that was killed; a run is left to itself, as one of a process of its own."""
    program = (
        "import os, time; from heterofusion.sweeps.forking import ForkServer\n"
        "server = ForkServer({})\n"
        f"forked = server.run([{str(pool.recipes / 'train.py')!r}], open(os.devnull, 'wb'), open(os.devnull))\n"
        "print(server._server[0].pid, flush=True); os.kill(os.getpid(), 9)\n"
    )
    (pool.recipes / "train.py").write_text(f"import time; time.sleep(0.5); open({str(pool.recipes / 'end')!r}, 'w')")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    server = int(done.stdout)
    wait_until(lambda: not is_alive(server))
    wait_until((pool.recipes / "end").exists)


@pytest.mark.parametrize(
    ("changes", "platform", "message"),
    [
        ({"gpus": ["0"]}, "linux", "--preload is for runs on the CPU; give --jobs too"),
        ({}, "linux", "--preload is for runs on the CPU; give --jobs too"),
        ({"jobs": 2}, "darwin", "needs Linux, not darwin"),
    ],
)
def test_flag_where_it_cannot_be_raises(tmp_path, changes, platform, message, monkeypatch, capsys, logging_restored):
    monkeypatch.setattr(places.sys, "platform", platform)
    assert recipe("sweep").main(flags({"sweeps": [tmp_path / "any.yaml"], "preload": True, **changes})) == 2
    assert message in capsys.readouterr().err


def test_flag_makes_one_server_with_the_variables_of_all_slots(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    pool = places.PlaceArguments(jobs=2, preload=True).pool(tmp_path)
    assert list(pool.slots) == [pool.server._variables] * 2
    assert pool.server._variables == {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "3"}
    assert places.PlaceArguments(jobs=2).pool(tmp_path).server is None


@pytest.mark.slow
def test_results_are_those_of_a_process_of_its_own(tmp_path, monkeypatch):
    """A fusion and its scores by the real recipes, to the bit."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    content = tiny_sweep(tmp_path, steps=2)
    weights, scores = [], []
    for preload in (False, True):
        folder = tmp_path / str(preload)
        sweep = tmp_path / f"{preload}.yaml"
        sweep.write_text(yaml.safe_dump(content | {"output_dir": str(folder)}))
        (outcome,) = run_all(read_sweep(sweep), Pool.on_cpu(RECIPES, 1, preload))
        assert outcome.status == "finished", outcome.reason
        weights.append((folder / "fused" / "seed=0" / "adapter" / "adapter_model.safetensors").read_bytes())
        scores.append(json.loads((folder / "fused" / "seed=0" / "eval" / "results.json").read_text())["datasets"])
    assert weights[0] == weights[1]
    assert scores[0]["test"]["scores"] == scores[1]["test"]["scores"]
