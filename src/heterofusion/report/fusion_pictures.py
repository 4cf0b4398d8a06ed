"""Pictures of one fusion: alignment, attention, gates, and size of the update."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from heterofusion.report.fusion import Fusion, alignment_matrix, attention_shares, module_values
from heterofusion.report.style import MAX_WIDTH, heat_map, layer_ticks, picture, short_names, tidy

_TARGET_LAYER = "target layer (counted from 0)"
_MOST_PANELS = 12
_NAME = 40  # characters of a source's name


@dataclass(frozen=True)
class Panel:
    """Sources and roles that are aligned in the same way.

    Attributes:
        sources: indices.
        roles: names.
        matrix: (target layers, source layers): how many of the roles are fed.
    """

    sources: tuple[int, ...]
    roles: tuple[str, ...]
    matrix: np.ndarray


def alignment_panels(fusion: Fusion) -> list[Panel]:
    """Alignment maps without repetition: roles and sources that are aligned alike share panels.

    Where roles differ so much that panels would be too many, there is one per source for all its roles together.
    """
    panels = _panels(fusion, [(role,) for role in fusion.roles])
    return panels if len(panels) <= _MOST_PANELS else _panels(fusion, [tuple(fusion.roles)])


def _panels(fusion: Fusion, parts: Sequence[tuple[str, ...]]) -> list[Panel]:
    """One panel per source and part of the roles, those that are alike joined."""
    alike: dict[tuple, list[int]] = {}
    matrices: dict[tuple, dict[bytes, np.ndarray]] = {}
    for source in range(len(fusion.sources)):
        roles: dict[bytes, list[str]] = {}
        found: dict[bytes, np.ndarray] = {}
        for part in parts:
            matrix = np.sum([alignment_matrix(fusion, role, source) for role in part], axis=0)
            if matrix.any():
                roles.setdefault(matrix.tobytes(), []).extend(part)
                found[matrix.tobytes()] = matrix
        key = (fusion.sources[source][1], tuple((packed, tuple(names)) for packed, names in roles.items()))
        alike.setdefault(key, []).append(source)
        matrices[key] = found
    return [
        Panel(tuple(sources), names, matrices[key][packed])
        for key, sources in alike.items()
        for packed, names in key[1]
    ]


def draw_alignment(fusion: Fusion, path: Path | None) -> Any:
    """Which source layer feeds which target layer; one panel for all sources and roles that are aligned alike.

    Args:
        fusion: the fusion.
        path: PNG file; None draws without saving.

    Returns:
        The figure.
    """
    panels = alignment_panels(fusion)
    across = min(4, max(1, len(panels)))
    down = max(1, math.ceil(len(panels) / across))
    size = 2.55 if max(max(panel.matrix.shape) for panel in panels) > 2 else 1.5
    width = max(4.4, size * across + 0.3)
    columns = max(1, min(len(fusion.sources), int(width / 4.0)))
    lines = math.ceil((len(fusion.sources) + 1) / columns)
    with picture(path, width, (size + 0.55) * down + 0.3 + 0.17 * lines) as figure:
        grid = figure.subplots(down, across, squeeze=False).flat
        for axes, panel in zip(grid, panels, strict=False):
            layers, depth = panel.matrix.shape
            most = int(panel.matrix.max())
            axes.pcolormesh(
                np.arange(depth + 1) - 0.5, np.arange(layers + 1) - 0.5, panel.matrix,
                cmap="Greys", vmin=0, vmax=1.15 * most,
                edgecolors="0.8" if max(layers, depth) <= 40 else "none", linewidth=0.3,
            )  # fmt: skip
            for layer in np.nonzero(~panel.matrix.any(axis=1))[0]:
                axes.axhspan(layer - 0.5, layer + 0.5, facecolor="none", hatch="//////", edgecolor="0.6", linewidth=0)
            axes.set_aspect("equal")
            for axis, count in ((axes.xaxis, depth), (axes.yaxis, layers)):
                layer_ticks(axis, count, most=9, of=max(layers, depth))
            axes.tick_params(labelsize=7, length=2)
            axes.set_xlabel("source layer")
            roles = _role_list(panel.roles, fusion.roles)
            if most > 1:
                roles = f"black: {most} of {len(fusion.roles)} roles, grey: fewer"
            axes.set_title(f"{_numbers(panel.sources)}\n{roles}", fontsize=8)
        for axes in list(figure.axes)[len(panels) :]:
            axes.set_visible(False)
        for axes in list(figure.axes)[::across]:
            axes.set_ylabel("target layer")
        hatched = any(not panel.matrix.any(axis=1).all() for panel in panels)
        _legend(figure, fusion, columns, "hatched: target layers without a source layer" if hatched else None)
    return figure


def _numbers(sources: Sequence[int]) -> str:
    """`source 2`, or `sources 1-3, 5`, counted from 1."""
    runs: list[list[int]] = []
    for source in sources:
        if runs and source == runs[-1][-1] + 1:
            runs[-1].append(source)
        else:
            runs.append([source])
    parts = [f"{run[0] + 1}" if len(run) == 1 else f"{run[0] + 1}-{run[-1] + 1}" for run in runs]
    return f"source{'s' if len(sources) > 1 else ''} {', '.join(parts)}"


def short_role(role: str) -> str:
    """A role without what all have."""
    return role.removesuffix("_proj")


def _role_list(roles: Sequence[str], known: Sequence[str]) -> str:
    if len(roles) == len(known) > 1:
        return "all roles"
    text = ", ".join(map(short_role, roles))
    return text if len(text) <= 32 else f"{len(roles)} of {len(known)} roles"


def _legend(figure: Any, fusion: Fusion, columns: int, note: str | None) -> None:
    """What the numbers of sources stand for, and a note."""
    from matplotlib.lines import Line2D

    names = short_names([name for name, _ in fusion.sources], _NAME)
    labels = [
        f"{index}  {name} ({layers} layer{'s' if layers > 1 else ''})"
        for index, (name, (_, layers)) in enumerate(zip(names, fusion.sources, strict=True), start=1)
    ]
    labels += [note] if note else []
    handles = [Line2D([], [], linestyle="none") for _ in labels]
    figure.legend(
        handles, labels, loc="outside lower left", ncols=columns, handlelength=0, handletextpad=0, fontsize=7.5
    )


def _map_width(layers: int, names: Sequence[str]) -> float:
    cell = 0.45 if layers <= 12 else 0.24
    return min(MAX_WIDTH, max(4.6, 1.4 + 0.065 * max(map(len, names)) + cell * layers))


def draw_attention(fusion: Fusion, path: Path | None) -> Any:
    """Share of attention by source and target layer, with the mean of each source at the right.

    Args:
        fusion: the fusion.
        path: PNG file; None draws without saving.

    Returns:
        The figure.
    """
    shares = attention_shares(fusion)
    short = short_names([name for name, _ in fusion.sources], _NAME)
    names = [f"{name}  {index}" for index, name in enumerate(short, start=1)]
    with picture(path, _map_width(fusion.layers, names), 1.3 + 0.3 * len(names)) as figure:
        axes = figure.subplots()
        heat_map(figure, axes, shares, names, "share", 1.0 if len(names) == 1 else None)
        axes.set_xlabel(_TARGET_LAYER)
        _title(figure, "attention of the target's B blocks, share by source", shares)
    return figure


def _title(figure: Any, text: str, values: np.ndarray) -> None:
    """A title over the whole figure: above the axes alone a long one would not fit."""
    if not np.isfinite(values).all():
        text += "\n(hatched: not aligned, or not known)"
    figure.suptitle(text, x=0.02, ha="left", fontsize=9)


def draw_delta_ratio(fusion: Fusion, path: Path | None) -> Any:
    """Size of the update by target layer and role.

    Args:
        fusion: the fusion.
        path: PNG file; None draws without saving.

    Returns:
        The figure.
    """
    values = module_values(fusion, "delta_ratio")
    roles = [short_role(role) for role in fusion.roles]
    with picture(path, _map_width(fusion.layers, roles), 1.3 + 0.3 * len(roles)) as figure:
        axes = figure.subplots()
        heat_map(figure, axes, values, roles, "ratio", None)
        axes.set_xlabel(_TARGET_LAYER)
        _title(figure, r"size of the update, $\|\alpha\,\Delta B\| \,/\, \|B\|$", values)
    return figure


def draw_gate_sparsity(fusion: Fusion, path: Path | None) -> Any:
    """Share of closed gates by target layer: one panel per role, the other roles in light grey behind it.

    Args:
        fusion: the fusion.
        path: PNG file; None draws without saving.

    Returns:
        The figure.
    """
    values = module_values(fusion, "gate_sparsity")
    layers = np.arange(fusion.layers)
    across = min(4, len(fusion.roles))
    down = math.ceil(len(fusion.roles) / across)
    with picture(path, max(4.2, 2.3 * across + 0.5), 1.65 * down + 0.5) as figure:
        grid = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
        for index, (axes, role) in enumerate(zip(grid.flat, fusion.roles, strict=False)):
            for other in values:
                axes.plot(layers, other, color="0.82", linewidth=0.7)
            size = 4 if fusion.layers <= 12 else 2.2
            axes.plot(layers, values[index], color="black", marker="o", markersize=size, linewidth=1.1)
            axes.set_title(short_role(role), loc="left", pad=3)
            axes.tick_params(labelbottom=index + across >= len(fusion.roles))  # the last panel of its column
            tidy(axes)
        for axes in grid.flat[len(fusion.roles) :]:
            axes.set_visible(False)
        layer_ticks(grid[0, 0].xaxis, fusion.layers, most=9)
        highest = float(np.nanmax(values)) if np.isfinite(values).any() else 0.0
        grid[0, 0].set_ylim(0, min(1.02, 1.15 * highest) if highest > 0 else 1.0)
        grid[0, 0].set_xlim(-0.5, fusion.layers - 0.5)
        figure.supxlabel(_TARGET_LAYER, fontsize=9)
        figure.supylabel("closed gates (share of zeros)", fontsize=9)
    return figure
