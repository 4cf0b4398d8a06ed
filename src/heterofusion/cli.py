"""Programs: flags with a YAML file under them, errors in one line, and the `heterofusion` command.

A user's mistake ends with `error: ...` on stderr and exit code 2; any other error keeps its traceback, and
`--debug true` shows that of a user's mistake too.
"""

import argparse
import ast
import copy
import dataclasses
import datetime
import functools
import logging
import os
import re
import runpy
import subprocess
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

from heterofusion.runtime.errors import UserError, one_line
from heterofusion.runtime.flags import as_text, read_yaml
from heterofusion.runtime.ranks import is_main_process

USER_ERROR = 2
# Shown first by --help, beside what is required.
FIRST = (
    "model_name_or_path", "target_adapter", "source_adapters", "dataset_name", "source_labels", "output_dir", "preset",
    "learning_rate", "max_steps", "seed",
)  # fmt: skip
_WORDS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
_NEGATIVE_NUMBER = re.compile(r"-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")
_DEBUG_HELP = "`true` shows the traceback of a user's mistake instead of one line."


# ---- flags ------------------------------------------------------------------------------------------------------


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


class _Parser(TrlParser):
    """TRL's parser, whose YAML values pass the casts of the command line, with ranges and groups in its help."""

    def __init__(self, dataclass_types: Sequence[type], description: str) -> None:
        usage = "%(prog)s [--config FILE.yaml] [FLAGS]"
        kinds: Any = dataclass_types
        super().__init__(kinds, usage=usage, description=description, allow_abbrev=False, formatter_class=_Help)
        self._negative_number_matcher = _NEGATIVE_NUMBER  # argparse takes -1e-3 for a flag
        self.add_argument("--config", metavar="FILE.yaml", help="YAML file with values for any of the flags.")
        debug = next((action for action in self._actions if action.dest == "debug"), None)
        if debug is None:  # `command` takes it out of argv; here it is for --help
            self.add_argument("--debug", metavar="true", help=_DEBUG_HELP)
        else:
            debug.help = f"{debug.help} {_DEBUG_HELP}"
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
        titles, last = {}, "transformers' TrainingArguments"
        for kind in dataclass_types:
            for item in dataclasses.fields(kind):
                owner = next(
                    base for base in reversed(kind.__mro__) if item.name in vars(base).get("__annotations__", ())
                )
                doc = (owner.__doc__ or owner.__name__).strip().splitlines()[0].rstrip(".")
                titles[item.name] = last if owner is TrainingArguments else doc
        groups: dict[str, list[argparse.Action]] = {"the flags that matter most": [], "this program": []}
        for action in sorted(self._actions, key=lambda action: titles.get(action.dest) == last):
            first = action.required or action.dest in FIRST
            title = "the flags that matter most" if first else titles.get(action.dest, "this program")
            groups.setdefault(title, []).append(action)
        self._action_groups = []
        for title, actions in groups.items():
            actions.sort(key=lambda action: FIRST.index(action.dest) if action.dest in FIRST else len(FIRST))
            if actions:
                self.add_argument_group(title)._group_actions.extend(actions)

    def read_config(self, path: str) -> None:
        """Make the values of a YAML file the defaults."""
        where = f"--config: {Path(path).expanduser().absolute()}"
        content = read_yaml(path, where, "a mapping of flags")
        actions = {action.dest: action for action in reversed(self._actions) if action.dest not in ("help", "config")}
        if unknown := [key for key in content if key not in actions]:
            raise UserError(
                f"{where} has unknown keys: {', '.join(unknown)}; they must be names of flags (see --help)"
            )
        if as_text(content.get("debug")).lower() in _WORDS:
            raise UserError(f"{where} sets debug; give `--debug true` on the command line")
        values = {}
        for key, value in content.items():
            words = [as_text(item) for item in value] if isinstance(value, list) else [as_text(value)]
            if value is None or (not words and actions[key].default == []):
                continue
            if isinstance(value, list) and (not words or actions[key].nargs != "+"):
                raise UserError(
                    f"{where} has the list {value} as {key}; give {'one' if words else 'a'} value, or leave it out"
                )
            try:
                values[key] = self._get_values(actions[key], words)
            except argparse.ArgumentError as error:
                raise UserError(f"{where}: {error}") from None
        self.set_defaults_with_config(**values)

    def error(self, message: str) -> Any:
        raise UserError(f"{message} (see --help)")


def parse_arguments(dataclass_types: Sequence[type], argv: Sequence[str], description: str | None) -> tuple[Any, ...]:
    """Parse flags into dataclasses; `--config file.yaml` gives defaults that the command line overrides.

    Raises:
        UserError: unknown flag or YAML key, a value that cannot be cast, or a check of a dataclass.
    """
    parser = _Parser(dataclass_types, description or "")
    only_config = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    only_config.add_argument("--config", action="append", default=[])
    try:
        found, rest = only_config.parse_known_args(list(argv))
    except argparse.ArgumentError:
        raise UserError("--config needs the name of a YAML file") from None
    if len(found.config) > 1:
        raise UserError(f"--config is given {len(found.config)} times ({', '.join(found.config)}); name one file")
    for path in found.config:
        parser.read_config(path)
    try:
        *instances, _ = parser.parse_args_into_dataclasses(rest, look_for_args_file=False)
    except (ValueError, ImportError) as error:  # TrainingArguments has checks of its own
        raise UserError(str(error)) from error
    return tuple(instances)


# ---- a program --------------------------------------------------------------------------------------------------


def command(function: Callable[[list[str]], None]) -> Callable[[Sequence[str] | None], int]:
    """Make a program's main of a function of argv: returns the exit code, prints user errors in one line."""

    @functools.wraps(function)
    def main(argv: Sequence[str] | None = None) -> int:
        arguments, debug = _take_debug(list(sys.argv[1:] if argv is None else argv))
        try:
            function(arguments)
        except SystemExit as stop:  # --help
            return int(stop.code or 0)
        except (UserError, OSError, ImportError) as error:
            if debug:
                raise
            _drop_held_messages()
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


def _take_debug(argv: list[str]) -> tuple[list[str], bool]:
    """Take `--debug true` out; TrainingArguments has a `--debug` of its own with other values."""
    for index, argument in enumerate(argv):
        flag, _, value = argument.partition("=")
        if flag == "--debug":
            following = argv[index + 1 : index + 2]
            words = [value] if value else [word for word in following if not word.startswith("--")]
            rest = argv[:index] + argv[index + 1 + (0 if value else len(words)) :]
            if not words or words[0].lower() in _WORDS:
                return rest, not words or _WORDS[words[0].lower()]
    return argv, False


class _HeldMessages(MemoryHandler):
    """Log messages that wait for the checks of the flags and files to end."""


def set_up_logging(level: int = logging.INFO, hold: bool = False) -> None:
    """Log to stderr, one line a message, what transformers and `warnings` say too; ranks other than 0 only warn.

    With `hold`, messages wait for `release_logging` or the program's end; a user's error drops them and stands alone.
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
    logging.getLogger("huggingface_hub").handlers.clear()  # it propagates too, and would say everything twice
    for noisy in ("httpx", "httpx2", "httpcore", "httpcore2", "urllib3", "filelock", "fsspec"):
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


# ---- the `heterofusion` command ---------------------------------------------------------------------------------


def _shipped(folder: str) -> Path:
    """A folder of the checkout that an installed package has within itself."""
    inside = Path(__file__).parent / folder
    return inside if inside.is_dir() else Path(__file__).parents[2] / folder


def _commands() -> dict[str, Path]:
    files = sorted(_shipped("recipes").glob("*.py"))
    return {path.stem: path for path in files if not path.stem.startswith("_")}


def _overview() -> str:
    lines = ["usage: heterofusion COMMAND [--accelerate_config NAME] [--num_processes N] [FLAGS]", "", "commands:"]
    for name, path in _commands().items():
        doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        lines.append(f"  {name:<12} {doc.splitlines()[0] if doc else ''}")
    names = ", ".join(sorted(path.stem for path in _shipped("accelerate_configs").glob("*.yaml")))
    lines += ["", f"--accelerate_config is the path of a file of `accelerate config`, or one of {names}."]
    return "\n".join([*lines, "`heterofusion COMMAND --help` lists the flags of a command."])


def _launch_flags(argv: list[str]) -> tuple[list[str], list[str]]:
    """Flags for `accelerate launch`, and the rest of the command line."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--accelerate_config")
    parser.add_argument("--num_processes")
    try:
        found, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from None
    launch = [] if found.num_processes is None else ["--num_processes", found.num_processes]
    if found.accelerate_config is not None:
        named = _shipped("accelerate_configs") / f"{found.accelerate_config}.yaml"
        path = named if named.is_file() else Path(found.accelerate_config).expanduser()
        if not path.is_file():
            raise UserError(f"--accelerate_config {found.accelerate_config!r} is no file and no name; see --help")
        launch = ["--config_file", str(path), *launch]
    return launch, rest


@command
def _dispatch(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return
    name, *rest = argv
    if name not in _commands():
        raise UserError(f"{name!r} is no command; choose one of {', '.join(_commands())}")
    launch, rest = _launch_flags(rest)
    path = str(_commands()[name])
    if launch:
        launcher = [sys.executable, "-m", "accelerate.commands.launch", *launch, path]
        raise SystemExit(subprocess.call([*launcher, *rest]))
    sys.argv = [path, *rest]
    runpy.run_path(path, run_name="__main__")


def main() -> int:
    """The `heterofusion` command: runs a recipe, through `accelerate launch` where its flags are given."""
    return _dispatch(None)


if __name__ == "__main__":
    sys.exit(main())
