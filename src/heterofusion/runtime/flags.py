"""Flags as dataclass fields (`flag(0.5, help="...", range="(0, 1]")`), their ranges, and YAML with variables."""

import argparse
import dataclasses
import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from heterofusion.runtime.errors import UserError

_VARIABLE = re.compile(r"\$\{([A-Za-z_]\w*)(?::-([^}]*))?\}")


def flag(default: Any = dataclasses.MISSING, *, default_factory: Any = dataclasses.MISSING, **metadata: Any) -> Any:
    """A dataclass field that is a flag: `help` and, where there are any, `choices` and `range` are its metadata."""
    field: Any = dataclasses.field
    return field(default=default, default_factory=default_factory, metadata=metadata)


def check_ranges(flags: Any) -> None:
    """Check every field of a dataclass that has a `range` or `choices` in its metadata; None passes, lists by item.

    A range is an interval such as `[0, inf)` or `(0, 1]`; what is not finite is outside of each.
    """
    for item in dataclasses.fields(flags):
        value, choices = getattr(flags, item.name), item.metadata.get("choices")
        for each in value if isinstance(value, (list, tuple)) else [value]:
            if each is not None and choices and each not in choices:
                raise UserError(f"--{item.name} is {each!r}; choose one of {', '.join(map(str, choices))}")
            interval = item.metadata.get("range")
            if each is not None and interval and not in_range(each, interval):
                raise UserError(f"--{item.name} is {each!r}; it must be {describe_range(interval)}")


def in_range(value: Any, interval: str) -> bool:
    """Whether a finite number lies in an interval such as `(0, 1]`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return False
    low, high = map(float, interval[1:-1].split(","))
    return low <= value <= high and (value > low or interval[0] == "[") and (value < high or interval[-1] == "]")


def describe_range(interval: str) -> str:
    """An interval in words: `above 0 and at most 1`, `at least 0 and finite`."""
    low, high = map(float, interval[1:-1].split(","))
    words = [] if low == -math.inf else [f"{'above' if interval[0] == '(' else 'at least'} {low:g}"]
    words += ["finite"] if high == math.inf else [f"{'below' if interval[-1] == ')' else 'at most'} {high:g}"]
    return " and ".join(words)


def read_yaml(path: str | Path, where: str, expected: str) -> dict[str, Any]:
    """Read a YAML file that holds a mapping, empty for an empty file; messages begin with `where`.

    `${NAME}` in its texts becomes the environment variable, `${NAME:-text}` the text where it is not set.
    """
    try:
        content = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{where} does not exist") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{where} cannot be read as YAML: {error}") from None
    if not isinstance(content, dict | None):
        raise UserError(f"{where} holds a {type(content).__name__}, {expected} was expected")
    return {str(key): _expand_variables(value, f"{where}, {key}") for key, value in (content or {}).items()}


def _expand_variables(value: Any, where: str) -> Any:
    if isinstance(value, dict):
        return {key: _expand_variables(item, where) for key, item in value.items()}
    if isinstance(value, list):
        return [_expand_variables(item, where) for item in value]
    if not isinstance(value, str):
        return value

    def content(match: re.Match[str]) -> str:
        name, default = match.groups()
        found = os.environ.get(name, default)  # what is set to nothing is set
        if found is None:
            raise UserError(f"{where} names ${{{name}}}, but the environment variable {name} is not set: export it")
        return found

    return _VARIABLE.sub(content, value)


def as_text(value: Any) -> str:
    """A value as a command line has it: true and false in small letters, a mapping as JSON."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return json.dumps(value) if isinstance(value, dict) else str(value)


def take_flags(argv: Sequence[str], name: str, **how: Any) -> tuple[list[str], list[str]]:
    """The values of a flag, and the command line without it; `how` as for argparse."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(f"--{name}", action="append", default=[], **how)
    try:
        found, rest = parser.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from None
    return getattr(found, name), rest
