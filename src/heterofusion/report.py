"""Tables and pictures of results: readable in black and white, axes with units."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_HATCHES = ("", "///", "...", "xxx", "\\\\\\", "ooo")
_GREYS = ("0.25", "0.55", "0.80", "0.95", "0.40", "0.70")


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise ImportError("pictures need matplotlib: pip install 'heterofusion[report]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; floats get three decimals, None a dash."""

    def cell(value: Any) -> str:
        if value is None:
            return "-"
        return f"{value:.3f}" if isinstance(value, float) else str(value)

    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(map(cell, row)) + " |" for row in rows])


def score_table(scores: Mapping[str, Mapping[str, float]], tasks: Sequence[str]) -> str:
    """Markdown table of one score per task and the mean over the tasks, one row per method."""
    rows = []
    for name, row in scores.items():
        values = [row.get(task) for task in tasks]
        known = [value for value in values if value is not None]
        rows.append([name, *values, sum(known) / len(known) if known else None])
    return markdown_table(["", *tasks, "mean"], rows)


def draw_scores(scores: Mapping[str, Mapping[str, float]], tasks: Sequence[str], path: Path, unit: str) -> None:
    """Bars of one score per task, grouped by task.

    Args:
        scores: score by method and task, 0 to 1.
        tasks: tasks in order.
        path: PNG file.
        unit: name of the score, for the axis.
    """
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(1.5 * len(tasks) + 2, 4), layout="constrained")
    width = 0.8 / len(scores)
    for index, (name, row) in enumerate(scores.items()):
        places = [position + (index - (len(scores) - 1) / 2) * width for position in range(len(tasks))]
        style = {"color": _GREYS[index % len(_GREYS)], "hatch": _HATCHES[index % len(_HATCHES)]}
        bars = axes.bar(
            places,
            [row.get(task, 0.0) for task in tasks],
            width,
            label=name,
            edgecolor="black",
            linewidth=0.6,
            **style,
        )
        axes.bar_label(bars, [f"{row[task]:.2f}" if task in row else "" for task in tasks], fontsize=7, padding=1)
    axes.set_xticks(range(len(tasks)), tasks)
    axes.set_ylim(0, 1.05)
    axes.set_ylabel(unit)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=min(4, len(scores)), frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def draw_training(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Training curves from Trainer's log history: LM loss, RDM, and size of the update.

    Args:
        history: `trainer.state.log_history`, or the same list from `trainer_state.json`.
        path: PNG file.
    """
    pyplot = _pyplot()
    entries = [entry for entry in history if "lm_loss" in entry]
    steps = [entry["step"] for entry in entries]
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    left.plot(steps, [entry["lm_loss"] for entry in entries], color="black", marker="o", markersize=3)
    left.set_ylabel("LM loss (nats per label token)")
    rdm = [(entry["step"], entry["rdm_loss"]) for entry in entries if "rdm_loss" in entry]
    if rdm:
        middle.plot(*zip(*rdm, strict=True), color="black", marker="o", markersize=3)
    middle.set_ylabel("RDM (mean over groups)")
    roles = sorted({name for entry in entries for name in entry if name.startswith("delta_ratio/")})
    markers = "osv^D*Px"
    for index, name in enumerate(roles):
        right.plot(
            steps, [entry.get(name) for entry in entries], color=str(0.7 * index / max(1, len(roles) - 1)),
            marker=markers[index % len(markers)], markersize=4, linewidth=1, label=name.removeprefix("delta_ratio/"),
        )  # fmt: skip
    right.set_ylabel(r"$\|\alpha\,\Delta B\| / \|B\|$")
    if roles:
        right.legend(fontsize=7, frameon=False, ncols=2)
    for axes in (left, middle, right):
        axes.set_xlabel("optimizer step")
        top = axes.dataLim.ymax
        axes.set_ylim(0, 1.08 * top if math.isfinite(top) and top > 0 else 1)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
