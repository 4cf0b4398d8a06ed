"""Runs of recipes/train.py to which something happens at a chosen moment; started by test_faults.py.

`fault_worker.py serve` imports everything once and forks a child per run, which saves each its imports: a line of JSON
in, a line of JSON out. `fault_worker.py run FAULT FLAGS...` is a single run, for launches with several ranks.
"""

import ctypes
import functools
import gc
import importlib
import importlib.util
import json
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "train.py"
LONGEST = 120  # seconds of one run; it takes two


def load_recipe() -> Any:
    """recipes/train.py as a module, with what it imports while it runs."""
    spec = importlib.util.spec_from_file_location("train", RECIPE)
    module = sys.modules["train"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("transformers.models.llama.modeling_llama", "datasets.packaged_modules.json.json"):
        importlib.import_module(name)
    if importlib.util.find_spec("deepspeed"):
        importlib.import_module("deepspeed")
    return module


# ---- faults -----------------------------------------------------------------------------------------------------


FILE_OPERATIONS = {"open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate"}


class Fault:
    """Does something at one call of a function.

    Args:
        at: the function, as `module:qualified.name`; or `a file operation` of Python's.
        call: which of its calls, from 1.
        when: `before` or `after` it, or `half`: it writes a file, of which only the first half stays.
        file: place of that file among the arguments.
        within: a function and the number of its call: only calls of `at` inside it count.
        do: name of what is done, see `DEEDS`.
        value: its argument.
        rank: rank that it happens to; None for all.
    """

    def __init__(
        self,
        at: str,
        call: int = 1,
        when: str = "before",
        file: int = 1,
        within: tuple[str, int] | None = None,
        do: str = "kill",
        value: Any = None,
        rank: int | None = None,
    ) -> None:
        if rank is not None and rank != int(os.environ["RANK"]):
            return
        self.call, self.when, self.file = call, when, file
        self.deed: Callable[[], None] = functools.partial(DEEDS[do], value)
        self.calls = self.entries = 0
        self.is_open = within is None
        if within is not None:
            patch(within[0], functools.partial(self.enter, within[1]))
        if at == "a file operation":
            sys.addaudithook(lambda event, _: self.count(lambda: None) if event in FILE_OPERATIONS else None)
        else:
            patch(at, self.count)

    def enter(self, entry: int, function: Callable, *args: Any, **kwargs: Any) -> Any:
        self.entries += 1
        self.is_open = self.entries == entry
        try:
            return function(*args, **kwargs)
        finally:
            self.is_open = False

    def count(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        self.calls += self.is_open
        if not self.is_open or self.calls != self.call:
            return function(*args, **kwargs)
        if self.when != "before":
            result = function(*args, **kwargs)
        if self.when == "half":
            os.truncate(args[self.file], os.path.getsize(args[self.file]) // 2)
        self.deed()
        return function(*args, **kwargs) if self.when == "before" else result


def patch(target: str, around: Callable) -> None:
    """Let `around(function, *args, **kwargs)` take the place of a function, named as `module:qualified.name`."""
    module, _, path = target.partition(":")
    *owners, name = path.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    function = getattr(owner, name)

    @functools.wraps(function)
    def patched(*args: Any, **kwargs: Any) -> Any:
        return around(function, *args, **kwargs)

    setattr(owner, name, patched)


def kill(_: None) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def limit_files(size: int) -> None:
    """No file grows beyond so many bytes: the system refuses as it does on a full disk, without one to fill."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def make_unwritable(folder: str) -> None:
    """Take the right to write into a folder away, and root's right to do so all the same."""
    os.chmod(folder, 0o555)
    if os.geteuid() == 0:
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this thread
        none = (ctypes.c_uint32 * 6)()
        if ctypes.CDLL(None, use_errno=True).capset(header, none) != 0:
            raise OSError(ctypes.get_errno(), "capset")


def put_file_in_place(folder: str) -> None:
    """Another program moves the folder away and makes a file of its name."""
    os.rename(folder, f"{folder}.moved")
    Path(folder).write_text("")


DEEDS: dict[str, Callable[[Any], None]] = {
    "kill": kill,
    "limit_files": limit_files,
    "make_unwritable": make_unwritable,
    "put_file_in_place": put_file_in_place,
}


# ---- the two ways to run ----------------------------------------------------------------------------------------


def fork_run(main: Callable[[list[str]], int], order: dict[str, Any]) -> dict[str, Any]:
    """One run in a child of this process; it ends like a process of its own would."""
    reader, writer = os.pipe()  # unlike a file it has no size to limit
    child = os.fork()
    if child == 0:
        code = 1  # as Python's for an exception that nobody catches
        try:
            os.dup2(writer, 1)
            os.dup2(writer, 2)
            signal.alarm(LONGEST)
            if order["fault"]:
                Fault(**order["fault"])
            code = main(order["argv"])
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader, encoding="utf-8") as log:
        text = log.read()
    return {"code": os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), "log": text}


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not stand between the answers
    main = load_recipe().main
    assert threading.active_count() == 1, threading.enumerate()  # a fork would leave the others behind
    gc.freeze()  # children need not look through what they have in common
    for line in sys.stdin:
        answers.write(json.dumps(fork_run(main, json.loads(line))) + "\n")


def run(fault: str, argv: list[str]) -> int:
    main = load_recipe().main
    if fault != "null":
        Fault(**json.loads(fault))
    return main(argv)


if __name__ == "__main__":
    sys.exit(serve() if sys.argv[1] == "serve" else run(sys.argv[2], sys.argv[3:]))
