"""Differences of rows that a comparison reports by names of their own; `heterofusion.report` computes them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from heterofusion.comparison.entries import names_of
from heterofusion.report.comparison_record import Gain
from heterofusion.runtime.errors import UserError

_KEYS = ("name", "row", "over", "over_best_of", "cases", "dataset", "at_least", "interval_above")


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
        UserError: something in it is not as it has to be; names it.
    """
    if entries is None:
        return ()
    if not isinstance(entries, list):
        raise UserError(f"{where}: gains must be a list of mappings; found {entries!r}")
    return tuple(_gain(entry, methods, cases, where) for entry in entries)


def _gain(entry: Any, methods: Mapping[str, Sequence[str]], cases: Sequence[str], where: str) -> Gain:
    needed = isinstance(entry, dict) and entry.get("name") and entry.get("row")
    given = {key: value for key, value in entry.items() if value is not None} if needed else {}
    if not needed or ("over" in given) == ("over_best_of" in given):
        raise UserError(f"{where}: each of gains must have name, row, and over or over_best_of; found {entry!r}")
    place = f"{where}, gain {entry['name']!r}"
    unknown = [str(key) for key in entry if key not in _KEYS]
    if unknown:
        raise UserError(f"{place} has unknown keys: {', '.join(unknown)}; known are {', '.join(_KEYS)}")
    for key in ("row", "over"):
        if key in given and (not isinstance(given[key], str) or given[key] not in methods):
            raise UserError(f"{place} names {given[key]!r}, which is no method of it")
    best_of = names_of(given.get("over_best_of"), list(methods), "method", f"{place}: over_best_of")
    over = best_of or (given["over"],)
    if entry["row"] in over:
        raise UserError(f"{place} compares {entry['row']!r} with itself")
    wanted = names_of(given.get("cases"), cases, "case", f"{place}: cases")
    for case in wanted:
        if case not in methods[entry["row"]]:
            raise UserError(f"{place} is of case {case!r}, in which {entry['row']!r} is not run")
        if not any(case in methods[name] for name in over):
            raise UserError(f"{place} is of case {case!r}, in which nothing that it is compared with is run")
    for key in ("at_least", "interval_above"):
        value = given.get(key, 0)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise UserError(f"{place}: {key} is {value!r}; a number was expected")
    if "interval_above" in given and "at_least" not in given:
        raise UserError(f"{place}: interval_above goes with at_least; give both, or neither")
    return Gain(
        str(entry["name"]), str(entry["row"]), over, wanted or None,
        str(given["dataset"]) if "dataset" in given else None, given.get("at_least"), given.get("interval_above"),
    )  # fmt: skip
