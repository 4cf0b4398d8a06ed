"""The picture of a comparison over its cases: mean scores as lines, with their intervals."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from heterofusion.report.comparison_record import ComparisonRow, ComparisonTable
from heterofusion.report.style import MAX_WIDTH, picture, short_names, stroke, tidy, wrap

MOST_LINES, MOST_FLAT_LINES, FEWEST_CASES = 8, 2, 3
_SPREAD = 0.36  # of the way between two cases: the bars of all lines stand side by side
_MAIN = {"color": "black", "linewidth": 2.0, "linestyle": "-", "markersize": 5.5, "zorder": 4}
_FLAT = {"color": "0.6", "linewidth": 1.0, "zorder": 1}
_FLAT_LINES = ((0, (9, 3)), (0, (2, 4)))


@dataclass(frozen=True)
class CaseLine:
    """A line of the picture.

    Attributes:
        name: of the method.
        rows: its rows by place of the case; one row at all places if nothing of a case enters it.
        is_flat: whether nothing of a case enters it.
        is_main: whether gains are asked for of it.
    """

    name: str
    rows: dict[int, ComparisonRow]
    is_flat: bool
    is_main: bool


def case_lines(table: ComparisonTable) -> list[CaseLine]:
    """The methods that are drawn: those in three cases or more, and two that no case changes.

    Where there are more than eight, those that gains are of come first, then those that gains are over, and controls
    last. The two are that of `normalize_by` and the best of the other groups.
    """
    main = {gain.row for gain in table.gains}
    over = {name for gain in table.gains for name in gain.over}
    names = list(table.names)
    rows: dict[str, dict[int, ComparisonRow]] = {name: {} for name in names}
    flat: dict[str, list[ComparisonRow]] = {}
    for row in table.rows:
        if row.case is None:
            flat.setdefault(row.group, []).append(row)
        else:
            rows[row.name][table.cases.index(row.case)] = row
    varied = [name for name in names if len(rows[name]) >= FEWEST_CASES]
    varied.sort(key=lambda name: (name not in main, next(iter(rows[name].values())).is_control, name not in over))
    lines = [CaseLine(name, dict(sorted(rows[name].items())), False, name in main) for name in varied]
    if not lines or len(table.cases) < FEWEST_CASES:
        return []
    normal = table.content.get("normalize_by")
    best = [max(group, key=lambda row: (row.name == normal, row.estimate().mean)) for group in flat.values()]
    best.sort(key=lambda row: (row.name != normal, -row.estimate().mean))
    everywhere = range(len(table.cases))
    flat_lines = [CaseLine(row.name, dict.fromkeys(everywhere, row), True, row.name in main) for row in best]
    return lines[:MOST_LINES] + flat_lines[:MOST_FLAT_LINES]


def draw_cases(lines: Sequence[CaseLine], cases: Sequence[str], path: Path | None, unit: str) -> Any:
    """Mean score over the cases, a line with interval bars per method.

    Args:
        lines: the methods.
        cases: names of the cases, in order.
        path: PNG file; None draws without saving.
        unit: name of the score, for the axis.

    Returns:
        The figure.
    """
    slot = min(1.5, max(0.75, 6.0 / len(cases)))  # inches of a case
    # as they end, so that the legend reads as the right end of the picture does
    lines = sorted(lines, key=lambda line: -list(line.rows.values())[-1].estimate().mean)
    styles = _styles(lines)
    varied = [line.name for line in lines if not line.is_flat]
    shifts = np.linspace(-_SPREAD / 2, _SPREAD / 2, len(varied)) if len(varied) > 1 else [0.0]
    shift = dict(zip(varied, shifts, strict=True))
    names = short_names([line.name for line in lines], 44)
    width = 1.5 + slot * len(cases) + 0.075 * max(map(len, names))
    with picture(path, min(MAX_WIDTH, width), 4.0) as figure:
        axes = figure.subplots()
        handles = []
        for line in lines:
            found, style = {place: row.estimate() for place, row in line.rows.items()}, styles[line.name]
            if line.is_flat:
                mean = found[0].mean
                handles.append(axes.plot([-0.45, len(cases) - 0.55], [mean, mean], **style)[0])
                continue
            places, means = [place + shift[line.name] for place in found], [each.mean for each in found.values()]
            halves = [each.half_width or 0.0 for each in found.values()]
            axes.errorbar(places, means, halves, fmt="none", ecolor=style["color"], linewidth=0.8, capsize=2, zorder=2)
            handles.append(axes.plot(places, means, **{"zorder": 3, **style})[0])
        _limits(axes, lines)
        axes.set_xticks(range(len(cases)), [wrap(case, max(8, int(slot * 12))) for case in cases])
        axes.tick_params(axis="x", length=0)
        axes.set_xlim(-0.5, len(cases) - 0.5)
        axes.grid(axis="y", color="0.88", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set_ylabel(unit)
        tidy(axes)
        figure.legend(handles, names, loc="outside right center", handlelength=3.4, labelspacing=0.7)
    return figure


def _styles(lines: Sequence[CaseLine]) -> dict[str, dict[str, Any]]:
    """How each line is drawn, by name of the method: what gains are asked for of stands out."""
    main = [line.name for line in lines if line.is_main and not line.is_flat]
    others = [line.name for line in lines if not line.is_main and not line.is_flat]
    flat = [line.name for line in lines if line.is_flat]
    styles = {name: stroke(index, 1) | _MAIN for index, name in enumerate(main)}
    styles |= {name: stroke(len(main) + index, MOST_LINES) for index, name in enumerate(others)}
    return styles | {name: _FLAT | {"linestyle": _FLAT_LINES[index]} for index, name in enumerate(flat)}


def _limits(axes: Any, lines: Sequence[CaseLine]) -> None:
    """All means and their bars, but no bar beyond what a score can be: intervals of two seeds are wide."""
    found = [row.estimate() for line in lines for row in line.rows.values()]
    low = min(each.mean - (each.half_width or 0) for each in found)
    high = max(each.mean + (each.half_width or 0) for each in found)
    low = max(low, min(0.0, *(each.mean for each in found)))
    high = min(high, max(1.0, *(each.mean for each in found)))
    margin = 0.03 * (high - low) or 0.05
    axes.set_ylim(low - margin, high + margin)
