"""Runs of a sweep, each in processes of its own, several at a time: one per GPU, or a few on the CPU.

What a run made is left alone if its flags are the same; what was interrupted goes on where it was. Every step leaves
its flags (`train.yaml`), its output (`train.log`) and, once it has ended well, its seconds (`train.done`) in the run's
folder.
"""

import contextlib
import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from heterofusion.progress import checkpoint_folders
from heterofusion.sweeps.runs import Run, Step

logger = logging.getLogger(__name__)

FINISHED, SKIPPED, FAILED, NOT_RUN = "finished", "was finished", "failed", "not run"
_KILL_AFTER = 10.0  # seconds that a process has to end after it was asked to


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
        gpus: GPUs, one run at a time on each; empty for the CPU.
        jobs: runs at a time on the CPU, which share its cores.
        overwrite: run again what was finished or is of other flags.
        launcher: words before the recipe's name, in place of the Python interpreter.
    """

    recipes: Path
    gpus: Sequence[str] = ()
    jobs: int = 1
    overwrite: bool = False
    launcher: Sequence[str] = ()
    _processes: set[subprocess.Popen] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _stopped: bool = False

    @property
    def slots(self) -> list[dict[str, str]]:
        """Environment variables of each place that a run can have."""
        if self.gpus:
            return [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in self.gpus]
        threads = max(1, (os.cpu_count() or 1) // self.jobs)
        given = os.environ.get("OMP_NUM_THREADS")
        return [{"OMP_NUM_THREADS": given or str(threads)}] * self.jobs

    # ---- one run ------------------------------------------------------------------------------------------------

    def execute(self, run: Run, variables: dict[str, str]) -> Outcome:
        """Go through the steps of a run; never raises for what a step does.

        Args:
            run: the run.
            variables: environment variables of its place.
        """
        outcome = Outcome(run, SKIPPED)
        renewed = False  # a step before was run, so what later ones made of it is out of date
        for step in run.steps:
            try:
                state = self._state(run, step)
                if state == SKIPPED and not renewed:
                    continue
                again = renewed or state == NOT_RUN
                outcome.status = FINISHED
                seconds, reason = self._run_step(run, step, variables, again)
                renewed = True
            except (OSError, ValueError) as error:
                seconds, reason = 0.0, " ".join(str(error).split())
            outcome.seconds += seconds
            if reason:
                outcome.status, outcome.reason = FAILED, f"{step.recipe}: {reason}"
                break
        return outcome

    def _state(self, run: Run, step: Step) -> str:
        """Whether a step is finished (`SKIPPED`), was begun (`FAILED`), or has to start afresh (`NOT_RUN`).

        Raises:
            ValueError: what is there was made with other flags.
        """
        record, done = run.folder / f"{step.recipe}.yaml", run.folder / f"{step.recipe}.done"
        if self.overwrite or not step.folder.exists():
            return NOT_RUN
        if not record.is_file():
            if any(step.folder.iterdir()):
                raise ValueError(f"{step.folder} holds something that no sweep made; remove it, or --overwrite true")
            return NOT_RUN
        before = yaml.safe_load(record.read_text(encoding="utf-8"))
        before = before if isinstance(before, dict) else {}
        for name in sorted({*before, *step.flags}):
            if before.get(name) != step.flags.get(name):
                raise ValueError(
                    f"{step.folder} was made with another {name}: {before.get(name)!r}, this sweep has "
                    f"{step.flags.get(name)!r}; name another output_dir, or --overwrite true"
                )
        return SKIPPED if done.is_file() else FAILED

    def _run_step(self, run: Run, step: Step, variables: dict[str, str], again: bool) -> tuple[float, str]:
        """Run a recipe; gives its seconds, and why it failed if it did."""
        run.folder.mkdir(parents=True, exist_ok=True)
        record, log, done = (run.folder / f"{step.recipe}.{suffix}" for suffix in ("yaml", "log", "done"))
        done.unlink(missing_ok=True)
        record.write_text(yaml.safe_dump(step.flags, sort_keys=False, allow_unicode=True), encoding="utf-8")
        launcher = [*(self.launcher or [sys.executable]), str(self.recipes / f"{step.recipe}.py")]
        command = [*launcher, "--config", str(record), *_go_on(step, again)]
        start = time.perf_counter()
        with log.open("wb" if again else "ab") as output:
            output.write(f"$ {' '.join(command)}\n".encode())
            output.flush()
            with self._lock:
                if self._stopped:
                    return 0.0, "the sweep was stopped"
                process = subprocess.Popen(
                    command, env={**os.environ, **variables}, stdout=output, stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL, start_new_session=True,
                )  # fmt: skip
                self._processes.add(process)
            code = process.wait()
        with self._lock:
            self._processes.discard(process)
        seconds = time.perf_counter() - start
        if code == 0:
            done.write_text(json.dumps({"seconds": seconds}) + "\n", encoding="utf-8")
            return seconds, ""
        return seconds, f"{_last_words(log)} [exit code {code}, {log}]"

    def stop(self) -> None:
        """End the processes of all runs, and start no more."""
        with self._lock:
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


def _signal(process: subprocess.Popen, number: int) -> None:
    """Send a signal to a process and to those that it launched."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _go_on(step: Step, again: bool) -> list[str]:
    """Flags with which a recipe goes on where it was, or starts afresh in a folder that is there."""
    if not (step.folder.is_dir() and any(step.folder.iterdir())):
        return []
    if again:
        return ["--overwrite=true"]
    if step.recipe == "eval":
        return ["--resume=true"]
    has_checkpoint = bool(checkpoint_folders(step.folder)) or "stages" in step.flags
    return ["--resume_from_checkpoint=true"] if has_checkpoint else ["--overwrite=true"]


def _last_words(log: Path) -> str:
    """Why a program failed, from its output: its last `error: ` line, else its last line."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    said = [line for line in lines if line and not line.startswith("$ ")]
    return (errors or said or ["it said nothing"])[-1]


def run_all(runs: Sequence[Run], pool: Pool) -> list[Outcome]:
    """Run a list of runs over a pool; a failure does not keep the others from running.

    Args:
        runs: the runs, in the order in which they are started.
        pool: where.

    Returns:
        What became of each, in the same order. After an interrupt from the keyboard, those that had not begun are
        `not run`.
    """
    slots = pool.slots
    free: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
    for slot in slots:
        free.put(slot)

    def work(run: Run) -> Outcome:
        slot = free.get()
        try:
            return pool.execute(run, slot)
        finally:
            free.put(slot)

    outcomes = [Outcome(run) for run in runs]
    places: dict[Future[Outcome], int] = {}
    with ThreadPoolExecutor(len(slots)) as executor:
        try:
            places = {executor.submit(work, run): index for index, run in enumerate(runs)}
            open_runs = set(places)
            while open_runs:
                ended, open_runs = wait(open_runs, return_when=FIRST_COMPLETED)
                for future in ended:
                    outcomes[places[future]] = future.result()
                    _tell(future.result(), len(runs) - len(open_runs), len(runs))
        except KeyboardInterrupt:
            logger.warning("interrupted: ending the runs; the same command goes on where they were")
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
