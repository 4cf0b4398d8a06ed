"""The pictures of a comparison: lines over its cases, and mean scores of all methods with their intervals."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from heterofusion.report.comparison_curves import case_lines, draw_cases
from heterofusion.report.comparison_record import ComparisonTable
from heterofusion.report.style import picture, shorten, tidy

_ROW = 0.235  # inches of a method
_END = 1.08  # of the axis; intervals of two seeds may be wider


@dataclass(frozen=True)
class Drawing:
    """A picture that is to be drawn.

    Attributes:
        title: what it shows.
        draw: draws it to a file.
        case: the case that it is of; None if it is of the whole comparison.
    """

    title: str
    draw: Callable[[Path], Any]
    case: str | None = None


def comparison_drawings(table: ComparisonTable, unit: str) -> list[Drawing]:
    """The pictures of a comparison.

    Without cases there is one of all methods. With cases there is one of the methods that are in many of them, and one
    for each case in which a method stands that the first does not show, such as a control.

    Args:
        table: the comparison.
        unit: name of the score, for the axes.
    """
    title = f"{unit[:1].upper()}{unit[1:]} of each method: seeds, mean and 95% interval"
    everything = [Drawing(title, partial(draw_comparison, table, unit=unit))]
    if not table.cases:
        return everything
    drawings, lines = [], case_lines(table)
    if lines:
        told = f"{unit[:1].upper()}{unit[1:]} over the cases, mean and 95% interval"
        if any(line.is_flat for line in lines):
            told += "; without marks: methods that no case changes"
        drawings.append(Drawing(told, partial(draw_cases, lines, table.cases, unit=unit)))
    shown = {line.name for line in lines}
    for case in table.cases:
        if any(row.case == case and row.name not in shown for row in table.rows):
            draw = partial(draw_comparison, table.of_case(case), unit=f"{unit}, {case}")
            drawings.append(Drawing(f"{title}, {case}", draw, case))
    return drawings or everything  # nothing of a case enters any method


def draw_comparison(table: ComparisonTable, path: Path | None, unit: str) -> Any:
    """A stroke per seed, a bar for the 95% interval and a mark at the mean, one line per method.

    Args:
        table: the comparison, or one of its cases.
        path: PNG file; None draws without saving.
        unit: name of the score, for the axis.

    Returns:
        The figure.
    """
    lines: list[tuple[str, Any]] = []
    group = None
    for row in table.rows:
        if row.group and row.group != group:
            group = row.group
            lines.append((group, None))
        lines.append((row.name, row))
    with picture(path, 7.5, 0.8 + _ROW * len(lines)) as figure:
        axes = figure.subplots()
        for place, (name, row) in enumerate(lines):
            if row is None:
                axes.annotate(
                    name, (0, place), (2, -3), xycoords=("axes fraction", "data"), textcoords="offset points",
                    va="center", fontsize=8, fontweight="bold", backgroundcolor="white",
                )  # fmt: skip
                continue
            found = row.estimate()
            axes.plot(list(row.means.values()), [place] * len(row.means), "|", color="0.55", markersize=7)
            if found.half_width:
                axes.errorbar(found.mean, place, xerr=found.half_width, color="black", linewidth=1.0, capsize=2.5)
            face = "white" if row.is_control else "black"
            axes.plot(found.mean, place, "o", color="black", markerfacecolor=face, markersize=5)
            right = min(found.mean + (found.half_width or 0), _END)
            axes.annotate(
                f"{found.mean:.3f}", (max(right, found.mean), place), (5, 0), textcoords="offset points", va="center",
                fontsize=7,
            )  # fmt: skip
        places = {place: shorten(name, 44) for place, (name, row) in enumerate(lines) if row is not None}
        axes.set_yticks(list(places), list(places.values()))
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(lines) - 0.4, -0.6)
        low = min(0.0, *(min(row.means.values()) for row in table.rows))
        axes.set_xlim(low - 0.01, _END)
        axes.grid(axis="x", color="0.88", linewidth=0.6)
        axes.set_axisbelow(True)
        if any(row.is_control for row in table.rows):
            unit = f"{unit}; hollow: controls, without the real sources"
        axes.set_xlabel(unit)
        tidy(axes)
        axes.spines["left"].set_visible(False)  # headings would cut it
    return figure
