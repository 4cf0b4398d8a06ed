"""The picture of the method in the README.

python -m heterofusion.report.method OUTPUT.png
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from heterofusion.report.style import picture

WIDTH, HEIGHT = 1600, 930  # units of the drawing, pixels of the file
_DPI = 150
_ACCENT, _TINT = "#1f5f9e", "#d6e4f2"  # the target: also told by its thicker frame
_BARS = (17, 9, 5)
_GREY, _DARK = "0.88", "0.30"
_TEXT, _SMALL, _HEAD = 10.0, 9.0, 11.5


def draw_method(path: Path | None) -> Any:
    """Draw how source adapters of other depths become an update of the target's lora_B.

    Args:
        path: PNG file, 1600 pixels wide; None draws without saving.

    Returns:
        The figure.
    """
    with picture(None, WIDTH / _DPI, HEIGHT / _DPI) as figure:
        figure.set_layout_engine("none")
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
        axes.axis("off")
        _draw_alignment(axes)
        _draw_blocks(axes)
        _draw_hypernetwork(axes)
        _draw_model(axes)
        _draw_export(axes)
        if path is not None:
            figure.savefig(path, dpi=_DPI, metadata={"Software": None})
    return figure


# ---- pieces -----------------------------------------------------------------------------------------------------


def _box(axes: Any, x: float, y: float, w: float, h: float, text: str = "", **style: Any) -> None:
    """A box with its text in the middle; x, y is its lower left corner."""
    from matplotlib.patches import FancyBboxPatch

    size, color = style.pop("size", _TEXT), style.pop("color", "black")
    look: dict[str, Any] = {"facecolor": "white", "edgecolor": "black", "linewidth": 1.1} | style
    axes.add_patch(FancyBboxPatch((x, y), w, h, boxstyle="round,pad=0,rounding_size=8", **look))
    if text:
        _text(axes, x + w / 2, y + h / 2, text, size=size, color=color)


def _panel(axes: Any, x: float, y: float, w: float, h: float, number: int, title: str) -> None:
    """A numbered part of the picture."""
    _box(axes, x, y, w, h, facecolor="0.975", edgecolor="0.75", linewidth=0.9)
    axes.add_patch(_circle(x + 32, y + h - 34, 17, facecolor="black"))
    _text(axes, x + 32, y + h - 35, str(number), size=11, color="white", weight="bold")
    _text(axes, x + 60, y + h - 43, title, size=_HEAD, weight="bold", ha="left", va="baseline")


def _circle(x: float, y: float, radius: float, **style: Any) -> Any:
    from matplotlib.patches import Circle

    return Circle((x, y), radius, **style)


def _text(axes: Any, x: float, y: float, text: str, **style: Any) -> None:
    look = {"size": _TEXT, "ha": "center", "va": "center", "linespacing": 1.25} | style
    axes.text(x, y, text, **look)


def _arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], **style: Any) -> None:
    look = {"arrowstyle": "-|>", "linewidth": 1.3, "color": "black", "shrinkA": 0, "shrinkB": 0, "mutation_scale": 13}
    axes.annotate("", end, start, arrowprops=look | style)


def _path(axes: Any, *points: tuple[float, float], **style: Any) -> None:
    """A line with corners that ends in an arrow."""
    look = {"color": "black", "linewidth": 1.3} | style
    axes.plot(*zip(*points[:-1], strict=True), solid_joinstyle="miter", **look)
    _arrow(axes, points[-2], points[-1], **look)


def _tile(axes: Any, x: float, y: float, w: float, h: float, target: bool, hatch: str = "") -> None:
    """A block of a matrix."""
    from matplotlib.patches import Rectangle

    look: dict[str, Any] = {"facecolor": _GREY, "edgecolor": _DARK, "linewidth": 0.9}
    if target:
        look = {"facecolor": _TINT, "edgecolor": _ACCENT, "linewidth": 1.8}
    axes.add_patch(Rectangle((x, y), w, h, hatch=hatch, **look))


# ---- the five parts ---------------------------------------------------------------------------------------------


def _draw_alignment(axes: Any) -> None:
    _panel(axes, 15, 400, 400, 515, 1, "Align by role and layer")
    columns = (
        ("source 1\n(Qwen2)", 45, 6, False), ("target\n(Llama)", 170, 4, True), ("source 2\n(Mistral)", 295, 3, False)
    )  # fmt: skip
    top, height, width = 735, 36, 90
    for name, x, depth, target in columns:
        _text(axes, x + width / 2, 813, name, color=_ACCENT if target else "black", weight="bold" if target else None)
        for row in range(6):
            y = top - row * (height + 8)
            if row < depth:
                used = target or row < 4
                _tile(axes, x, y, width, height, target)
                if not used:  # deeper than the target: nothing to pair with
                    axes.patches[-1].set(facecolor="white", linestyle="--", edgecolor="0.55")
                color = "black" if used else "0.5"
                _text(axes, x + width / 2, y + height / 2 - 1, f"layer {depth - 1 - row}", size=_SMALL, color=color)
    for row in range(4):
        middle = top - row * (height + 8) + height / 2
        _arrow(axes, (137, middle), (168, middle))
        if row < 3:
            _arrow(axes, (293, middle), (262, middle))
    _text(axes, 275, 478, "last layer to last layer,\nq to q, down to down, ...", size=_SMALL)
    _text(axes, 215, 425, "from the adapter files alone", size=_SMALL, color="0.25")


def _draw_blocks(axes: Any) -> None:
    _panel(axes, 440, 400, 315, 515, 2, "Cut into blocks")
    for y, target, title in ((710, False, "sources, joined"), (515, True, "target")):
        _text(
            axes, 597, y + 92, title, color=_ACCENT if target else "black", weight="bold" if target else None
        )  # fmt: skip
        count = 4 if target else 8
        start = 597 - count * 34 / 2
        for index in range(count):
            x = start + 34 * index + 2
            _tile(axes, x, y, 29, 62, target, hatch="" if index % 4 < 2 else "////")
            for bar, size in enumerate(_BARS):  # its singular values, largest first
                axes.bar(x + 7 + 8 * bar, size, 6, bottom=y - 26, color="black")
    for x, hatch, name in ((482, "", r"block of $A^\top$"), (627, "////", r"block of $B$")):
        _tile(axes, x - 25, 442, 16, 24, False, hatch)
        _text(axes, x, 453, name, size=_SMALL, ha="left")
    for bar, size in enumerate(_BARS):
        axes.bar(490 + 8 * bar, size, 6, bottom=415, color="black")
    _text(axes, 520, 422, "its singular values", size=_SMALL, ha="left")


def _draw_hypernetwork(axes: Any) -> None:
    _panel(axes, 780, 400, 805, 515, 3, "A hypernetwork predicts the update")
    source, target = 741, 546  # heights of the two rows of blocks
    blue = {"color": _ACCENT, "linewidth": 2}
    _arrow(axes, (735, source), (818, source))
    _arrow(axes, (668, target), (818, target), **blue)
    _box(axes, 820, 480, 185, 340)
    _text(axes, 912, 788, "encoder", weight="bold")
    _text(axes, 912, 762, "shared by both", size=_SMALL)
    _text(axes, 912, 672, "features of\nrows + columns")
    _text(axes, 912, 610, r"$\times$")
    _text(axes, 912, 562, "gate from\nsingular values")
    _arrow(axes, (1005, source), (1135, source))
    _arrow(axes, (1005, target), (1135, target), **blue)
    _text(axes, 1071, source + 20, "keys, values", size=_SMALL)
    _text(axes, 1071, target - 22, "queries", size=_SMALL, color=_ACCENT)
    axes.plot((1071, 1071), (source, target), color="0.35", linestyle=":", linewidth=1.3)
    _box(
        axes, 1017, 600, 108, 88, "RDM\nregularizes\nboth", size=_SMALL, facecolor="0.93", edgecolor="0.35", zorder=2.5
    )
    _box(axes, 1137, 480, 206, 340)
    _text(axes, 1240, 788, "cross-attention", weight="bold")
    _text(axes, 1240, 762, "+ positions", size=_SMALL)
    _text(axes, 1240, 643, "each target block\nlooks at all\nsource blocks")
    _arrow(axes, (1343, 643), (1413, 643), **blue)
    _box(axes, 1415, 480, 145, 340)
    _text(axes, 1487, 788, "decoder", weight="bold")
    _text(axes, 1487, 643, "one update\nper block;\nthose of $B$\nare kept")
    _text(axes, 1095, 444, "one hypernetwork and one $\\alpha$ per role and rank", size=_SMALL, color="0.25")
    _text(axes, 1095, 417, "nothing else is trained", size=_SMALL, color="0.25")


def _draw_model(axes: Any) -> None:
    _panel(axes, 560, 15, 1025, 360, 4, "The frozen target model gives the loss")
    blue = {"color": _ACCENT, "linewidth": 2}
    row = 155
    _text(axes, 622, row, "replay\nexamples")
    _arrow(axes, (672, row), (748, row))
    _path(axes, (705, row), (705, 70), (748, 70))
    _box(axes, 750, 43, 365, 54, "base weight $W$", facecolor=_GREY)
    _box(axes, 750, row - 27, 130, 54, "lora_A", facecolor=_TINT, edgecolor=_ACCENT, linewidth=1.8)
    _arrow(axes, (880, row), (983, row))
    _box(axes, 985, row - 27, 130, 54, "lora_B", facecolor=_TINT, edgecolor=_ACCENT, linewidth=1.8)
    _path(axes, (925, row), (925, 245), (983, 245))
    _box(axes, 985, 218, 130, 54, r"$\alpha\,\Delta B$", size=12, facecolor=_ACCENT, edgecolor=_ACCENT, color="white")
    _text(axes, 905, 245, "hook", size=_SMALL, ha="right")
    _path(axes, (1115, 245), (1180, 245), (1180, row + 22))
    _path(axes, (1115, 70), (1180, 70), (1180, row - 22))
    _arrow(axes, (1115, row), (1158, row))
    axes.add_patch(_circle(1180, row, 21, facecolor="white", edgecolor="black", linewidth=1.1))
    _text(axes, 1180, row, "+", size=14)
    _arrow(axes, (1201, row), (1273, row))
    _box(axes, 1275, row - 42, 130, 84, "LM loss\n+ λ RDM")
    # from the decoder, and back to the hypernetwork
    _path(axes, (1470, 480), (1470, 300), (1050, 300), (1050, 274), **blue)
    _text(axes, 1455, 330, r"$\Delta B$", size=12, ha="right", color=_ACCENT)
    _path(axes, (1405, row), (1535, row), (1535, 478), linestyle=(0, (4, 2)))
    _text(axes, 1468, row - 22, "gradient", size=_SMALL)


def _draw_export(axes: Any) -> None:
    _panel(axes, 15, 15, 515, 360, 5, "Export one PEFT adapter")
    _arrow(axes, (560, 246), (532, 246), color=_ACCENT, linewidth=2)
    style = {"facecolor": _TINT, "edgecolor": _ACCENT, "linewidth": 1.8}
    _box(axes, 50, 185, 195, 90, "lora_A\nunchanged", **style)
    _box(axes, 290, 185, 205, 90, "lora_B\n" r"$B + \alpha\,\Delta B$", **style)
    _text(
        axes,
        272,
        110,
        "An ordinary adapter of the target:\nloads anywhere, and sources and\nhypernetwork are needed no more.",
    )


def main(argv: Sequence[str]) -> int:
    """Write the picture; returns the exit code."""
    if len(argv) != 1 or argv[0].startswith("-"):
        print("usage: python -m heterofusion.report.method OUTPUT.png", file=sys.stderr)
        return 2
    draw_method(Path(argv[0]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
