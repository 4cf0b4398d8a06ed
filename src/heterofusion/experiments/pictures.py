"""Pictures of scores, of a fusion and of its training, as matplotlib figures.

Colours are told apart by the colour-blind, and by their lightness on a black and white print; bars have hatches and
lines have markers beside.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from heterofusion.experiments.tables import Estimate, by_seed, estimate, metric_name, row_name

# Okabe and Ito's palette, in an order in which neighbours differ in lightness as well
COLORS = ("#000000", "#56B4E9", "#D55E00", "#F0E442", "#0072B2", "#E69F00", "#009E73", "#CC79A7")
_HATCHES = ("", "//", "", "..", "\\\\", "", "xx", "--")
_MARKERS = "osD^vPX<"
_LINES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (3, 3)), (0, (8, 2)), (0, (1, 1, 4, 1)))
_CELLS = "YlGnBu"  # light to dark
_ROLES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_STYLE: Any = {
    "font.size": 9, "axes.titlesize": 9, "legend.fontsize": 8, "xtick.labelsize": 8, "ytick.labelsize": 8,
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.7, "legend.frameon": False,
    "hatch.linewidth": 0.6, "lines.linewidth": 1.4, "lines.markersize": 4.5, "figure.constrained_layout.use": True,
}  # fmt: skip
SETTINGS = {"alpha_init": r"initial scale $\alpha$", "mu_gate": r"gate bias $\mu_\mathrm{gate}$"}


def _figure(width: float, height: float) -> Figure:
    matplotlib.rcdefaults()  # not a user's own style file
    matplotlib.rcParams.update(_STYLE)
    return Figure(figsize=(min(width, 11.0), height), layout="constrained")


def save_picture(figure: Figure, path: Path) -> None:
    """Write a figure as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160, metadata={"Software": None})


def _line(index: int) -> dict[str, Any]:
    color = COLORS[index % 8].replace("#F0E442", "#999933")  # a thin yellow line can hardly be seen
    style = {"color": color, "linestyle": _LINES[index % 8], "marker": _MARKERS[index % 8]}
    return {**style, "markeredgecolor": "black", "markeredgewidth": 0.4}


def _bar(index: int) -> dict[str, Any]:
    style = {"facecolor": COLORS[index % 8], "hatch": _HATCHES[index % 8], "linewidth": 0.5}
    return {**style, "edgecolor": "white" if index % 8 == 0 else "black"}


def _short(text: str, width: int = 40) -> str:
    return text if len(text) <= width else f"{text[: width * 3 // 5]}…{text[-(width * 2 // 5) :]}"


# ---- scores -----------------------------------------------------------------------------------------------------


def draw_scores(frame: pd.DataFrame, by: Sequence[str] = ("name",)) -> Figure:
    """Bars for each data set, or the means alone where rows are too many for bars."""
    rows = frame.groupby(list(by)).ngroups
    few = rows <= len(COLORS) and rows * frame["dataset"].nunique() <= 60
    return draw_bars(frame, by) if few else draw_ranking(frame, by)


def draw_bars(frame: pd.DataFrame, by: Sequence[str] = ("name",)) -> Figure:
    """Scores of a few rows on each data set, with their intervals over seeds."""
    datasets = list(dict.fromkeys(frame["dataset"]))
    rows = [(row_name(by, keys), part) for keys, part in frame.groupby(list(by), sort=False)]
    width = 0.84 / len(rows)
    figure = _figure(max(4.5, 1 + len(datasets) * max(1.0, 0.2 * len(rows))), 3.0)
    axes = figure.subplots()
    for index, (_, part) in enumerate(rows):
        for column, name in enumerate(datasets):
            place, found = column + (index - (len(rows) - 1) / 2) * width, estimate(by_seed(part, name))
            if found is None:
                axes.text(place, 0.01, "-", ha="center")
                continue
            axes.bar(place, found.mean, width, **_bar(index))
            if found.bar:
                axes.errorbar(place, found.mean, found.bar, color="0.35", capsize=2, linewidth=1)
            style: Any = {"va": "bottom", "fontsize": 6.5, "rotation": 0 if width > 0.27 else 90}
            top = min(max(found.mean + found.bar, 0) + 0.01, 1.07)
            axes.text(place, top, f"{found.mean:.2f}", ha="center", **style)
    axes.set_xticks(range(len(datasets)), [_short(name, 18) for name in datasets])
    axes.set_ylim(0, 1.19)
    axes.set_ylabel(metric_name(frame))
    handles = [Patch(**_bar(index)) for index in range(len(rows))]
    figure.legend(handles, [_short(name) for name, _ in rows], loc="outside upper center", ncols=min(len(rows), 4))
    return figure


def draw_ranking(frame: pd.DataFrame, by: Sequence[str] = ("name",)) -> Figure:
    """Mean score of many rows, one below the other in their groups: seeds as dots, mean, and 95% interval."""
    groups = list(dict.fromkeys(frame["group"]))
    place, ticks = 0, {}
    figure = _figure(7.5, 0.8 + 0.24 * (frame.groupby(["group", *by]).ngroups + len(groups)))
    axes = figure.subplots()
    for index, group in enumerate(groups):
        if group:
            axes.text(0, place, group, fontweight="bold", va="center", fontsize=8)
            place += 1
        for keys, part in frame[frame["group"] == group].groupby(list(by), sort=False):
            values = by_seed(part)
            if found := estimate(values):
                style = {**_line(index), "markersize": 6, "linestyle": "", "capsize": 2.5, "ecolor": "0.3"}
                if part["control"].notna().any():
                    style["markerfacecolor"] = "white"
                axes.errorbar(found.mean, place, xerr=found.bar, **style)
                if found.n > 1:
                    axes.plot(values, [place + 0.25] * len(values), "|", color="0.4", markersize=4)
                axes.text(found.mean + found.bar + 0.012, place, f"{found.mean:.3f}", va="center", fontsize=7)
            ticks[place] = _short(row_name(by, keys))
            place += 1
    axes.set_yticks(list(ticks), list(ticks.values()))
    axes.set_ylim(place - 0.4, -0.8)
    axes.set_xlim(-0.01, 1.12)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    controls = "; hollow: controls, without the real sources" if frame["control"].notna().any() else ""
    axes.set_xlabel(f"mean {metric_name(frame)}{controls}")
    return figure


def draw_curves(frame: pd.DataFrame, label: str, rows: Sequence[str] = ()) -> Figure:
    """Mean score over a label: a line with its interval for each row that has three values or more.

    Values that are numbers stand where they belong, others side by side. Rows that are the same everywhere are grey.
    """
    values = list(dict.fromkeys(value for value in frame[label] if value != ""))
    numeric = bool(np.isfinite(pd.to_numeric(pd.Series(values), errors="coerce")).all())
    x = {value: float(value) if numeric else place for place, value in enumerate(values)}
    lines: dict[str, dict[float, Estimate]] = {}
    for name, part in frame[frame[label] != ""].groupby("name", sort=False):
        points = {x[value]: estimate(by_seed(part[part[label] == value])) for value in dict.fromkeys(part[label])}
        found = {place: each for place, each in sorted(points.items()) if each is not None}
        if len(found) >= min(3, len(values)) and (not rows or name in rows):
            lines[str(name)] = found
    figure = _figure(7.5 if len(lines) > 1 else 4.5, 4.0 if len(lines) > 1 else 2.8)
    axes = figure.subplots()
    moving = [name for name in lines if len({each.mean for each in lines[name].values()}) > 1][: len(COLORS)]
    spread = 0.02 * ((max(x.values()) - min(x.values())) or 1)
    for name, found in lines.items():
        if name not in moving:
            axes.axhline(next(iter(found.values())).mean, color="0.6", linewidth=1, linestyle=(0, (6, 3)), label=name)
            continue
        index = moving.index(name)
        places = [place + spread * (index - (len(moving) - 1) / 2) for place in found]
        means, bars = [each.mean for each in found.values()], [each.bar for each in found.values()]
        style = {**_line(index), "label": _short(name), "capsize": 2, "elinewidth": 0.8}
        axes.errorbar(places, means, bars if any(bars) else None, **style)
    if not numeric:
        axes.set_xticks(list(x.values()), list(x))
    low, high = axes.get_ylim()
    margin = max(0, 0.1 - (high - low)) / 2  # small differences shall look small
    axes.set_ylim(max(low - margin, -0.02), min(high + margin, 1.02))
    axes.set_xlabel(SETTINGS.get(label, label if numeric else ""))
    axes.set_ylabel(f"mean {metric_name(frame)}")
    axes.grid(axis="y", color="0.9")
    if len(lines) > 1:
        figure.legend(loc="outside right center", handlelength=3.4)
    return figure


def draw_routing(
    scores: Mapping[str, Mapping[str, float]],
    chosen: Mapping[str, Sequence[str]],
    tasks: Sequence[str],
    control: str | None,
) -> Figure:
    """Score of each model (the anchor first) on each task's replay; framed are the models that label the task."""
    values = np.array([[row.get(task, math.nan) for task in tasks] for row in scores.values()], dtype=float)
    figure = _figure(2.5 + 0.9 * len(tasks), 1.2 + 0.28 * len(scores))
    axes = figure.subplots()
    _cells(axes, values, [_short(name) for name in scores], 1.0)
    axes.set_xticks(range(len(tasks)), [_short(task, 16) for task in tasks], rotation=20, ha="right")
    for row, name in enumerate(scores):
        for column, task in enumerate(tasks):
            if name in chosen.get(task, ()):
                box = {"facecolor": "white", "edgecolor": "black", "pad": 1.6}
                text = f"{values[row, column]:.2f}" if math.isfinite(values[row, column]) else control or "map"
                axes.text(column, row, text, ha="center", va="center", fontsize=7, fontweight="bold", bbox=box)
    title = "score on the replay; framed: labels the task; hatched: not measured"
    figure.suptitle(title if control is None else f"CONTROL ({control}): {title}", fontsize=9)
    return figure


# ---- a fusion ---------------------------------------------------------------------------------------------------


def _cells(axes: Axes, values: np.ndarray, names: Sequence[str], top: float | None = None) -> Any:
    """Coloured cells of (row, column) with their numbers; what is not known is hatched."""
    rows, columns = values.shape
    high = top or (float(np.nanmax(values)) if np.isfinite(values).any() else 1.0) or 1.0
    edges: dict[str, Any] = {"edgecolors": "white", "linewidth": 0.4} if columns <= 40 else {}
    grid = (np.arange(columns + 1) - 0.5, np.arange(rows + 1) - 0.5)
    mesh = axes.pcolormesh(*grid, np.ma.masked_invalid(values), cmap=_CELLS, vmin=0, vmax=high, **edges)
    axes.patch.set(hatch="////", edgecolor="0.7")
    axes.spines[:].set_visible(False)
    axes.set_ylim(rows - 0.5, -0.5)
    axes.set_yticks(range(rows), names)
    axes.tick_params(length=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
    for row, column in np.argwhere(np.isfinite(values)) if columns <= 14 else ():
        value = values[row, column]
        style: Any = {"ha": "center", "va": "center", "color": "white" if value > 0.5 * high else "black"}
        axes.text(column, row, f"{value:#.2g}" if value else "0", fontsize=6.5, **style)
    return mesh


def draw_fusion(diagnostics: Mapping[str, Any]) -> Figure:
    """From `diagnostics.json`, layer by layer: attention by source, size of the update and closed gates by role."""
    modules, roles = pd.DataFrame(diagnostics["modules"]), _roles(diagnostics)
    layers = range(diagnostics["target"]["layers"])
    sources = {index: _source(index, source) for index, source in enumerate(diagnostics["sources"])}
    # a module that takes nothing from a source counts as 0 for it, so that the shares of a layer sum to 1
    links = [{link["source"]: link["attention"] for link in module["sources"]} for module in diagnostics["modules"]]
    taken = pd.DataFrame(links, columns=list(sources))
    attention = taken.fillna(0).groupby(modules["layer"]).mean().T.reindex(columns=layers)
    short = [role.removesuffix("_proj") for role in roles]
    panels = [("attention of the target's B blocks (share by source)", attention, list(sources.values()))]
    titles = {
        "delta_ratio": r"size of the update, $\|\alpha\,\Delta B\| / \|B\|$",
        "gate_sparsity": "closed gates (share)",
    }
    for name, title in titles.items():
        values = modules.astype({name: float}).pivot_table(name, "role", "layer", dropna=False)
        panels.append((title, values.reindex(index=roles, columns=layers), short))
    heights = [len(names) + 2 for _, _, names in panels]
    figure = _figure(max(6.0, 3 + 0.42 * len(layers)), 0.26 * sum(heights) + 0.8)
    for axes, (title, values, names) in zip(figure.subplots(3, 1, height_ratios=heights), panels, strict=True):
        figure.colorbar(_cells(axes, values.to_numpy(float), names), ax=axes, pad=0.01, aspect=12)
        axes.set_title(title, loc="left")
    figure.axes[2].set_xlabel("target layer, from 0 (hatched: not aligned)")
    return figure


def _roles(diagnostics: Mapping[str, Any]) -> list[str]:
    found = {module["role"] for module in diagnostics["modules"]}
    return [role for role in _ROLES if role in found] + sorted(found - set(_ROLES))


def _source(index: int, source: Mapping[str, Any]) -> str:
    control = f" [{source['control']}]" if source.get("control") else ""
    return f"{index + 1} {_short(source['name'], 30)}{control}"


def draw_alignment(diagnostics: Mapping[str, Any]) -> Figure:
    """Which source layer feeds which target layer: a panel per source, cells are the share of roles that are fed."""
    layers, roles = diagnostics["target"]["layers"], _roles(diagnostics)
    sources = diagnostics["sources"]
    across = min(4, len(sources))
    down = math.ceil(len(sources) / across)
    figure = _figure(2.4 * across + 0.8, 2.5 * down + 0.3)
    grid = figure.subplots(down, across, squeeze=False)
    for index, axes in enumerate(grid.flat):
        if index >= len(sources):
            axes.set_visible(False)
            continue
        fed = np.zeros((layers, sources[index]["layers"]))
        for module in diagnostics["modules"]:
            for link in module["sources"]:
                if link["source"] == index:
                    fed[module["layer"], link["layer"]] += 1 / len(roles)
        edges: Any = {"edgecolors": "0.85" if max(fed.shape) <= 40 else "none", "linewidth": 0.3}
        mesh = axes.pcolormesh(fed, cmap=_CELLS, vmin=0, vmax=1, **edges)
        for axis, count in ((axes.xaxis, fed.shape[1]), (axes.yaxis, fed.shape[0])):
            step = max(1, math.ceil(count / 8))
            axis.set_ticks(np.arange(0, count, step) + 0.5, range(0, count, step))
        axes.set_title(_source(index, sources[index]), fontsize=8)
        axes.set_xlabel("source layer")
        axes.set_ylabel("target layer")
    figure.colorbar(mesh, ax=grid, label="share of the roles", shrink=0.6)
    return figure


def draw_training(history: Sequence[Mapping[str, Any]]) -> Figure:
    """Training curves from Trainer's log history: losses, size of the update, alpha, closed gates, attention."""
    losses = {"lm_loss": "training", "loss_replay": "of it replay", "loss_labels": "of it source labels",
              "eval_loss": "evaluation"}  # fmt: skip
    titles = {
        "loss": "LM loss (nats per label token)", "rdm_loss": "RDM", "delta_ratio": r"$\|\alpha\,\Delta B\| / \|B\|$",
        "alpha": r"scale $\alpha$", "gate_sparsity": "closed gates (share)",
        "attention": "attention (share by source)",
    }  # fmt: skip
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {name: {} for name in titles}
    for entry in history:
        for name, value in entry.items():
            quantity, _, part = f"loss/{losses[name]}".partition("/") if name in losses else name.partition("/")
            if quantity in titles and name != "loss":
                value = float(value) if isinstance(value, (int, float)) else math.nan
                panels[quantity].setdefault(part.removesuffix("_proj"), []).append((entry["step"], value))
    panels = {titles[name]: lines for name, lines in panels.items() if lines}
    across = min(3, max(1, len(panels)))
    down = max(1, math.ceil(len(panels) / across))
    figure = _figure(3.6 * across, 3.1 * down)
    grid = figure.subplots(down, across, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (title, lines) in zip(grid.flat, panels.items(), strict=False):
        for index, (name, points) in enumerate(sorted(lines.items(), key=lambda item: _order(item[0]))):
            style = {**_line(index), "label": _short(name, 24), "markevery": max(1, len(points) // 8)}
            axes.plot(*zip(*points, strict=True), **style)
        axes.set_title(title, loc="left")
        axes.set_xlabel("optimizer step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
        if len(lines) > 1:
            axes.legend(fontsize=6.5, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.22), handlelength=3)
    return figure


def _order(name: str) -> tuple[float, str]:
    """Roles as a layer uses them, sources by their number."""
    roles = [role.removesuffix("_proj") for role in _ROLES]
    head = name.partition("-")[0]
    return (roles.index(name) if name in roles else float(head) if head.isdigit() else 99.0, name)
