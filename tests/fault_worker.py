"""Runs of recipes/train.py to which something happens at a chosen moment; started by test_faults.py.

`fault_worker.py` serves runs (see forked.py); `fault_worker.py FAULT FLAGS...` is a single one, for a real launch.
"""

import ctypes
import functools
import importlib
import importlib.util
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forked import serve

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "train.py"


def load_recipe() -> None:
    """recipes/train.py as the module `train`, with what it imports while it runs."""
    spec = importlib.util.spec_from_file_location("train", RECIPE)
    module = sys.modules["train"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("transformers.models.llama.modeling_llama", "datasets.packaged_modules.json.json"):
        importlib.import_module(name)
    if importlib.util.find_spec("deepspeed"):
        importlib.import_module("deepspeed")


# ---- faults -----------------------------------------------------------------------------------------------------


FILE_OPERATIONS = {"open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate"}


class Fault:
    """Does something at one call of a function.

    Args:
        at: the function, as `module:qualified.name`; or `a file operation` of Python's.
        call: which of its calls, from 1.
        when: `before` or `after` it, or `half`: it writes a file, its second argument, of which half stays.
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
        within: tuple[str, int] | None = None,
        do: str = "kill",
        value: Any = None,
        rank: int | None = None,
    ) -> None:
        if rank is not None and rank != int(os.environ["RANK"]):
            return
        self.call, self.when = call, when
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
            os.truncate(args[1], os.path.getsize(args[1]) // 2)
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


def run(argv: list[str], fault: dict[str, Any] | None = None) -> int:
    if fault:
        Fault(**fault)
    return sys.modules["train"].main(argv)


if __name__ == "__main__":
    load_recipe()
    if len(sys.argv) > 1:
        sys.exit(run(sys.argv[2:], json.loads(sys.argv[1])))
    serve(run)
