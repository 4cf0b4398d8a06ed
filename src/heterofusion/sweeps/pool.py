"""Runs of a sweep, each in processes of its own, several at a time: one per GPU, or a few on the CPU.

What a run made is left alone if its flags are the same; what was interrupted goes on where it was. Every step leaves
its flags (`train.yaml`), its output (`train.log`) and, once it has ended well, its seconds (`train.done`) in the run's
folder. `eval.stale` marks what is out of date: a step before was run again, or it is itself being run again. A lock
that the recipe (or its launcher) inherits keeps another sweep away as long as it lives.
"""

import contextlib
import fcntl
import json
import logging
import os
import queue
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import yaml

from heterofusion.runtime.errors import UserError, one_line
from heterofusion.runtime.files import write_whole
from heterofusion.sweeps.forking import ForkedRun, ForkServer
from heterofusion.sweeps.runs import Run, Step
from heterofusion.training.checkpoints import checkpoint_folders

logger = logging.getLogger(__name__)

FINISHED, SKIPPED, FAILED, NOT_RUN = "finished", "was finished", "failed", "not run"
_KILL_AFTER = 40.0  # seconds that processes have to end after they were asked to; torch's launcher takes up to 30
_LOCK_FILE = ".lock"


@dataclass
class Outcome:
    """What became of a run.

    Attributes:
        run: the run.
        status: `finished`, `was finished`, `failed` or `not run`.
        seconds: wall-clock seconds of its steps, those of earlier tries not counted.
        reason: why it failed.
    """

    run: Run
    status: str = NOT_RUN
    seconds: float = 0.0
    reason: str = ""


@dataclass
class Pool:
    """Where runs are executed.

    Attributes:
        recipes: folder of the recipes.
        slots: environment variables of each place that can take a run at a time.
        overwrite: run again what was finished or is of other flags.
        delete_checkpoints: remove the `checkpoint-N` folders of a run once all its steps are finished.
        launcher: words before the recipe's name.
        server: forks the runs, in place of the launcher; all slots have its variables.
    """

    recipes: Path
    slots: Sequence[dict[str, str]] = ({},)
    overwrite: bool = False
    delete_checkpoints: bool = False
    launcher: Sequence[str] = (sys.executable,)
    server: ForkServer | None = None
    _processes: set[subprocess.Popen | ForkedRun] = field(default_factory=set, init=False)
    _guard: threading.Lock = field(default_factory=threading.Lock, init=False)
    _stopped: bool = field(default=False, init=False)

    @classmethod
    def on_gpus(cls, recipes: Path, gpus: Sequence[str], **options: Any) -> "Pool":
        """One run at a time on each GPU.

        Args:
            recipes: folder of the recipes.
            gpus: what `CUDA_VISIBLE_DEVICES` may hold: numbers, or ids of GPUs and their parts.
            **options: see the class.
        """
        return cls(recipes, [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus], **options)

    @classmethod
    def on_cpu(cls, recipes: Path, jobs: int, preload: bool = False, **options: Any) -> "Pool":
        """A number of runs at a time on the CPU, which share its cores unless OMP_NUM_THREADS is set.

        Args:
            recipes: folder of the recipes.
            jobs: the number.
            preload: fork the runs from a process that has made their imports; Linux only.
            **options: see the class.
        """
        threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // jobs))
        slot = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": threads}
        return cls(recipes, [slot] * jobs, server=ForkServer(slot) if preload else None, **options)

    @classmethod
    def launched(cls, recipes: Path, config: str, gpus: Sequence[str], **options: Any) -> "Pool":
        """One run after the other, each on several GPUs by `accelerate launch`.

        Args:
            recipes: folder of the recipes.
            config: file of `accelerate_configs/`.
            gpus: the GPUs, a process each; those of the config if empty.
            **options: see the class.
        """
        words = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config]
        words += ["--main_process_port", "0"]  # a free one: another launch may have the default
        if not gpus:
            return cls(recipes, launcher=words, **options)
        variables = {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}
        return cls(recipes, [variables], launcher=[*words, "--num_processes", str(len(gpus))], **options)

    # ---- one run ------------------------------------------------------------------------------------------------

    def execute(self, run: Run, variables: dict[str, str]) -> Outcome:
        """Go through the steps of a run; never raises for what a step does.

        Args:
            run: the run.
            variables: environment variables of its place.
        """
        outcome = Outcome(run, SKIPPED)
        try:
            with _lock(run.folder) as lock:
                for index, step in enumerate(run.steps):
                    state = NOT_RUN if self.overwrite else _state(run, step)
                    if state == SKIPPED:
                        continue
                    outcome.status = FINISHED
                    for later in run.steps[index + 1 :]:  # what they made of this step is out of date
                        if later.folder.exists():
                            _mark(run, later, "stale").touch()
                    seconds, reason = self._run_step(run, step, variables, state == NOT_RUN, lock)
                    outcome.seconds += seconds
                    if reason:
                        outcome.status, outcome.reason = FAILED, f"{step.recipe}: {reason}"
                        return outcome
                if self.delete_checkpoints:
                    _delete_checkpoints(run)
        except (OSError, ValueError) as error:
            outcome.status, outcome.reason = FAILED, one_line(error)
        return outcome

    def _run_step(
        self, run: Run, step: Step, variables: dict[str, str], afresh: bool, lock: IO[str]
    ) -> tuple[float, str]:
        """Run a recipe; gives its seconds, and why it failed if it did."""
        record, log, done, stale = (_mark(run, step, suffix) for suffix in ("yaml", "log", "done", "stale"))
        if afresh and step.folder.exists():
            stale.touch()  # until it has ended: what lies there is of other flags, and must not be resumed
        done.unlink(missing_ok=True)
        write_whole(record, yaml.safe_dump(step.flags, sort_keys=False, allow_unicode=True))
        recipe = str(self.recipes / f"{step.recipe}.py")
        command = [*self.launcher, recipe, "--config", str(record), *_go_on(step, afresh)]
        start = time.perf_counter()
        with log.open("wb" if afresh else "ab") as output:
            output.write(f"$ {shlex.join(command)}\n".encode())
            output.flush()
            begin = output.tell()
            with self._guard:
                if self._stopped:
                    return 0.0, "the sweep was stopped"
                process = self._start(command, variables, output, lock)
                self._processes.add(process)
            try:
                code = process.wait()
            finally:
                with self._guard:
                    self._processes.discard(process)
        seconds = time.perf_counter() - start
        if code:
            return seconds, f"{_last_words(log, begin)} [exit code {code}, {log}]"
        stale.unlink(missing_ok=True)
        write_whole(done, json.dumps({"seconds": seconds}) + "\n")
        return seconds, ""

    def _start(
        self, command: list[str], variables: dict[str, str], output: IO[bytes], lock: IO[str]
    ) -> subprocess.Popen | ForkedRun:
        """Start a program that leads a session of its own and holds the lock of its run."""
        if self.server is not None:
            return self.server.run(command[len(self.launcher) :], output, lock)
        return subprocess.Popen(
            command, env={**os.environ, **variables}, stdout=output, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, start_new_session=True, pass_fds=[lock.fileno()],
        )  # fmt: skip

    def stop(self) -> None:
        """End the processes of all runs, and start no more."""
        with self._guard:
            self._stopped = True
            processes = list(self._processes)
        for process in processes:
            _signal(process, signal.SIGTERM)
        deadline = time.monotonic() + _KILL_AFTER
        for process in processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                _signal(process, signal.SIGKILL)
            except ChildProcessError:
                continue  # who waits for the run tells

    @property
    def stopped(self) -> bool:
        """Whether it takes no more runs."""
        return self._stopped


def _mark(run: Run, step: Step, suffix: str) -> Path:
    return run.folder / f"{step.recipe}.{suffix}"


def _state(run: Run, step: Step) -> str:
    """Whether a step is finished (`SKIPPED`), was begun (`FAILED`), or has to start afresh (`NOT_RUN`).

    Raises:
        ValueError: what is there was made with other flags.
    """
    record = _mark(run, step, "yaml")
    if not step.folder.exists() or _is_stale(run, step):
        return NOT_RUN
    if not record.is_file():
        if any(step.folder.iterdir()):
            raise UserError(f"{step.folder} holds something that no sweep made; remove it, or --overwrite true")
        return NOT_RUN
    try:
        before = yaml.safe_load(record.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{record} is damaged ({one_line(error)}); remove it, or --overwrite true") from error
    before = before if isinstance(before, dict) else {}
    for name in sorted({*before, *step.flags}):
        if before.get(name) != step.flags.get(name):
            raise UserError(
                f"{step.folder} was made with another {name}: {before.get(name)!r}, this sweep has "
                f"{step.flags.get(name)!r}; remove it, name another output_dir, or --overwrite true"
            )
    return SKIPPED if _mark(run, step, "done").is_file() else FAILED


def is_finished(run: Run) -> bool:
    """Whether a run has ended well with the flags that it has now, and nothing that it left is out of date."""
    try:
        return all(_state(run, step) == SKIPPED for step in run.steps)
    except ValueError:  # of other flags
        return False


def _is_stale(run: Run, step: Step) -> bool:
    """Whether what a step left is out of date. Checkpoints of its own make it one that goes on."""
    mark = _mark(run, step, "stale")
    if not mark.exists():
        return False
    checkpoints = checkpoint_folders(step.folder)
    return not checkpoints or any(path.stat().st_mtime_ns <= mark.stat().st_mtime_ns for path in checkpoints)


def _delete_checkpoints(run: Run) -> None:
    """Remove the checkpoints of a finished run, those of a sequence's stages too."""
    for step in [step for step in run.steps if step.recipe != "eval"]:
        stages = [str(stage.get("name")) for stage in step.flags.get("stages") or []]
        for folder in (step.folder, *(step.folder / name for name in stages)):
            for checkpoint in checkpoint_folders(folder):
                shutil.rmtree(checkpoint, ignore_errors=True)


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[IO[str]]:
    """Keep other sweeps out of a run's folder.

    Raises:
        ValueError: processes of another sweep are at work there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK_FILE).open("w", encoding="ascii") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"a process of another sweep is at work in {folder}; wait for it, or end it") from None
        yield lock


def _signal(process: subprocess.Popen | ForkedRun, number: int) -> None:
    """Send a signal to a process and to those that it launched."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _go_on(step: Step, afresh: bool) -> list[str]:
    """Flags with which a recipe goes on where it was, or starts afresh in a folder that is there."""
    if not (step.folder.is_dir() and any(step.folder.iterdir())):
        return []
    if afresh:
        return ["--overwrite=true"]
    if step.recipe in ("eval", "label"):
        return ["--resume=true"]
    has_checkpoint = bool(checkpoint_folders(step.folder)) or "stages" in step.flags
    return ["--resume_from_checkpoint=true"] if has_checkpoint else ["--overwrite=true"]


def _last_words(log: Path, begin: int) -> str:
    """Why a program failed, from its output from a position on: its last `error: ` line, else its last line."""
    text = log.read_bytes()[begin:].decode("utf-8", "replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines or ["it said nothing"])[-1]


def run_all(runs: Sequence[Run], pool: Pool) -> list[Outcome]:
    """Run a list of runs over a pool; a failure does not keep the others from running.

    Args:
        runs: the runs, in the order in which they are started.
        pool: where.

    Returns:
        What became of each, in the same order. After an interrupt from the keyboard, those that had not begun are
        `not run`.
    """
    outcomes = [Outcome(run) for run in runs]
    if pool.stopped:
        return outcomes
    free: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
    for slot in pool.slots:
        free.put(slot)

    def work(run: Run) -> Outcome:
        slot = free.get()
        try:
            return pool.execute(run, slot)
        finally:
            free.put(slot)

    places: dict[Future[Outcome], int] = {}
    with ThreadPoolExecutor(len(pool.slots)) as executor:
        try:
            places = {executor.submit(work, run): index for index, run in enumerate(runs)}
            open_runs = set(places)
            while open_runs:
                ended, open_runs = wait(open_runs, return_when=FIRST_COMPLETED)
                for future in ended:
                    outcomes[places[future]] = future.result()
                    _tell(future.result(), len(runs) - len(open_runs), len(runs))
        except KeyboardInterrupt:
            logger.warning(
                "interrupted: ending the runs; the same command, without --overwrite, goes on where they were"
            )
            executor.shutdown(wait=False, cancel_futures=True)
            pool.stop()
    for future, index in places.items():
        if future.done() and not future.cancelled():
            outcomes[index] = future.result()
    return outcomes


def _tell(outcome: Outcome, count: int, total: int) -> None:
    level = logging.WARNING if outcome.status == FAILED else logging.INFO
    text = f": {outcome.reason}" if outcome.reason else f", {outcome.seconds:.0f} s" if outcome.seconds else ""
    logger.log(level, "[%d/%d] %s %s%s", count, total, outcome.run.title, outcome.status, text)
