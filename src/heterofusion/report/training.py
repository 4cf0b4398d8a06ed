"""Training curves of one fusion, from Trainer's log history."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from heterofusion.data.files import load_json, read_text
from heterofusion.report.fields import Fields
from heterofusion.report.fusion import role_order
from heterofusion.report.fusion_pictures import short_role
from heterofusion.report.intervals import natural
from heterofusion.report.style import picture, require_matplotlib, short_names, stroke, tidy

TRAINER_STATE_FILE = "trainer_state.json"
Series = list[tuple[float, float]]  # (step, value)
_TITLES = {
    "lm_loss": "LM loss (nats per label token)",
    "rdm_loss": "RDM (mean over groups, no unit)",
    "delta_ratio": r"$\|\alpha\,\Delta B\| \,/\, \|B\|$ (ratio)",
    "alpha": r"scale $\alpha$ (no unit)",
    "gate_sparsity": "closed gates (share)",
    "attention": "attention (share by source)",
}


def read_history(folder: Path) -> list[dict[str, Any]]:
    """Log history of `trainer_state.json` beside a fused adapter.

    Raises:
        ValueError: it cannot be read, or holds no log history; names the file.
    """
    label = f"training log {folder / TRAINER_STATE_FILE}"
    history = Fields(load_json(read_text(folder / TRAINER_STATE_FILE, label), label), label).get("log_history", list)
    for index, entry in enumerate(history):
        Fields(entry, label, f"log_history[{index}].").number("step", finite=False)
    return history


def series_of(history: Sequence[Mapping[str, Any]], name: str) -> Series:
    """Steps and values of one log entry; what is no number becomes NaN, a gap in the curve."""
    return [
        (entry["step"], float(entry[name]) if isinstance(entry[name], int | float) else math.nan)
        for entry in history
        if name in entry
    ]


def grouped(history: Sequence[Mapping[str, Any]], quantity: str) -> dict[str, Series]:
    """The series `quantity/<name>` of a log by name: roles as a layer uses them, sources by number."""
    prefix = f"{quantity}/"
    names = {name.removeprefix(prefix) for entry in history for name in entry if name.startswith(prefix)}
    # a file may list source 10 before source 2
    ordered = sorted(names, key=lambda name: (natural(name.partition("-")[0])[:2], role_order(name)))
    return {name: series_of(history, prefix + name) for name in ordered}


def draw_training(history: Sequence[Mapping[str, Any]], path: Path | None) -> Any:
    """Training curves: LM loss, RDM, size of the update, alpha, closed gates and attention, as far as they are logged.

    Args:
        history: `trainer.state.log_history`, or the same list from `trainer_state.json`.
        path: PNG file; None draws without saving.

    Returns:
        The figure.
    """
    lines_of: dict[str, dict[str, Series]] = {
        "lm_loss": {
            "training": series_of(history, "lm_loss"),
            "of it replay": series_of(history, "loss_replay"),
            "of it source labels": series_of(history, "loss_labels"),
            "evaluation": series_of(history, "eval_loss"),
        },
        "rdm_loss": {"": series_of(history, "rdm_loss")},
    } | {quantity: grouped(history, quantity) for quantity in ("delta_ratio", "alpha", "gate_sparsity", "attention")}
    panels = {
        quantity: {name: found for name, found in lines.items() if found} for quantity, lines in lines_of.items()
    }
    panels = {quantity: lines for quantity, lines in panels.items() if lines} or {"lm_loss": {}}
    longest = sum(sorted(map(len, panels.values()))[-2:])  # lines of legends, in two rows of panels
    across = min(3, len(panels))
    down = math.ceil(len(panels) / across)
    with picture(path, max(4.2, 3.5 * across), 2.5 * down + 0.13 * longest) as figure:
        grid = figure.subplots(down, across, squeeze=False)
        for axes, (quantity, lines) in zip(grid.flat, panels.items(), strict=False):
            _draw_panel(axes, quantity, lines)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
    return figure


def _draw_panel(axes: Any, quantity: str, lines: Mapping[str, Series]) -> None:
    names = short_names([short_role(name) for name in lines], 26)
    for index, points in enumerate(lines.values()):
        style = stroke(index, len(lines))
        every = max(1, len(points) // 10)
        # markers of different lines are set at different steps, so that lines that run together can be told apart
        axes.plot(
            *zip(*points, strict=True), **style, linewidth=1.1, label=names[index],
            markevery=(index * every // max(1, len(lines)) % len(points), every),
        )  # fmt: skip
    values = [value for points in lines.values() for _, value in points if math.isfinite(value)]
    if quantity == "alpha" and values:  # its changes are small beside its value
        margin = max(0.1 * (max(values) - min(values)), 0.005)
        axes.set_ylim(min(values) - margin, max(values) + margin)
    else:
        axes.set_ylim(min([0.0, *values]), 1.08 * max(values) if values and max(values) > 0 else 1.0)
    axes.set_xlabel("optimizer step")
    steps = {step for points in lines.values() for step, _ in points}
    if len(steps) == 1:
        axes.set_xticks(list(steps))
    else:
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_title(_TITLES[quantity], loc="left")
    if not values:
        axes.text(0.5, 0.5, "nothing was logged", transform=axes.transAxes, ha="center", va="center")
    if len(lines) > 1:
        below = require_matplotlib().transforms.offset_copy(axes.transAxes, axes.figure, y=-30, units="points")
        columns = 2 if len(lines) > 4 and max(map(len, names)) <= 12 else 1
        axes.legend(
            fontsize=6.5, ncols=columns, handlelength=3.2, labelspacing=0.25, columnspacing=1.0, loc="upper center",
            bbox_to_anchor=(0.5, 0), bbox_transform=below, borderaxespad=0,
        )  # fmt: skip
    tidy(axes)
