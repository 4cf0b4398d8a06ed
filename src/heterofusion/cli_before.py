"""The flags of sequences, sweeps and comparisons: it goes with them."""

import copy
import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from transformers import HfArgumentParser, TrainingArguments

from heterofusion.runtime.errors import UserError
from heterofusion.runtime.flags import as_text, read_yaml

_WORDS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
_NEGATIVE_NUMBER = re.compile(r"-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")
_DEBUG_HELP = "`true` shows the traceback of an error instead of one line."


class _Parser(HfArgumentParser):
    @staticmethod
    def _parse_dataclass_field(parser: Any, field: Any) -> None:
        field = copy.copy(field)
        field.metadata = {key: value for key, value in field.metadata.items() if key != "range"}
        HfArgumentParser._parse_dataclass_field(parser, field)

    def error(self, message: str) -> Any:
        raise UserError(f"{message} (see --help)")


def parse_with_sections(
    dataclass_types: Sequence[type], argv: Sequence[str], description: str, sections: Collection[str]
) -> tuple[tuple[Any, ...], dict[str, Any], Path | None]:
    """As `parse_arguments`, for a YAML file that holds other things beside flags.

    Args:
        dataclass_types: the dataclasses, in order.
        argv: the command line without the program's name.
        description: shown by `--help`.
        sections: keys of the file that are no flags.

    Returns:
        One instance per dataclass, the sections that the file has, and its full path; None without a file.

    Raises:
        ValueError: as `parse_arguments`.
    """
    parser = _parser(dataclass_types, description)
    argv = list(argv)
    path = _config_path(argv)
    content: dict[str, Any] = {}
    defaults: list[str] = []
    if path is not None:
        content, where = _read_config(path)
        flags = {key: value for key, value in content.items() if key not in sections}
        defaults = _mapping_arguments(flags, parser, where)
    try:
        *instances, _ = parser.parse_args_into_dataclasses([*defaults, *argv], look_for_args_file=False)
    except (ValueError, ImportError) as error:  # TrainingArguments has checks of its own
        raise UserError(str(error)) from error
    found = {key: value for key, value in content.items() if key in sections}
    return tuple(instances), found, None if path is None else Path(path).expanduser().absolute()


def _parser(dataclass_types: Sequence[type], description: str) -> _Parser:
    parser = _Parser(dataclass_types, description=description, allow_abbrev=False)  # type: ignore[arg-type]
    parser._negative_number_matcher = _NEGATIVE_NUMBER  # argparse takes -1e-3 for a flag
    parser.add_argument("--config", metavar="FILE.yaml", help="YAML file with values for any of the flags.")
    debug = next((action for action in parser._actions if action.dest == "debug"), None)
    if debug is None:  # `command` takes it out of argv; here it is for --help
        parser.add_argument("--debug", metavar="true", help=_DEBUG_HELP)
    else:
        debug.help = f"{debug.help} {_DEBUG_HELP}"
    return parser


def _config_path(argv: list[str]) -> str | None:
    paths = []
    for index, argument in enumerate(argv):
        if argument.startswith("--config="):
            paths.append(argument.removeprefix("--config="))
        if argument == "--config":
            if index + 1 == len(argv):
                raise UserError("--config needs the name of a YAML file")
            paths.append(argv[index + 1])
    if len(paths) > 1:
        raise UserError(f"--config is given {len(paths)} times ({', '.join(paths)}); name one file")
    return paths[0] if paths else None


def _read_config(path: str) -> tuple[dict[str, Any], str]:
    """Content of a YAML file of flags, and how messages name it."""
    where = f"--config: {Path(path).expanduser().absolute()}"
    return read_yaml(path, where, "a mapping of flags"), where


def check_flags(dataclass_types: Sequence[type], values: Mapping[str, Any], where: str) -> None:
    """Check the flags of another recipe, as far as that goes without starting it: those of training start an engine.

    Args:
        dataclass_types: its dataclasses.
        values: its flags, as in a YAML file.
        where: names them in messages.

    Raises:
        UserError: an unknown or missing flag, or a value that cannot be cast or is out of range.
    """
    parser = _parser(dataclass_types, "")
    try:
        found = vars(parser.parse_args(_mapping_arguments(dict(values), parser, where)))
        for kind in dataclass_types:
            if not issubclass(kind, TrainingArguments):
                kind(**{item.name: found[item.name] for item in dataclasses.fields(cast(Any, kind))})
    except ValueError as error:
        message = str(error).removesuffix(" (see --help)")
        raise UserError(message if message.startswith(where) else f"{where}: {message}") from None


def _mapping_arguments(content: dict[Any, Any], parser: _Parser, where: str) -> list[str]:
    known = {action.dest for action in parser._actions} - {"help", "config"}
    unknown = [str(key) for key in content if key not in known]
    if unknown:
        raise UserError(f"{where} has unknown keys: {', '.join(unknown)}; they must be names of flags (see --help)")
    if _WORDS.get(as_text(content.get("debug")).lower()) is not None:
        raise UserError(f"{where} sets debug; give `--debug true` on the command line")
    arguments: list[str] = []
    for key, value in content.items():
        if value is None:
            continue
        if isinstance(value, list):
            if not value and parser.get_default(key) == []:  # what is there if it is left out
                continue
            if not value:
                raise UserError(f"{where} has an empty list as {key}; give one or more values, or leave the key out")
            items = [as_text(item) for item in value]
            for item in items:
                if item.startswith("--"):  # argparse would take it for a flag
                    raise UserError(f"{where} has {item!r} in the list of {key}; a value was expected")
            arguments += [f"--{key}", *items]
        else:
            arguments.append(f"--{key}={as_text(value)}")
    return arguments
