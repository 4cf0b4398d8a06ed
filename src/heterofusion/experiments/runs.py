"""Runs: a run is a recipe and its flags, and is made once.

    runs = Runs(options)
    fused = runs.run("train", target_adapter=ANCHOR, source_adapters=SOURCES, seed=0, ...)
    scored = runs.run("eval", adapters=[fused], dataset_name=[TEST], ...)   # waits for `fused`
    runs.wait()

Its folder is named by a hash of the recipe, the flags and the content of the files and adapters that they name. So a
script that is started again skips what is finished and resumes what was interrupted. A flag may name what another run
writes: `fused` is its output folder, `labels / "task.jsonl"` a file in it.
"""

import fcntl
import functools
import hashlib
import json
import logging
import multiprocessing
import operator
import os
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection, reduction
from pathlib import Path
from typing import IO, Any

import torch
import yaml

import heterofusion
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.files import file_sha256, write_whole
from heterofusion.runtime.flags import check_ranges, flag, read_yaml

logger = logging.getLogger(__name__)

WAITING, FINISHED, SKIPPED, FAILED, NOT_RUN = "waiting", "finished", "was finished", "failed", "not run"
_RESUME = {"eval": "resume", "label": "resume", "merge": None}  # others: resume_from_checkpoint
_NO_INPUTS = ("output_dir", "logits_cache")  # flags that name a folder without depending on what is in it
# nearly all that recipes import; ours first, which hushes what libraries say of optional packages
_PRELOAD = ["heterofusion.training.trainer", "heterofusion.runtime.program", "scipy.stats", "sklearn.metrics"]
_KILL_AFTER = 40.0  # seconds; torch's launcher takes up to 30 to end its processes


@dataclass
class RunArguments:
    """Where runs go."""

    output_dir: str = field(metadata={"help": "Folder for the runs and for the report."})
    jobs: int | None = flag(None, help="Runs at a time on the CPU, which share its cores (1).", range="[1, inf)")
    gpus: list[str] = flag(default_factory=list, help="GPUs that take one run at a time each; all by default.")
    accelerate_config: str | None = flag(None, help="Launch every run on all GPUs with this accelerate config.")
    delete_checkpoints: bool = flag(False, help="Remove the checkpoints of a run once it is finished.")
    dry_run: bool = flag(False, help="Print the runs with their flags and stop.")

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.jobs is not None and (self.gpus or self.accelerate_config):
            raise UserError("--jobs is for the CPU; leave it out with --gpus or --accelerate_config")
        if len(set(self.gpus)) < len(self.gpus):
            raise UserError(f"--gpus names a GPU twice: {' '.join(self.gpus)}")
        if self.accelerate_config and not Path(self.accelerate_config).is_file():
            raise UserError(f"--accelerate_config {self.accelerate_config} does not exist")


@dataclass(eq=False)
class Run:
    """A recipe with its flags. As text and as a path it is the folder that the recipe writes to."""

    recipe: str
    flags: Mapping[str, Any]
    folder: Path
    title: str
    needs: Sequence["Run"] = ()
    status: str = WAITING
    reason: str = ""

    @property
    def output(self) -> Path:
        """What the recipe writes to."""
        return self.folder / "output"

    @property
    def log(self) -> Path:
        """What the recipe said."""
        return self.folder / "log.txt"

    @property
    def is_finished(self) -> bool:
        """Whether it has ended well, now or before."""
        return (self.folder / "done.json").is_file() and self.output.exists()

    @property
    def seconds(self) -> float:
        """How long it took, with its imports."""
        return float(json.loads((self.folder / "done.json").read_text(encoding="utf-8"))["seconds"])

    def results(self) -> dict[str, Any] | None:
        """Content of its `results.json`; None as long as it has not finished."""
        return json.loads((self.output / "results.json").read_text(encoding="utf-8")) if self.is_finished else None

    def __fspath__(self) -> str:
        return str(self.output)

    def __truediv__(self, name: str) -> Path:
        return self.output / name

    __str__ = __fspath__


class Runs:
    """The runs of an experiment and the places where they go."""

    def __init__(self, options: RunArguments, recipes: Path | None = None):
        self.folder = Path(options.output_dir).expanduser().absolute()
        self.options = options
        self.recipes = recipes or recipes_folder()
        self.all: dict[Path, Run] = {}  # by output folder
        self._launcher, self._slots = _places(options)

    def run(self, recipe: str, title: str = "", /, **flags: Any) -> Run:
        """Ask for a run, which `wait` makes; the same recipe with the same flags and inputs is one run.

        Flags are as on the command line, `config` is a YAML file that holds more, and None leaves a flag out.
        """
        if config := flags.pop("config", None):
            flags = {**read_yaml(config, f"config {config}", "a mapping of flags"), **flags}
        flags = {name: value for name, value in flags.items() if value is not None and value != []}
        needs: dict[Path, Run] = {}
        identity = {
            name: str(value) if name in _NO_INPUTS else self._identity(value, needs)
            for name, value in sorted(flags.items())
        }
        digest = hashlib.sha256(json.dumps([recipe, identity]).encode()).hexdigest()[:16]
        folder = self.folder / "runs" / f"{recipe}-{digest}"
        plain = {name: _plain(value) for name, value in flags.items()}
        run = Run(recipe, plain, folder, title or folder.name, tuple(needs.values()))
        return self.all.setdefault(run.output, run)

    def _identity(self, value: Any, needs: dict[Path, Run]) -> Any:
        """What the hash of a run has of a flag; the runs that it needs are added."""
        if isinstance(value, (list, tuple)):
            return [self._identity(item, needs) for item in value]
        if not isinstance(value, (str, os.PathLike)):
            return value
        path = Path(value).absolute()
        for parent in (path, *path.parents):
            if run := self.all.get(parent):
                needs[parent] = run
                return str(path.relative_to(self.folder))
        return content_sha256(path) if os.path.exists(path) else str(value)

    def wait(self) -> None:
        """Make all runs that were asked for and are not finished; a failure does not keep the others from running."""
        waiting = [run for run in self.all.values() if run.status == WAITING]
        if self.options.dry_run:
            for run in waiting:
                print(f"==== {run.title} ({run.folder.name}) ====\n{_as_yaml(run.flags)}")
                run.status = NOT_RUN
            return
        running: dict[Any, _Job] = {}
        free, total = list(self._slots), len(waiting)
        if todo := sum(not run.is_finished for run in waiting):
            logger.info("%d runs to make, %d at a time; their logs are in %s", todo, len(free), self.folder / "runs")
        try:
            while waiting or running:
                for run in list(waiting):
                    if self._begin(run, free, running):
                        waiting.remove(run)
                        self._tell(run, total - len(waiting) - len(running), total)
                for sentinel in connection.wait(list(running)) if running else []:
                    job = running.pop(sentinel)
                    job.end()
                    free.append(job.variables)
                    self._tell(job.run, total - len(waiting) - len(running), total)
                    self._delete_checkpoints([*waiting, *(each.run for each in running.values())])
        except KeyboardInterrupt:
            _kill([job.process for job in running.values()])
            raise ChildProcessError("interrupted; the same command goes on where the runs were") from None

    def _begin(self, run: Run, free: list[dict[str, str]], running: dict[Any, "_Job"]) -> bool:
        """Start a run if there is a place for it, or say why it needs none; False if it has to wait."""
        if any(needed.status == WAITING for needed in run.needs):
            return False
        lost = next((needed for needed in run.needs if not needed.is_finished), None)
        if lost is not None:
            run.status, run.reason = NOT_RUN, f"it needs {lost.title}, which is not there"
        elif run.is_finished:
            run.status = SKIPPED
        elif not free:
            return False
        elif (job := _start(run, self.recipes, self._launcher, free[-1])) is None:
            run.status, run.reason = FAILED, f"another program is at work in {run.folder}; wait for it, or end it"
        else:
            free.pop()
            running[job.process.sentinel] = job
        return True

    def _delete_checkpoints(self, to_come: Sequence[Run]) -> None:
        """Remove the checkpoints of finished runs, if that is wanted and no run to come needs them."""
        for run in self.all.values() if self.options.delete_checkpoints else ():
            if run.status == FINISHED and not any(run in other.needs for other in to_come):
                for checkpoint in run.output.glob("checkpoint-*"):
                    shutil.rmtree(checkpoint)

    def _tell(self, run: Run, count: int, total: int) -> None:
        if run.status not in (WAITING, SKIPPED):
            log = logger.info if run.status == FINISHED else logger.warning
            log("[%d/%d] %s: %s%s", count, total, run.title, run.status, run.reason and f", {run.reason}")

    def finish(self) -> None:
        """Say what failed and why, with an error if something did."""
        lost = [run for run in self.all.values() if run.status in (FAILED, NOT_RUN)]
        if self.options.dry_run or not lost:
            return
        told = f"{len(lost)} of {len(self.all)} runs did not finish"
        print(f"{told}:", file=sys.stderr)
        for run in lost:
            place = run.log if run.status == FAILED else run.folder.name
            print(f"- {run.title}: {run.status}, {run.reason} ({place})", file=sys.stderr)
        raise ChildProcessError(f"{told}; the same command tries them again")


def recipes_folder() -> Path:
    """The recipes: inside the installed package, or of the checkout that this is."""
    package = Path(heterofusion.__file__).parent
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parents[1] / "recipes"


@functools.cache
def content_sha256(path: Path) -> str:
    """Hash of a file's content, or of the names and contents of the files that lie directly in a folder."""
    if path.is_file():
        return file_sha256(path)
    files = sorted(item for item in path.iterdir() if item.is_file() and not item.name.startswith("."))
    return hashlib.sha256("".join(f"{item.name} {file_sha256(item)}\n" for item in files).encode()).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, os.PathLike) else value


def _as_yaml(flags: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(flags), sort_keys=False, allow_unicode=True, width=1000)


# ---- places and processes ---------------------------------------------------------------------------------------


def _places(options: RunArguments) -> tuple[list[str], list[dict[str, str]]]:
    """Words before the recipe (none: it runs in a process that has made the imports), and the variables of places."""
    gpus = options.gpus or ([] if options.jobs else _visible_gpus())
    if options.accelerate_config:
        words = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", options.accelerate_config]
        words += ["--main_process_port", "0"]  # a free one: another launch may have the default
        if options.gpus:
            return [*words, "--num_processes", str(len(gpus))], [{"CUDA_VISIBLE_DEVICES": ",".join(gpus)}]
        return words, [{}]
    if gpus:
        return [sys.executable], [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus]
    jobs = options.jobs or 1
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // jobs))
    return [], [{"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": threads}] * jobs


def _visible_gpus() -> list[str]:
    count, given = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",")[:count] if given else [str(index) for index in range(count)]


@dataclass
class _Inherited:
    """An open file that a child of the fork server gets too: it holds the lock as long as it lives."""

    file: IO[str]

    def __reduce__(self):
        return operator.methodcaller("detach"), (reduction.DupFd(self.file.fileno()),)


@dataclass
class _Job:
    run: Run
    process: Any
    variables: dict[str, str]
    lock: IO[str]
    log_begin: int
    start: float

    def end(self) -> None:
        """Note what became of a run whose process has ended."""
        self.process.join()
        code = self.process.exitcode
        if code == 0 and self.run.output.exists():
            seconds = round(time.perf_counter() - self.start, 1)
            write_whole(self.run.folder / "done.json", json.dumps({"seconds": seconds}) + "\n")
            self.run.status = FINISHED
        else:
            self.run.status = FAILED
            self.run.reason = f"{_last_words(self.run.log, self.log_begin)} [exit code {code}]"
        self.lock.close()


def _start(run: Run, recipes: Path, launcher: Sequence[str], variables: dict[str, str]) -> _Job | None:
    """Start a run's process; None if another program is at work on it."""
    run.folder.mkdir(parents=True, exist_ok=True)
    lock = (run.folder / ".lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    words = [str(recipes / f"{run.recipe}.py"), "--config", str(run.folder / "flags.yaml"), *_resume(run)]
    write_whole(run.folder / "flags.yaml", _as_yaml({"output_dir": str(run.output), **run.flags}))
    begin = run.log.stat().st_size if run.log.exists() else 0
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([] if launcher else _PRELOAD)
    process = context.Process(
        target=_become_run, args=(list(launcher), words, variables, str(run.log), _Inherited(lock)), name=run.title
    )
    process.start()
    return _Job(run, process, variables, lock, begin, time.perf_counter())


def _resume(run: Run) -> list[str]:
    """Flags with which a recipe goes on where it was."""
    if not run.output.is_dir() or not any(run.output.iterdir()):
        return []
    flag = _RESUME.get(run.recipe, "resume_from_checkpoint" if any(run.output.glob("checkpoint-*")) else None)
    return [f"--{flag}=true" if flag else "--overwrite=true"]


def _become_run(launcher: list[str], words: list[str], variables: dict[str, str], log: str, lock: int) -> None:
    """In a child of the fork server: be the program, in a session that ends with the parent."""
    os.setsid()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.update(variables)
    with open(log, "ab") as output:
        output.write(f"$ {' '.join(words)}\n".encode())
        output.flush()
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    if launcher:
        sys.exit(abs(subprocess.run([*launcher, *words], pass_fds=[lock]).returncode))
    if "OMP_NUM_THREADS" in variables:  # torch has read the fork server's
        torch.set_num_threads(int(variables["OMP_NUM_THREADS"]))
    sys.path.insert(0, str(Path(words[0]).parent))
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


def _end_with_parent() -> None:
    connection.wait([multiprocessing.parent_process().sentinel])  # type: ignore[union-attr]
    os.killpg(0, signal.SIGTERM)


def _kill(processes: Sequence[Any]) -> None:
    """End processes and what they launched."""
    for number, seconds in ((signal.SIGTERM, _KILL_AFTER), (signal.SIGKILL, None)):
        for process in processes:
            if process.is_alive():
                try:
                    os.killpg(process.pid, number)
                except ProcessLookupError:  # it has not made its session yet
                    process.terminate()
        deadline = time.monotonic() + (seconds or 0)
        for process in processes:
            process.join(None if seconds is None else max(0.0, deadline - time.monotonic()))


def _last_words(log: Path, begin: int) -> str:
    """Why a program failed, from its output from a position on: its last `error: ` line, else its last line."""
    text = log.read_bytes()[begin:].decode("utf-8", "replace") if log.exists() else ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines or ["it said nothing"])[-1]
