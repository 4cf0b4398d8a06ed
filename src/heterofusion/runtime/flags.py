"""Ranges of flags, as metadata of their dataclass fields: `metadata={"help": ..., "range": "(0, 1]"}`."""

import dataclasses
import math
import re
from typing import Any

from heterofusion.runtime.errors import UserError

_RANGE = re.compile(r"([\[(])\s*(\S+?)\s*,\s*(\S+?)\s*([\])])")


def check_ranges(flags: Any) -> None:
    """Check every field of a dataclass that has a `range` or `choices` in its metadata; None passes, lists by item.

    A range is an interval such as `[0, inf)` or `(0, 1]`; what is not finite is outside of each.

    Raises:
        UserError: names the flag, its value and what it may be.
    """
    for item in dataclasses.fields(flags):
        value = getattr(flags, item.name)
        for each in value if isinstance(value, (list, tuple)) else [value]:
            if each is None:
                continue
            choices = item.metadata.get("choices")
            if choices and each not in choices:
                raise UserError(f"--{item.name} is {each!r}; choose one of {', '.join(map(str, choices))}")
            if "range" in item.metadata and not in_range(each, item.metadata["range"]):
                raise UserError(f"--{item.name} is {each!r}; it must be {describe_range(item.metadata['range'])}")


def in_range(value: Any, interval: str) -> bool:
    """Whether a finite number lies in an interval such as `(0, 1]`."""
    left, low, high, right = _parts(interval)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return False
    above = value > low if left == "(" else value >= low
    return above and (value < high if right == ")" else value <= high)


def describe_range(interval: str) -> str:
    """An interval in words: `above 0 and at most 1`, `at least 0 and finite`."""
    left, low, high, right = _parts(interval)
    words = [] if low == -math.inf else [f"{'above' if left == '(' else 'at least'} {low:g}"]
    words += ["finite"] if high == math.inf else [f"{'below' if right == ')' else 'at most'} {high:g}"]
    return " and ".join(words)


def _parts(interval: str) -> tuple[str, float, float, str]:
    match = _RANGE.fullmatch(interval.strip())
    if match is None:
        raise ValueError(f"{interval!r} is no interval")
    left, low, high, right = match.groups()
    return left, float(low), float(high), right
