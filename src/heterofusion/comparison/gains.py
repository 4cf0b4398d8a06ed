"""Differences of rows that a comparison reports by names of their own; `heterofusion.report` computes them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from heterofusion.cli import UsageError
from heterofusion.comparison.entries import names_of

_KEYS = ("name", "row", "over", "over_best_of", "cases", "dataset", "at_least", "interval_above")


@dataclass(frozen=True)
class Gain:
    """A difference of two rows.

    Attributes:
        name: of the difference.
        row: name of the method.
        over: what is subtracted; None with `over_best_of`.
        over_best_of: methods of which the best is subtracted, by its mean over the seeds of a case.
        cases: names of the cases that it is reported in; empty for all.
        dataset: the data set that it is of; None for the mean over all.
        at_least: what its mean is to reach.
        interval_above: what the lower end of its interval is to be above, 0 where it is not given.
    """

    name: str
    row: str
    over: str | None = None
    over_best_of: tuple[str, ...] = ()
    cases: tuple[str, ...] = ()
    dataset: str | None = None
    at_least: float | None = None
    interval_above: float | None = None

    @property
    def methods(self) -> set[str]:
        """Names of all methods that it is of."""
        return {self.row, *self.over_best_of, *([self.over] if self.over is not None else [])}

    def plain(self) -> dict[str, Any]:
        """For JSON: what is given."""
        values = {name: getattr(self, name) for name in _KEYS}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
            if value not in (None, ())
        }


def plan_gains(
    entries: Any, methods: Mapping[str, Sequence[str]], cases: Sequence[str], where: str
) -> tuple[Gain, ...]:
    """Check the section `gains`.

    Args:
        entries: the section.
        methods: by name of the method, the names of the cases that it is run in.
        cases: names of the cases.
        where: names the file in messages.

    Raises:
        UsageError: something in it is not as it has to be; names it.
    """
    if entries is None:
        return ()
    if not isinstance(entries, list):
        raise UsageError(f"{where}: gains must be a list of mappings; found {entries!r}")
    return tuple(_gain(entry, methods, cases, where) for entry in entries)


def _gain(entry: Any, methods: Mapping[str, Sequence[str]], cases: Sequence[str], where: str) -> Gain:
    needed = isinstance(entry, dict) and entry.get("name") and entry.get("row")
    given = {key: value for key, value in entry.items() if value is not None} if needed else {}
    if not needed or ("over" in given) == ("over_best_of" in given):
        raise UsageError(f"{where}: each of gains must have name, row, and over or over_best_of; found {entry!r}")
    place = f"{where}, gain {entry['name']!r}"
    unknown = [str(key) for key in entry if key not in _KEYS]
    if unknown:
        raise UsageError(f"{place} has unknown keys: {', '.join(unknown)}; known are {', '.join(_KEYS)}")
    for key in ("row", "over"):
        if key in given and given[key] not in methods:
            raise UsageError(f"{place} names {given[key]!r}, which is no method of it")
    best_of = names_of(given.get("over_best_of"), list(methods), "method", f"{place}: over_best_of")
    if entry["row"] in (*best_of, given.get("over")):
        raise UsageError(f"{place} compares {entry['row']!r} with itself")
    wanted = names_of(given.get("cases"), cases, "case", f"{place}: cases")
    for case in wanted:
        if case not in methods[entry["row"]]:
            raise UsageError(f"{place} is of case {case!r}, in which {entry['row']!r} is not run")
        if not any(case in methods[name] for name in (*best_of, *([given["over"]] if "over" in given else []))):
            raise UsageError(f"{place} is of case {case!r}, in which nothing that it is compared with is run")
    for key in ("at_least", "interval_above"):
        value = given.get(key, 0)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise UsageError(f"{place}: {key} is {value!r}; a number was expected")
    if "interval_above" in given and "at_least" not in given:
        raise UsageError(f"{place}: interval_above goes with at_least; give both, or neither")
    return Gain(
        str(entry["name"]), str(entry["row"]), given.get("over"), best_of, wanted,
        str(given["dataset"]) if "dataset" in given else None, given.get("at_least"), given.get("interval_above"),
    )  # fmt: skip
