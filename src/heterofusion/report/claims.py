"""What a paper claims, held against results: a difference with its interval, and a verdict."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from heterofusion.report.fields import shown
from heterofusion.report.intervals import Estimate, Seed, differences, estimate, mean_per_seed, natural, number
from heterofusion.report.results import MEAN, SEED, Result
from heterofusion.report.rows import cells, make_rows, shared_labels
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.flags import as_text

NAME = "name"
AT_LEAST, AT_MOST = "at_least", "at_most"
AGREES, CONTRADICTS, UNDECIDED = "agrees", "contradicts", "undecided"
_KEYS = ("text", "row", "over", "column", "spread", AT_LEAST, AT_MOST)
_TINY = 1e-9  # differences of decimal numbers are that far from the decimal that was meant

Selector = Mapping[str, str]


@dataclass(frozen=True)
class Claim:
    """One claim.

    Attributes:
        text: the claim in words.
        row: selects the results whose score is meant; None for a spread.
        over: selects the results whose score is subtracted; None compares the score itself.
        spread: selects the rows whose largest less smallest score is meant; None for a score or difference.
        column: a data set, or `mean`.
        bound: `at_least` or `at_most`.
        threshold: what the score, difference or spread is held against.
        where: names the claim in messages.
    """

    text: str
    row: Selector | None
    over: Selector | None
    spread: Selector | None
    column: str
    bound: str
    threshold: float
    where: str


@dataclass(frozen=True)
class Finding:
    """A claim and what the results show of it.

    Attributes:
        claim: the claim.
        verdict: agrees, contradicts, or undecided.
        measured: the score, difference or spread over seeds; None if the results do not allow it.
        reason: why it is undecided, or what was left out; may be empty.
    """

    claim: Claim
    verdict: str
    measured: Estimate | None
    reason: str


class _NotComparableError(UserError):
    """Results that have no common ground yet, such as data sets that are still missing."""


def read_claims(path: str | Path) -> list[Claim]:
    """Read claims from a YAML list.

    Args:
        path: the file. Each entry has `text`, one of `at_least` and `at_most`, and either `row`, with or without
            `over`, or `spread`; `column` is a data set, or the mean if it is left out. `row`, `over` and `spread` are
            mappings of `name` and labels to values.

    Raises:
        ValueError: it cannot be read, or an entry is not of this form; names file, entry and key.
    """
    path = Path(path).expanduser().absolute()
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--claims {path} cannot be read as YAML: {error}") from error
    if not isinstance(content, list) or not content:
        raise UserError(f"--claims {path} holds {shown(content)}; a list of claims was expected")
    return [_parse(entry, f"--claims {path}, claim {index}") for index, entry in enumerate(content, start=1)]


def _parse(entry: Any, where: str) -> Claim:
    if not isinstance(entry, dict):
        raise UserError(f"{where} is {shown(entry)}; a mapping with text, row and at_least was expected")
    unknown = [str(key) for key in entry if key not in _KEYS]
    if unknown:
        raise UserError(f"{where} has the unknown key {unknown[0]!r}; choose from {', '.join(_KEYS)}")
    text = entry.get("text")
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where} has {shown(text)} as text; say in words what is claimed")
    bounds = [bound for bound in (AT_LEAST, AT_MOST) if bound in entry]
    if len(bounds) != 1:
        raise UserError(f"{where} needs one of {AT_LEAST} and {AT_MOST}, and has {len(bounds)} of them")
    threshold = number(entry[bounds[0]])
    if threshold is None:
        raise UserError(f"{where} has {shown(entry[bounds[0]])} as {bounds[0]}; a number was expected")
    if ("row" in entry) == ("spread" in entry):
        raise UserError(f"{where} needs one of row and spread, and has {'both' if 'row' in entry else 'neither'}")
    if "over" in entry and "spread" in entry:
        raise UserError(f"{where} has spread and over; a spread is compared with nothing, take over away")
    column = entry.get("column", MEAN)
    if not isinstance(column, str):
        raise UserError(f"{where} has {shown(column)} as column; name a data set, or {MEAN}")
    selectors = {key: _selector(entry[key], f"{where}, {key}") for key in ("row", "over", "spread") if key in entry}
    return Claim(
        text=" ".join(text.split()),
        row=selectors.get("row"),
        over=selectors.get("over"),
        spread=selectors.get("spread"),
        column=column,
        bound=bounds[0],
        threshold=threshold,
        where=where,
    )


def _selector(value: Any, where: str) -> dict[str, str]:
    if not isinstance(value, dict) or not value:
        raise UserError(f"{where} is {shown(value)}; a mapping of name and labels to values was expected")
    for key, wanted in value.items():
        if key == SEED:
            raise UserError(f"{where} selects a {SEED}; claims are about all seeds, take it away")
        if isinstance(wanted, dict | list) or wanted is None:
            raise UserError(f"{where} has {shown(wanted)} as {key}; one value was expected")
    return {str(key): as_text(wanted) for key, wanted in value.items()}


def select(results: Sequence[Result], selector: Selector) -> list[Result]:
    """Results whose name, labels and settings are those of a selector; numbers are compared as numbers."""
    return [
        result
        for result in results
        if all(
            _same(result.name if key == NAME else result.attributes.get(key), wanted)
            for key, wanted in selector.items()
        )
    ]


def _same(found: str | None, wanted: str) -> bool:
    if found is None:
        return False
    numbers = number(found), number(wanted)
    return found == wanted if None in numbers else numbers[0] == numbers[1]


def judge(claim: Claim, results: Sequence[Result]) -> Finding:
    """Hold a claim against results.

    Scores of several rows are averaged per seed; a difference is paired by seed and by the labels that both sides
    have, but those that a selector names; a spread is largest less smallest row of each seed.

    Args:
        claim: the claim.
        results: all results.

    Returns:
        The finding. It is undecided where the interval holds the threshold, with one seed, and where results are
        missing.

    Raises:
        ValueError: a selector matches nothing, the column is unknown, or the sides differ in a label that no selector
            names; names claim and selector.
    """
    try:
        values, dropped, missing = _values(claim, results)
    except _NotComparableError as nothing:
        return Finding(claim, UNDECIDED, None, str(nothing))
    measured = estimate(values.values())
    if measured is None:
        return Finding(claim, UNDECIDED, None, "no seed has all of the results that are compared")
    note = f"seed {', '.join(dropped)} lacks some of the results and is left out" if dropped else missing
    holds = _holds(claim, measured.mean)
    if measured.interval is None:
        verdict = UNDECIDED
        count = "one seed" if None not in values else "no seeds"
        note = f"{count}: {AGREES if holds else CONTRADICTS} by the point value" + (f"; {note}" if note else "")
    elif all(_holds(claim, end) for end in measured.interval):
        verdict = AGREES
    elif not any(_holds(claim, end) for end in measured.interval):
        verdict = CONTRADICTS
    else:
        verdict = UNDECIDED
        note = "the interval contains the threshold" + (f"; {note}" if note else "")
    return Finding(claim, verdict, measured, note)


def _holds(claim: Claim, value: float) -> bool:
    return value >= claim.threshold - _TINY if claim.bound == AT_LEAST else value <= claim.threshold + _TINY


def _values(claim: Claim, results: Sequence[Result]) -> tuple[dict[Seed, float], list[str], str]:
    """The claim's quantity by seed, the seeds that were left out, and a note on results that were left out."""
    if claim.spread is not None:
        (members,), note = _comparable(claim, _selected(claim, "spread", results))
        return *_spreads(claim, members), note
    ours = _selected(claim, "row", results)
    if claim.over is None:
        (ours,), note = _comparable(claim, ours)
        return *mean_per_seed(_by_row(claim, ours)), note
    (ours, theirs), note = _comparable(claim, ours, _selected(claim, "over", results))
    keys = shared_labels(ours, theirs, (*(claim.row or ()), *claim.over))
    for key in keys:
        values = [{result.labels[key] for result in side} for side in (ours, theirs)]
        if not values[0] & values[1]:
            raise UserError(
                f"{claim.where}: row and over have no value of the label {key!r} in common "
                f"({', '.join(sorted(values[0], key=natural))} and {', '.join(sorted(values[1], key=natural))}); name "
                f"{key} in both selectors"
            )
    pairs = differences(cells(ours, keys, claim.column), cells(theirs, keys, claim.column))
    if not pairs:
        raise _NotComparableError(f"no results of both sides agree in {', '.join([*keys, SEED])}")
    return *mean_per_seed(pairs), note


def _spreads(claim: Claim, members: Sequence[Result]) -> tuple[dict[Seed, float], list[str]]:
    rows = _by_row(claim, members)
    if len(rows) < 2:
        raise UserError(f"{claim.where}: spread matches one row only; select two or more")
    means, dropped = mean_per_seed(rows)
    spreads: dict[Seed, float] = {}
    for seed in means:
        values = [row[seed if seed in row else None] for row in rows.values()]
        spreads[seed] = max(values) - min(values)
    return spreads, dropped


def _by_row(claim: Claim, members: Sequence[Result]) -> dict[tuple[str, ...], dict[Seed, float]]:
    """Scores by row and seed."""
    return {(str(index),): cells(row.results, (), claim.column)[()] for index, row in enumerate(make_rows(members))}


def _selected(claim: Claim, key: str, results: Sequence[Result]) -> list[Result]:
    selector = getattr(claim, key)
    found = select(results, selector)
    if not found:
        wanted = ", ".join(f"{name}: {value}" for name, value in selector.items())
        raise UserError(f"{claim.where}: {key} {{{wanted}}} matches no result; correct it, or take the claim away")
    return found


def _comparable(claim: Claim, *sides: list[Result]) -> tuple[list[list[Result]], str]:
    """The results of each side that have the column, or all data sets that the mean is over; and a note on the rest.

    Raises:
        ValueError: no result has the column; names the claim.
        _NotComparableError: nothing is left of a side.
    """
    known = {name for side in sides for result in side for name in result.datasets}
    wanted = known if claim.column == MEAN else {claim.column}
    if not wanted <= known:
        raise UserError(
            f"{claim.where}: column {claim.column!r} is no data set of the results; choose from {MEAN}, "
            f"{', '.join(sorted(known))}"
        )
    notes = {
        result.origin: f"{result.origin} lacks {', '.join(sorted(wanted - result.datasets.keys()))} and is left out"
        for side in sides
        for result in side
        if not wanted <= result.datasets.keys()
    }
    kept = [[result for result in side if wanted <= result.datasets.keys()] for side in sides]
    if not all(kept):
        raise _NotComparableError("; ".join(notes.values()))
    return kept, "; ".join(notes.values())
