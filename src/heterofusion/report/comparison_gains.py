"""Gains of a comparison: differences of two rows, paired by seed, in each case, and whether they meet a target."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from heterofusion.data.markdown import markdown_table
from heterofusion.report.comparison_record import ComparisonRow, ComparisonTable, Gain
from heterofusion.report.intervals import Estimate, differences, estimate, mean_per_seed

_ROUNDING = 1e-9  # means of the same numbers in another order differ by less


@dataclass(frozen=True)
class FoundGain:
    """What a gain came out as in one case.

    Attributes:
        gain: what was asked for.
        case: the case; None if there are no cases.
        over: the row it is over, the best of several; None if none of them, or not the row itself, is there.
        missing: rows that it names and that are not there.
        incomplete: rows that it might be over, and that have fewer seeds of `row` than the one it is over.
        estimate: mean difference; None if a row is missing or no seed is in both.
    """

    gain: Gain
    case: str | None
    over: ComparisonRow | None
    missing: Sequence[str]
    incomplete: Sequence[str]
    estimate: Estimate | None

    @property
    def sign(self) -> str | None:
        """On which side of 0 the whole interval is, `above` or `below`; None if it contains 0 or there is none."""
        interval = self.estimate.interval if self.estimate else None
        if interval is None:
            return None
        return "above" if interval[0] > _ROUNDING else "below" if interval[1] < -_ROUNDING else None

    @property
    def is_met(self) -> bool:
        """Whether the target is met: the mean reaches it, and the whole interval is above its bound.

        Without an interval (one seed), or without one of the rows that it is over or some of its seeds, it is not:
        what is missing may be the strongest of all.
        """
        found, gain = self.estimate, self.gain
        if found is None or found.interval is None or self.missing or self.incomplete:
            return False
        reached = gain.at_least is None or found.mean >= gain.at_least - _ROUNDING
        return reached and found.interval[0] > (gain.interval_above or 0) + _ROUNDING


def find_gain(table: ComparisonTable, gain: Gain, case: str | None = None) -> FoundGain:
    """A gain in a table without cases.

    Args:
        table: all of a comparison, or what `of_case` gave.
        gain: what is asked for.
        case: the case that the table is of.
    """
    row, rows = table.row(gain.row), [table.row(name) for name in gain.over]
    missing = [name for name, found in zip((gain.row, *gain.over), (row, *rows), strict=True) if found is None]
    there = [found for found in rows if found is not None]
    if row is None or not there:
        return FoundGain(gain, case, None, missing, (), None)
    pairs = [_paired(row, other, gain.dataset) for other in there]
    # the best is that of the most seeds over which `row` has the smallest gain
    over, found = max(zip(there, pairs, strict=True), key=lambda each: (len(each[1]), -sum(each[1])))
    incomplete = [other.name for other, values in zip(there, pairs, strict=True) if len(values) < len(found)]
    return FoundGain(gain, case, over, missing, incomplete, estimate(found))


def _paired(row: ComparisonRow, other: ComparisonRow, dataset: str | None) -> list[float]:
    """Row less other in each seed that both have; what depends on no seed has all of the other side's."""
    cells = differences({(): row.by_seed(dataset)}, {(): other.by_seed(dataset)})
    return list(mean_per_seed(cells)[0].values())


def find_gains(table: ComparisonTable) -> Iterator[FoundGain]:
    """All gains, each in all its cases.

    A gain that does not name its cases is left out where its rows are not compared, unless that is so in all cases.
    """
    for gain in table.gains:
        if not table.cases:
            yield find_gain(table, gain)
            continue
        asked = table.cases if gain.cases is None else [case for case in table.cases if case in gain.cases]
        found = [find_gain(table.of_case(case), gain, case) for case in asked]
        there = [each for each in found if each.estimate is not None]
        yield from there if there and gain.cases is None else found


def gain_sentences(table: ComparisonTable) -> list[str]:
    """What each gain came out as, whatever it is, with its case in front if there are cases."""
    return [gain_sentence(found) for found in find_gains(table)]


def gain_sentence(found: FoundGain, with_case: bool = True) -> str:
    """What a gain came out as, and whether it meets its target.

    Args:
        found: the gain.
        with_case: whether its case stands in front.
    """
    told = (f"{found.case}: " if found.case is not None and with_case else "") + gain_title(found.gain)
    if found.estimate is None:
        if found.over is None or found.gain.row in found.missing:
            names = found.missing
            return f"{told}: {_listed(names)} {'are' if len(names) > 1 else 'is'} missing."
        return f"{told}: {found.gain.row} and {found.over.name} have no seed in common."
    if len(found.gain.over) > 1 and found.over is not None:
        without = f"; {_listed(found.missing)} not compared" if found.missing else ""
        without += f"; {_listed(found.incomplete)} without some of its seeds" if found.incomplete else ""
        best = found.over.estimate(found.gain.dataset).text()
        told += f", which is {found.over.name} ({best}{without}),"
    contained = "the 95% interval contains 0: undecided"
    verdict = f"the whole 95% interval is {found.sign} 0" if found.sign else contained
    if found.estimate.interval is None:
        verdict = "one seed: undecided"
    told += f" = **{found.estimate.text(signed=True)}** (n = {len(found.estimate.values)}; {verdict})"
    if found.gain.has_target:
        told += f"; target: {found.gain.target}: **{'met' if found.is_met else 'not met'}**"
    return f"{told}."


def gain_table(table: ComparisonTable) -> str | None:
    """Markdown table of the gains of a comparison with cases: a row each, a column per case; None without gains."""
    cells = {(found.gain, found.case): _cell(found) for found in find_gains(table)}
    rows = [[gain_title(gain), *(cells.get((gain, case)) for case in table.cases)] for gain in table.gains]
    targets = [gain.target if gain.has_target else None for gain in table.gains]
    header = ["", *table.cases]
    if any(targets):
        header.append("target")
        rows = [[*row, target] for row, target in zip(rows, targets, strict=True)]
    return markdown_table(header, rows) if rows else None


def gain_title(gain: Gain) -> str:
    """Its name, and the difference that it is."""
    over = gain.over[0] if len(gain.over) == 1 else f"best of ({'; '.join(gain.over)})"
    return f"**{gain.name}** = {gain.row} - {over}" + (f", on {gain.dataset}" if gain.dataset else "")


def _cell(found: FoundGain) -> str:
    """A gain in a case: value, what it is over if that was chosen, on which side of 0 it is, and the target."""
    if found.estimate is None:
        return "missing"
    told = [f"over {found.over.name}"] if found.over is not None and len(found.gain.over) > 1 else []
    told.append("one seed" if found.estimate.interval is None else f"{found.sign} 0" if found.sign else "undecided")
    if found.missing:
        told.append(f"without {_listed(found.missing)}")
    if found.incomplete:
        told.append(f"{_listed(found.incomplete)} without some seeds")
    if found.gain.has_target:
        told.append("**met**" if found.is_met else "**not met**")
    return f"{found.estimate.text(signed=True)} ({'; '.join(told)})"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:-1]) + f" and {names[-1]}" if len(names) > 1 else names[0]
