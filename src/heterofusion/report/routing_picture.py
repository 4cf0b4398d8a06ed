"""Picture of a routing: every model's score on every task, with a frame where a source labels the task."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from heterofusion.report.score_pictures import draw_score_map
from heterofusion.report.style import DPI, require_matplotlib


def draw_routing(
    scores: Mapping[str, Mapping[str, float]],
    chosen: Mapping[str, Sequence[str]],
    tasks: Sequence[str],
    path: Path | None,
    control: str | None = None,
) -> Any:
    """Scores on the replay as a grey map; framed are those of the models that label the task.

    Args:
        scores: score by model (the anchor first) and task, 0 to 1. Tasks that a map routes have none.
        chosen: the models that label each task.
        tasks: tasks in order.
        path: PNG file; None draws without saving.
        control: kind of the control that the labels are of; the title says so.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed; says how to install it.
    """
    require_matplotlib()
    title = "score on the replay; framed: labels the task"
    figure = draw_score_map(scores, tasks, None, title if control is None else f"CONTROL ({control}): {title}")
    axes = figure.axes[0]
    axes.set_title(axes.get_title(loc="left").replace("missing", "not measured"), loc="left")
    for row, column in framed_cells(scores, chosen, tasks):
        value = [*scores.values()][row].get(tasks[column], math.nan)
        _mark(axes, row, column, value, "map" if control is None else "control")
    if path is not None:
        figure.savefig(path, dpi=DPI, metadata={"Software": None})
    return figure


def framed_cells(
    scores: Mapping[str, Mapping[str, float]], chosen: Mapping[str, Sequence[str]], tasks: Sequence[str]
) -> np.ndarray:
    """Row and column of the cells of models that label a task. (cells, 2)

    Args:
        scores: by model and task; its order is that of the rows.
        chosen: the models that label each task.
        tasks: tasks in order of the columns.
    """
    matrix = np.array([[name in chosen.get(task, ()) for task in tasks] for name in scores], dtype=bool)
    return np.argwhere(matrix)


def _mark(axes: Any, row: int, column: int, value: float, unknown: str) -> None:
    # black on white in a frame, over what the map wrote there, so that it is seen on any grey
    axes.text(
        column + 0.5, row + 0.5, f"{value:.2f}" if math.isfinite(value) else unknown, ha="center", va="center",
        fontsize=7, fontweight="bold", zorder=5, bbox={"facecolor": "white", "edgecolor": "black", "pad": 1.6},
    )  # fmt: skip
