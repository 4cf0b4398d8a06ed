"""Runs of recipes as children of a process that has imported torch and transformers already, on the CPU of Linux.

With a small model a recipe can take less time than its imports. A `ForkServer` has a process that has made them; for
every run that forks a watcher, which forks the run, waits for it, and writes its process id and exit code to a pipe.
So the process itself waits for no run, and needs no threads: a fork would not take them along.
"""

import contextlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import numpy as np

_ENDS_WITHIN = 5.0  # seconds that a process needs to be gone once it has closed its files
# a recipe finds modules in its own folder, not in the working directory as `-c` does
_PROGRAM = (
    "import logging, sys; logging.getLogger().addHandler(logging.NullHandler()); sys.path[:] = filter(None, sys.path);"
    "from heterofusion.sweeps.forking import serve; serve(int(sys.argv[1]))"
)


class ForkedRun:
    """A run that was forked; what a `Popen` is for other runs. Its process `pid` leads a session of its own."""

    def __init__(self, pid: int, answers: IO[bytes]):
        self.pid = pid
        self._code = b""
        self._reader = threading.Thread(target=self._read, args=(answers,), daemon=True)
        self._reader.start()

    def _read(self, answers: IO[bytes]) -> None:
        with answers:
            self._code = answers.readline()  # empty if the watcher ended without one

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code once it has ended; that of a signal is negative.

        Raises:
            subprocess.TimeoutExpired: it runs for more than `timeout` seconds.
            ChildProcessError: its watcher was killed, so nobody knows how it ends.
        """
        self._reader.join(timeout)
        if self._reader.is_alive():
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
        if not self._code:
            raise ChildProcessError(f"what watched process {self.pid} was killed, so nobody knows how that ends")
        return int(self._code)


class ForkServer:
    """Starts its process when the first run needs it, and ends it when nothing refers to the server any more.

    Args:
        variables: environment variables of the process, and so of all runs, beside those of this process.
    """

    def __init__(self, variables: Mapping[str, str]):
        self._variables = dict(variables)
        self._server: tuple[subprocess.Popen, socket.socket] | None = None

    def run(self, words: Sequence[str], log: IO[bytes], lock: IO[str]) -> ForkedRun:
        """Start a run; not to be called by two threads at once.

        Args:
            words: path of the recipe, and its command line.
            log: takes its output.
            lock: the run holds it open as long as it lives.

        Raises:
            ChildProcessError: the process has ended, or cannot fork.
        """
        process, requests = self._server = self._server or self._start()
        reading, writing = os.pipe()
        answers = os.fdopen(reading, "rb")
        with contextlib.suppress(BrokenPipeError):  # it has ended, as the missing answer tells
            socket.send_fds(requests, [json.dumps(words).encode()], [log.fileno(), lock.fileno(), writing])
        os.close(writing)
        if pid := answers.readline():  # the first one waits for the imports
            return ForkedRun(int(pid), answers)
        answers.close()
        try:
            what = f"has ended [exit code {process.wait(_ENDS_WITHIN)}]"
        except subprocess.TimeoutExpired:
            what = "could not fork"
        raise ChildProcessError(f"the process of --preload true {what}; stderr may say why. Try again, or without it")

    def _start(self) -> tuple[subprocess.Popen, socket.socket]:
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # keeps a message whole
        with its:
            process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, str(its.fileno())], env={**os.environ, **self._variables},
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True, pass_fds=[its.fileno()],
            )  # fmt: skip
        weakref.finalize(self, _end, process, ours)
        return process, ours


def _end(process: subprocess.Popen, requests: socket.socket) -> None:
    requests.close()
    process.kill()  # it has nothing to lose, and runs do not depend on it
    process.wait()


def serve(descriptor: int) -> None:
    """What the process does: import, and fork for what comes from a socket, until nobody holds its other end."""
    import heterofusion.evaluation.run  # noqa: F401 - brings nearly all that recipes import

    if threading.active_count() > 1:
        names = ", ".join(thread.name for thread in threading.enumerate()[1:])
        sys.exit(f"error: --preload true is not safe here: an import started threads ({names}); leave it out")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # watchers need not be waited for
    requests = socket.socket(fileno=descriptor)
    while True:
        message, descriptors, *_ = socket.recv_fds(requests, 1 << 16, 3)  # a command line, and files
        if not message:
            return
        if os.fork() == 0:
            requests.close()
            _watch_or_become_run(*descriptors)
            return _run_recipe(*json.loads(message))
        for each in descriptors:
            os.close(each)


def _watch_or_become_run(log: int, lock: int, answers: int) -> None:
    """Fork, and return in the run alone."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid:
        os.close(log)
        os.close(lock)  # the run alone keeps other sweeps away
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with contextlib.suppress(BrokenPipeError):
            os.write(answers, b"%d\n" % code)
        os._exit(0)
    os.setsid()
    os.write(answers, b"%d\n" % os.getpid())  # not before: whoever reads it may signal the session
    os.close(answers)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)


def _run_recipe(recipe: str, *arguments: str) -> None:
    """What `python recipe arguments` does; errors and SystemExit go up to the interpreter, as there."""
    np.random.seed()  # all runs share the import that seeded it
    sys.path.insert(0, str(Path(recipe).parent))
    sys.argv[1:] = arguments
    runpy.run_path(recipe, run_name="__main__")
