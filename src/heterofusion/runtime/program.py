"""A program: flags with a YAML file under them, a log, and errors in one line.

A user's mistake ends with `error: ...` on stderr and exit code 2; any other error keeps its traceback, and
`--debug true` shows that of a user's mistake too.
"""

import argparse
import copy
import dataclasses
import datetime
import functools
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore
from tqdm import tqdm
from transformers import HfArgumentParser, TrainingArguments
from transformers.utils import logging as transformers_logging
from trl import TrlParser

from heterofusion.runtime.errors import USER_ERROR, UserError, one_line
from heterofusion.runtime.flags import as_text, read_yaml, take_flags
from heterofusion.runtime.ranks import is_main_process

# Shown first by --help, beside what is required.
FIRST = (
    "model_name_or_path", "target_adapter", "source_adapters", "dataset_name", "source_labels", "output_dir", "preset",
    "learning_rate", "max_steps", "seed",
)  # fmt: skip
_WORDS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
_NEGATIVE_NUMBER = re.compile(r"-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")
_EPILOG = """\
--config FILE.yaml gives values for any of the flags, which the command line overrides.
--debug true shows the traceback of a user's mistake instead of one line."""


# ---- flags ------------------------------------------------------------------------------------------------------


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


class _Parser(TrlParser):
    """TRL's parser, with ranges and groups in its help."""

    def __init__(self, dataclass_types: Sequence[type], description: str) -> None:
        kinds: Any = dataclass_types
        texts = {"usage": "%(prog)s [--config FILE.yaml] [FLAGS]", "description": description, "epilog": _EPILOG}
        super().__init__(kinds, **texts, allow_abbrev=False, formatter_class=_Help)
        self._negative_number_matcher = _NEGATIVE_NUMBER  # argparse takes -1e-3 for a flag
        self._group(dataclass_types)

    @staticmethod
    def _parse_dataclass_field(parser: Any, field: Any) -> None:
        field = copy.copy(field)
        metadata = dict(field.metadata)
        if interval := metadata.pop("range", None):
            metadata["help"] = f"{metadata['help']} In {interval}."
        field.metadata = metadata
        HfArgumentParser._parse_dataclass_field(parser, field)

    def _group(self, dataclass_types: Sequence[type]) -> None:
        """Help in groups: what matters first, then a group a dataclass, then the rest of transformers' flags."""
        first, last = "the flags that matter most", "transformers' TrainingArguments"
        titles = {}
        for kind in dataclass_types:
            for name in (item.name for item in dataclasses.fields(kind)):
                owner = next(base for base in reversed(kind.__mro__) if name in vars(base).get("__annotations__", ()))
                doc = (owner.__doc__ or owner.__name__).strip().splitlines()[0].rstrip(".")
                titles[name] = last if owner is TrainingArguments else doc
        groups: dict[str, list[argparse.Action]] = {first: []}
        for action in sorted(self._actions, key=lambda action: titles.get(action.dest) == last):
            matters = action.required or action.dest in FIRST
            groups.setdefault(first if matters else titles.get(action.dest, "this program"), []).append(action)
        groups[first].sort(key=lambda action: [*FIRST, action.dest].index(action.dest))
        self._action_groups = []
        for title, actions in groups.items():
            self.add_argument_group(title)._group_actions.extend(actions)

    def error(self, message: str) -> Any:
        raise UserError(f"{message} (see --help)")


def parse_arguments(dataclass_types: Sequence[type], argv: Sequence[str], description: str | None) -> tuple[Any, ...]:
    """Parse flags into dataclasses; `--config file.yaml` gives defaults that the command line overrides."""
    paths, flags = take_flags(argv, "config")
    for path in reversed(paths):  # before the command line, since the last of two values counts
        flags = [*_yaml_flags(path), *flags]
    where = f" (with --config {' and '.join(paths)})" if paths else ""
    parser = _Parser(dataclass_types, description or "")
    try:
        *instances, unknown = parser.parse_args_into_dataclasses(
            flags, return_remaining_strings=True, look_for_args_file=False
        )
    except (ValueError, ImportError) as error:  # TrainingArguments has checks of its own
        raise UserError(f"{error}{where}") from error
    if unknown:
        raise UserError(f"unknown flags: {' '.join(unknown)}{where}; see --help")
    return tuple(instances[: len(dataclass_types)])


def _yaml_flags(path: str) -> list[str]:
    """A YAML file as a command line, so that its values pass the same casts."""
    flags = []
    where = f"--config {Path(path).expanduser().absolute()}"
    for key, value in read_yaml(path, where, "a mapping of flags").items():
        if isinstance(value, list) and value:
            flags += [f"--{key}", *map(as_text, value)]
        elif value not in (None, []):
            flags.append(f"--{key}={as_text(value)}")
    return flags


# ---- a program --------------------------------------------------------------------------------------------------


def command(function: Callable[[list[str]], None]) -> Callable[[Sequence[str] | None], int]:
    """Make a program's main of a function of argv: returns the exit code, prints user errors in one line."""

    @functools.wraps(function)
    def main(argv: Sequence[str] | None = None) -> int:
        arguments, debug = _take_debug(sys.argv[1:] if argv is None else argv)
        try:
            function(arguments)
        except SystemExit as stop:  # --help
            return int(stop.code or 0)
        except (UserError, OSError, ImportError) as error:
            if debug:
                raise
            release_logging(drop=True)
            if _is_first_to_tell():
                _print_alone(f"error: {one_line(error)}")
            return USER_ERROR
        finally:
            release_logging()
        return 0

    return main


def _is_first_to_tell() -> bool:
    """Whether no other process of the launch has told of an error: the store of the launcher counts them."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    try:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(host, port, is_master=False, timeout=datetime.timedelta(seconds=10))
        return store.add(f"heterofusion/errors/{os.environ.get('TORCHELASTIC_RESTART_COUNT')}", 1) == 1
    except (RuntimeError, ValueError):  # the launcher is gone: told twice is better than not at all
        return True


def _print_alone(line: str) -> None:
    """Print a line to stderr, whatever progress bars were cut short: in a log it begins where a line does."""
    # to clear a bar below the first line, tqdm leaves codes in this one that move a terminal's cursor up again
    below = any(bar.fp == sys.stderr and getattr(bar, "pos", 0) for bar in getattr(tqdm, "_instances", ()))
    with tqdm.external_write_mode(sys.stderr):
        print(("\r" if below else "") + line, file=sys.stderr)


def _take_debug(argv: Sequence[str]) -> tuple[list[str], bool]:
    """Take `--debug true` out; TrainingArguments has a `--debug` of its own with other values."""
    values, rest = take_flags(argv, "debug", nargs="?", const="true")
    if all(value.lower() in _WORDS for value in values):
        return rest, any(_WORDS[value.lower()] for value in values)
    return list(argv), False


# ---- its log ----------------------------------------------------------------------------------------------------


def set_up_logging(level: int = logging.INFO, hold: bool = False) -> None:
    """Log to stderr, one line a message, what transformers and `warnings` say too; ranks other than 0 only warn.

    With `hold`, messages wait for `release_logging` or the program's end; a user's error drops them and stands alone.
    """
    handler: logging.Handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S"))
    if hold:
        handler = MemoryHandler(10_000, flushLevel=sys.maxsize, target=handler)
    logging.basicConfig(level=level if is_main_process() else logging.WARNING, handlers=[handler], force=True)
    logging.captureWarnings(True)
    # what libraries are about to rename is not the user's concern
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|accelerate|torch)\.")
    transformers_logging.disable_default_handler()
    transformers_logging.enable_propagation()
    logging.getLogger("huggingface_hub").handlers.clear()  # it propagates too, and would say everything twice
    for noisy in ("httpx", "httpx2", "httpcore", "httpcore2", "urllib3", "filelock", "fsspec"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def release_logging(drop: bool = False) -> None:
    """Show, or drop, the messages that `set_up_logging(hold=True)` kept, and show all further ones at once."""
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, MemoryHandler)]:
        if drop:
            handler.buffer.clear()
        handler.flush()
        if handler.target is not None:
            root.addHandler(handler.target)
        root.removeHandler(handler)
