"""What the recipes share as programs: flags with a YAML file under them, and errors in one line.

A user's mistake ends with `error: ...` on stderr and exit code 2; `--debug true` shows the traceback instead.
Log messages can be held back until everything is checked, so that the error stands alone.
"""

import functools
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser
from transformers.utils import logging as transformers_logging

USER_ERROR = 2
_WORDS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
_NEGATIVE_NUMBER = re.compile(r"-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")
_DEBUG_HELP = "`true` shows the traceback of an error instead of one line."


class UsageError(ValueError):
    """Flags that cannot be parsed."""


class _Parser(HfArgumentParser):
    def error(self, message: str) -> Any:
        raise UsageError(f"{message} (see --help)")


def parse_arguments(dataclass_types: Sequence[type], argv: Sequence[str], description: str) -> tuple[Any, ...]:
    """Parse flags into dataclasses; `--config file.yaml` gives defaults that the command line overrides.

    Values of the file pass the same casts as flags. A list becomes several values, a mapping a JSON string.

    Args:
        dataclass_types: the dataclasses, in order.
        argv: the command line without the program's name.
        description: shown by `--help`.

    Returns:
        One instance per dataclass.

    Raises:
        ValueError: unknown flag or YAML key, a value that cannot be cast, or a check of a dataclass.
    """
    parser = _Parser(dataclass_types, description=description, allow_abbrev=False)  # type: ignore[arg-type]
    parser._negative_number_matcher = _NEGATIVE_NUMBER  # argparse takes -1e-3 for a flag
    parser.add_argument("--config", metavar="FILE.yaml", help="YAML file with values for any of the flags.")
    debug = next((action for action in parser._actions if action.dest == "debug"), None)
    if debug is None:  # `command` takes it out of argv; here it is for --help
        parser.add_argument("--debug", metavar="true", help=_DEBUG_HELP)
    else:
        debug.help = f"{debug.help} {_DEBUG_HELP}"
    argv = list(argv)
    path = _config_path(argv)
    defaults = _file_arguments(Path(path), parser) if path is not None else []
    *instances, _ = parser.parse_args_into_dataclasses([*defaults, *argv], look_for_args_file=False)
    return tuple(instances)


def _config_path(argv: list[str]) -> str | None:
    paths = []
    for index, argument in enumerate(argv):
        if argument.startswith("--config="):
            paths.append(argument.removeprefix("--config="))
        if argument == "--config":
            if index + 1 == len(argv):
                raise UsageError("--config needs the name of a YAML file")
            paths.append(argv[index + 1])
    if len(paths) > 1:
        raise UsageError(f"--config is given {len(paths)} times ({', '.join(paths)}); name one file")
    return paths[0] if paths else None


def _file_arguments(path: Path, parser: _Parser) -> list[str]:
    full = path.expanduser().absolute()
    try:
        content = yaml.safe_load(full.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"--config: {full} does not exist") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"--config: {full} cannot be read as YAML: {error}") from None
    if content is None:
        return []
    if not isinstance(content, dict):
        raise UsageError(f"--config: {full} holds a {type(content).__name__}, a mapping of flags was expected")
    known = {action.dest for action in parser._actions} - {"help", "config"}
    unknown = [str(key) for key in content if key not in known]
    if unknown:
        raise UsageError(
            f"--config: {full} has unknown keys: {', '.join(unknown)}; they must be names of flags (see --help)"
        )
    if _WORDS.get(_as_argument(content.get("debug")).lower()) is not None:
        raise UsageError(f"--config: {full} sets debug; give `--debug true` on the command line")
    arguments: list[str] = []
    for key, value in content.items():
        if value is None:
            continue
        if isinstance(value, list):
            items = [_as_argument(item) for item in value]
            for item in items:
                if item.startswith("--"):  # argparse would take it for a flag
                    raise UsageError(f"--config: {full} has {item!r} in the list of {key}; a value was expected")
            arguments += [f"--{key}", *items]
        else:
            arguments.append(f"--{key}={_as_argument(value)}")
    return arguments


def _as_argument(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return json.dumps(value) if isinstance(value, dict) else str(value)


def command(function: Callable[[list[str]], None]) -> Callable[[Sequence[str] | None], int]:
    """Make a program's main of a function of argv: returns the exit code, prints user errors in one line."""

    @functools.wraps(function)
    def main(argv: Sequence[str] | None = None) -> int:
        arguments, debug = _take_debug(list(sys.argv[1:] if argv is None else argv))
        try:
            function(arguments)
        except SystemExit as stop:  # --help
            return int(stop.code or 0)
        except (ValueError, OSError, ImportError) as error:
            if debug:
                raise
            _drop_held_messages()
            if os.environ.get("LOCAL_RANK", "0") == "0":  # one line a node: a file may be missing on one of them
                print(f"error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
            return USER_ERROR
        finally:
            release_logging()
        return 0

    return main


def _take_debug(argv: list[str]) -> tuple[list[str], bool]:
    """Take `--debug true` out; TrainingArguments has a `--debug` of its own with other values."""
    for index, argument in enumerate(argv):
        flag, _, value = argument.partition("=")
        if flag != "--debug":
            continue
        if value:
            rest = argv[:index] + argv[index + 1 :]
        else:
            value = argv[index + 1] if index + 1 < len(argv) else "true"
            rest = argv[:index] + argv[index + 2 :]
        if value.lower() in _WORDS:
            return rest, _WORDS[value.lower()]
        if value.startswith("--"):
            return argv[:index] + argv[index + 1 :], True
    return argv, False


def is_main_process() -> bool:
    """Whether this is rank 0 of a launch (or the only process)."""
    return int(os.environ.get("RANK", "0")) == 0


class _HeldMessages(MemoryHandler):
    """Log messages that wait for the checks of the flags and files to end."""


def set_up_logging(level: int = logging.INFO, hold: bool = False) -> None:
    """Log to stderr, one line a message, what transformers and `warnings` say too; ranks other than 0 only warn.

    Args:
        level: lowest level that is shown.
        hold: keep messages until `release_logging`, or until the program ends. A user's error drops them: it is the
            one line on stderr then.
    """
    handler: logging.Handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S"))
    if hold:
        handler = _HeldMessages(10_000, flushLevel=sys.maxsize, target=handler)
    logging.basicConfig(level=level if is_main_process() else logging.WARNING, handlers=[handler], force=True)
    logging.captureWarnings(True)
    # what libraries are about to rename is not the user's concern
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|accelerate|torch)\.")
    transformers_logging.disable_default_handler()
    transformers_logging.enable_propagation()
    for noisy in ("httpx", "httpcore", "urllib3", "filelock", "fsspec"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def release_logging() -> None:
    """Show the messages that `set_up_logging(hold=True)` kept, and all further ones at once."""
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, _HeldMessages)]:
        handler.flush()
        if handler.target is not None:
            root.addHandler(handler.target)
        root.removeHandler(handler)


def _drop_held_messages() -> None:
    for handler in logging.getLogger().handlers:
        if isinstance(handler, _HeldMessages):
            handler.buffer.clear()
