"""The picture of a comparison: mean scores of all methods with their intervals, in groups."""

from pathlib import Path
from typing import Any

from heterofusion.report.comparison import ComparisonTable
from heterofusion.report.style import picture, shorten, tidy

_ROW = 0.235  # inches of a method


def draw_comparison(table: ComparisonTable, path: Path | None, unit: str) -> Any:
    """A dot per seed, a bar for the 95% interval and a mark at the mean, one line per method.

    Args:
        table: the comparison.
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
            found, control = row.estimate(), bool(row.content.get("source_control"))
            axes.plot(list(row.means.values()), [place] * len(row.means), "|", color="0.55", markersize=7)
            if found.half_width:
                axes.errorbar(found.mean, place, xerr=found.half_width, color="black", linewidth=1.0, capsize=2.5)
            face = "white" if control else "black"
            axes.plot(found.mean, place, "o", color="black", markerfacecolor=face, markersize=5)
            right = found.mean + (found.half_width or 0)
            axes.annotate(
                f"{found.mean:.3f}", (max(right, found.mean), place), (5, 0), textcoords="offset points", va="center",
                fontsize=7,
            )  # fmt: skip
        places = {place: shorten(name, 44) for place, (name, row) in enumerate(lines) if row is not None}
        axes.set_yticks(list(places), list(places.values()))
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(lines) - 0.4, -0.6)
        low = min(0.0, *(min(row.means.values()) for row in table.rows))
        axes.set_xlim(low - 0.01, 1.08)
        axes.grid(axis="x", color="0.88", linewidth=0.6)
        axes.set_axisbelow(True)
        if any(row.content.get("source_control") for row in table.rows):
            unit = f"{unit}; hollow: controls, without the real sources"
        axes.set_xlabel(unit)
        tidy(axes)
    return figure
