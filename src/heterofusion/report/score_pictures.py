"""Pictures of scores: bars per task, a map for many rows, and curves over a setting."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from heterofusion.report.intervals import Estimate
from heterofusion.report.sensitivity import Curve
from heterofusion.report.style import (
    MAX_WIDTH,
    fill,
    picture,
    require_matplotlib,
    short_names,
    shorten,
    stroke,
    tidy,
    wrap,
)

_BAR = 0.24  # inches of a bar that has its value above it
_INCH = 12.5  # characters of a tick label per inch


def draw_scores(
    scores: Mapping[str, Mapping[str, float]],
    tasks: Sequence[str],
    path: Path | None,
    unit: str,
    half_widths: Mapping[str, Mapping[str, float | None]] | None = None,
) -> Any:
    """Bars of one score per task, grouped by task; long rows of tasks go on in a panel below.

    Args:
        scores: score by method and task, 0 to 1. What is missing has no bar.
        tasks: tasks in order.
        path: PNG file; None draws without saving.
        unit: name of the score, for the axis.
        half_widths: half the width of the interval by method and task, drawn as error bars where there is one.

    Returns:
        The figure.
    """
    methods = list(scores)
    slot = max(1.15, _BAR * len(methods) + 0.25)  # inches per task
    slot = min(slot, MAX_WIDTH - 0.8)
    per_panel = max(1, min(len(tasks), int((MAX_WIDTH - 0.8) / slot)))
    panels = math.ceil(len(tasks) / per_panel)
    per_panel = math.ceil(len(tasks) / panels)  # panels of about the same length
    width = max(4.2, 0.8 + slot * per_panel)
    names = short_names(methods, 48)
    columns = max(1, min(len(methods), int(width / (0.6 + 0.072 * max(map(len, names))))))
    height = 0.35 + 0.19 * math.ceil(len(methods) / columns) + 2.5 * panels
    finite = [v for row in scores.values() for v in row.values() if v is not None and math.isfinite(v)]
    bottom = min([0.0, *finite])
    with picture(path, width, height) as figure:
        grid = figure.subplots(panels, 1, squeeze=False, sharey=True)[:, 0]
        for panel, axes in enumerate(grid):
            shown = list(tasks[panel * per_panel : (panel + 1) * per_panel])
            _bars(axes, scores, shown, half_widths or {}, (width - 0.8) / per_panel)
            axes.set_xticks(range(len(shown)), [wrap(task, int(slot * _INCH)) for task in shown])
            axes.tick_params(axis="x", length=0)
            axes.set_xlim(-0.5, per_panel - 0.5)
            axes.set_ylim(1.08 * bottom, 1.2)  # with room for a value above a bar of 1
            axes.set_yticks([tick for tick in (-1, -0.5, 0, 0.2, 0.4, 0.6, 0.8, 1.0) if tick >= 1.08 * bottom])
            axes.axhline(0, color="black", linewidth=0.7)
            axes.set_ylabel(unit)
            tidy(axes)
        handles = [_patch(index) for index in range(len(methods))]
        figure.legend(handles, names, loc="outside upper center", ncols=columns, handlelength=2.2, handleheight=1.1)
    return figure


def _patch(index: int) -> Any:
    from matplotlib.patches import Patch

    return Patch(**fill(index))


def _bars(
    axes: Any,
    scores: Mapping[str, Mapping[str, float]],
    tasks: Sequence[str],
    half_widths: Mapping[str, Mapping[str, float | None]],
    slot: float,
) -> None:
    """Bars of some tasks in slots of so many inches, with error bars and values above them."""
    width = min(0.86 / len(scores), 0.55 / slot)
    across = width * slot > 0.3  # inches that a value needs
    for index, (method, row) in enumerate(scores.items()):
        for place, task in enumerate(tasks):
            value = row.get(task)
            x = place + (index - (len(scores) - 1) / 2) * width
            if value is None or not math.isfinite(value):
                axes.annotate(
                    "\u2013", (x, 0), (0, 1), textcoords="offset points", ha="center", va="bottom", fontsize=7
                )
                continue
            axes.bar(x, value, width, **fill(index))
            error = half_widths.get(method, {}).get(task) or 0.0
            if error:
                # black on white, so that it is seen on any fill
                axes.errorbar(x, value, error, color="white", linewidth=2.4, capsize=0)
                axes.errorbar(x, value, error, color="black", linewidth=0.8, capsize=2)
            axes.annotate(
                f"{value:.2f}", (x, max(value + error, 0)), (0, 1.5), textcoords="offset points", ha="center",
                va="bottom", fontsize=6.5, rotation=0 if across else 90,
            )  # fmt: skip


def draw_score_map(
    scores: Mapping[str, Mapping[str, float]], tasks: Sequence[str], path: Path | None, unit: str
) -> Any:
    """Scores as a grey map with numbers, for more rows than bars can show.

    Args:
        scores: score by method and task.
        tasks: tasks in order.
        path: PNG file; None draws without saving.
        unit: name of the score.

    Returns:
        The figure.
    """
    names = [shorten(name, 60) for name in scores]
    values = np.array([[row.get(task, np.nan) for task in tasks] for row in scores.values()], dtype=float)
    slot = max(0.5, min(1.0, (MAX_WIDTH - 5.3) / len(tasks)))
    width = 0.7 + 0.075 * max(map(len, names)) + slot * len(tasks)
    with picture(path, min(MAX_WIDTH, max(4.2, width)), 0.9 + 0.2 * len(names)) as figure:
        axes = figure.subplots()
        masked = np.ma.masked_invalid(values)
        axes.pcolormesh(masked, cmap="Greys", vmin=0, vmax=1.25, edgecolors="white", linewidth=0.6)
        axes.patch.set(hatch="//////", edgecolor="0.6", facecolor="white")
        for row, column in zip(*np.nonzero(np.isfinite(values)), strict=True):
            value = values[row, column]
            axes.text(
                column + 0.5, row + 0.5, f"{value:.2f}", ha="center", va="center", fontsize=7,
                color="white" if value > 0.65 else "black",
            )  # fmt: skip
        axes.invert_yaxis()
        axes.set_xticks(np.arange(len(tasks)) + 0.5, [wrap(task, max(6, int(slot * _INCH))) for task in tasks])
        axes.set_yticks(np.arange(len(names)) + 0.5, names)
        axes.tick_params(length=0)
        missing = "" if np.isfinite(values).all() else " (hatched: missing)"
        axes.set_title(f"{unit}{missing}", loc="left")
    return figure


def draw_curve(curve: Curve, path: Path | None, unit: str) -> Any:
    """Score against a setting: the mean with its interval in black, each task as a thin grey line.

    Args:
        curve: the points.
        path: PNG file; None draws without saving.
        unit: name of the score, for the axis.

    Returns:
        The figure.
    """
    across = 2 if len(curve.series) == 4 else min(3, len(curve.series))
    down = math.ceil(len(curve.series) / across)
    with picture(path, min(MAX_WIDTH, 2.3 + 3.1 * across), 0.3 + 2.7 * down) as figure:
        grid = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True).flat
        tasks = list(dict.fromkeys(task for lines in curve.series.values() for task in lines.tasks))
        handles: dict[str, Any] = {}
        for axes, (name, lines) in zip(grid, curve.series.items(), strict=False):
            for task, points in lines.tasks.items():
                index = tasks.index(task)
                style = stroke(index + 1, len(tasks) + 1) | {"color": "0.55", "linewidth": 0.7, "markersize": 3.5}
                (line,) = axes.plot(*_xy(points), **style)
                handles.setdefault(task, line)
            x, y = _xy(lines.mean)
            errors = [points.half_width or 0.0 for _, points in lines.mean]
            if x:
                axes.fill_between(x, np.subtract(y, errors), np.add(y, errors), color="0.85", linewidth=0, zorder=1)
                (line,) = axes.plot(x, y, color="black", marker="o", markersize=4.5, linewidth=1.8, zorder=4)
                handles = {"mean": line, **handles}
            _default_line(axes, curve)
            if len(curve.series) > 1:
                axes.set_title(wrap(name, 40), fontsize=8, loc="left", pad=14 if curve.default is not None else 6)
            if curve.logarithmic:
                _log_axis(axes, curve)
            axes.label_outer()
            tidy(axes)
        used = list(figure.axes)[: len(curve.series)]
        for axes in list(figure.axes)[len(curve.series) :]:
            axes.set_visible(False)
        for axes in used[-across:]:
            axes.tick_params(labelbottom=True)
            axes.set_xlabel(curve.title)
        for axes in used[::across]:
            axes.set_ylabel(unit)
        labels = short_names(list(handles), 22)
        figure.legend(list(handles.values()), labels, loc="outside right center", handlelength=3)
    return figure


def _log_axis(axes: Any, curve: Curve) -> None:
    """A logarithmic axis whose ticks are the values, where there are not too many."""
    values = sorted({x for lines in curve.series.values() for points in lines.tasks.values() for x, _ in points})
    axes.set_xscale("log")
    if len(values) <= 8:
        axes.set_xticks(values, [f"{value:g}" for value in values])
        axes.xaxis.set_minor_locator(require_matplotlib().ticker.NullLocator())


def _xy(points: Sequence[tuple[float, Estimate]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [found.mean for _, found in points]


def _default_line(axes: Any, curve: Curve) -> None:
    if curve.default is None:
        return
    axes.axvline(curve.default, color="black", linestyle=(0, (1, 2)), linewidth=0.9, zorder=0)
    axes.annotate(
        f"default {curve.default:g}", (curve.default, 1), (0, 2), xycoords=("data", "axes fraction"),
        textcoords="offset points", fontsize=7, ha="center", va="bottom",
    )  # fmt: skip
