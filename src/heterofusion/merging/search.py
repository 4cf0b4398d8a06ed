"""The values of hyper-parameters that a search tries."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Sequence

from heterofusion.merging.arguments import HYPERPARAMETERS, METHODS, MergeError, MergeSettings

MAX_CANDIDATES = 1000  # more is a slip of the step
_LAMBDA = "lambda"  # short for merge_lambda


def search_candidates(entries: Sequence[str], settings: MergeSettings, given: Collection[str]) -> list[MergeSettings]:
    """All combinations of the values to try, the last name's changing fastest.

    Args:
        entries: `name=start:stop:step` or `name=value,value`, one per hyper-parameter.
        settings: the method and the values of what is not searched.
        given: hyper-parameters that were given as flags too.

    Returns:
        The settings to try, in order; none without entries.

    Raises:
        MergeError: an entry cannot be read, its name is not one of the method's, or a combination is out of range.
    """
    values: dict[str, list[float]] = {}
    for entry in entries:
        key, sign, text = entry.partition("=")
        name = "merge_lambda" if key == _LAMBDA else key
        own = METHODS[settings.method]
        if not sign or name not in HYPERPARAMETERS:
            raise MergeError(
                f"--search has {entry!r}: write name=start:stop:step or name=value,value, such as lambda=0.1,0.2"
            )
        if name not in own:
            raise MergeError(f"--search {entry}: {settings.method} has {', '.join(own) or 'no hyper-parameters'}")
        if name in given:
            raise MergeError(f"--search {entry}: --{name} is given too; leave one out")
        if name in values:
            raise MergeError(f"--search has {name} twice; give all its values at once")
        values[name] = _values(entry, text)
    if not values:
        return []
    count = math.prod(map(len, values.values()))
    if count > MAX_CANDIDATES:
        raise MergeError(f"--search has {count} combinations, more than {MAX_CANDIDATES}; give fewer values")
    return [settings.changed(dict(zip(values, row, strict=True))) for row in itertools.product(*values.values())]


def _values(entry: str, text: str) -> list[float]:
    parts = text.split(":")
    try:
        numbers = [float(part) for part in (parts if len(parts) > 1 else text.split(","))]
    except ValueError:
        raise MergeError(f"--search {entry}: {text!r} holds something that is no number") from None
    if not all(map(math.isfinite, numbers)):
        raise MergeError(f"--search {entry}: give finite numbers")
    if len(parts) > 1:
        if len(parts) != 3:
            raise MergeError(f"--search {entry}: a range is start:stop:step")
        start, stop, step = numbers
        if step <= 0 or stop < start:
            raise MergeError(f"--search {entry}: a range needs a step above 0 and a stop that is not below its start")
        steps = int((stop - start) / step + 1e-9)
        if steps >= MAX_CANDIDATES:
            raise MergeError(f"--search {entry}: this range has {steps + 1} values, more than {MAX_CANDIDATES}")
        numbers = [round(start + i * step, 10) for i in range(steps + 1)]
    if len(set(numbers)) < len(numbers):
        raise MergeError(f"--search {entry}: a value comes twice")
    return numbers
