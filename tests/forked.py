"""A process that imports everything once and forks a child per order, or the ranks of a launch: it saves the imports.

Orders and answers are lines of JSON. A child ends as a process of its own would: by its exit code or a signal.
"""

import gc
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

LONGEST = 400  # seconds of one order


class Server:
    """Starts a script whose main calls `serve`."""

    def __init__(self, script: object, **variables: str) -> None:
        scripts = os.path.dirname(sys.executable)  # DeepSpeed compiles with the ninja that lies there
        environment = {
            **os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}", "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **variables,
        }  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, **order: Any) -> SimpleNamespace:
        """Exit code, negative for a signal, and all output of a child that runs the order.

        With `launch`, the flags of `accelerate launch`, its ranks do.
        """
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, f"the worker has ended: {self.process.poll()}"
        return SimpleNamespace(**json.loads(answer))

    def close(self) -> None:
        self.process.stdin.close()
        assert self.process.wait(timeout=60) == 0


def serve(run: Callable[..., int]) -> None:
    """Call `run(**order)` in a child for every order."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not stand between the answers
    assert threading.active_count() == 1, threading.enumerate()  # a fork would leave the others behind
    gc.freeze()  # children need not look through what they have in common
    for line in sys.stdin:
        order = json.loads(line)
        flags = order.pop("launch", None)
        reader, writer = os.pipe()  # unlike a file it has no size to limit

        def child(order: dict = order, flags: list[str] | None = flags, writer: int = writer) -> int:
            os.dup2(writer, 1)
            os.dup2(writer, 2)
            return run(**order) if flags is None else launch(flags, lambda: run(**order))

        pid = fork(child)
        os.close(writer)
        with os.fdopen(reader, encoding="utf-8") as log:
            text = log.read()
        answers.write(json.dumps({"code": os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), "log": text}) + "\n")


def fork(run: Callable[[], int]) -> int:
    """Run a function in a child."""
    if (pid := os.fork()) != 0:
        return pid
    code = 1  # as Python's for an exception that nobody catches
    try:
        signal.alarm(LONGEST)
        code = run()
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def launch(flags: list[str], run: Callable[[], int]) -> int:
    """`accelerate launch` with these flags, but its ranks are forks of this process; the highest exit code of them."""
    import torch.distributed.run
    from accelerate.commands.launch import launch_command, launch_command_parser

    codes: list[int] = []

    def fork_ranks(args: Any) -> None:
        count = int(args.nproc_per_node)
        place = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": args.master_port}

        def rank(number: int) -> int:
            own = {"RANK": number, "LOCAL_RANK": number, "MASTER_ADDR": "127.0.0.1", **place}
            os.environ.update({name: str(value) for name, value in own.items()})
            return run()

        left = {fork(lambda number=number: rank(number)) for number in range(count)}
        while left:
            pid, status = os.wait()
            left.remove(pid)
            codes.append(os.waitstatus_to_exitcode(status))
            for other in left if status else ():  # it would wait for the dead
                os.kill(other, signal.SIGTERM)

    torch.distributed.run.run = fork_ranks
    launch_command(launch_command_parser().parse_args(["--main_process_port", "0", *flags, "script"]))
    return max(map(abs, codes))
