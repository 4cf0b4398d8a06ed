"""What all pictures share: greys, hatches, markers and line styles that a black and white print keeps apart."""

import contextlib
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

DPI = 200
MAX_WIDTH = 11.0  # inches; wider pictures cannot be read on a page
_RC = {
    "font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9, "xtick.labelsize": 8, "ytick.labelsize": 8,
    "legend.fontsize": 8, "axes.linewidth": 0.7, "hatch.linewidth": 0.7, "lines.linewidth": 1.2,
    "xtick.major.width": 0.7, "ytick.major.width": 0.7, "mathtext.fontset": "dejavusans", "legend.frameon": False,
}  # fmt: skip
# neighbours differ in brightness as well as in hatch
_FILLS = (
    ("0.15", ""), ("1.0", "/////"), ("0.62", ""), ("1.0", "....."), ("0.84", "\\\\\\\\\\"), ("0.40", ""),
    ("1.0", "xxxxx"), ("0.84", ""), ("1.0", "-----"), ("0.62", "|||||"),
)  # fmt: skip
_MARKERS = "osD^vPX<>*"
_LINES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (3, 3)), (0, (1, 1, 4, 1)))


@contextlib.contextmanager
def picture(path: Path | None, width: float, height: float) -> Iterator[Any]:
    """A figure that is saved as PNG at the end.

    It belongs to no pyplot: nothing of the process's own figures or settings is touched.

    Args:
        path: the file; None saves nothing.
        width: inches.
        height: inches.

    Raises:
        ImportError: matplotlib is not installed; says how to install it.
    """
    matplotlib = require_matplotlib()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # not a user's own style file
        matplotlib.rcParams.update(_RC)
        figure = matplotlib.figure.Figure(figsize=(width, height), layout="constrained")
        yield figure
        if path is not None:
            figure.savefig(path, dpi=DPI, metadata={"Software": None})


def require_matplotlib() -> Any:
    """matplotlib, imported only when a picture is drawn.

    Raises:
        ImportError: it is not installed; says how to install it.
    """
    try:
        import matplotlib.figure
        import matplotlib.ticker
        import matplotlib.transforms
    except ImportError:
        raise ImportError("pictures need matplotlib: pip install 'heterofusion[report]'") from None
    return matplotlib


def fill(index: int) -> dict[str, Any]:
    """Face and hatch of the index-th kind of bar."""
    face, hatch = _FILLS[index % len(_FILLS)]
    return {"facecolor": face, "hatch": hatch, "edgecolor": "black", "linewidth": 0.6}


def stroke(index: int, count: int) -> dict[str, Any]:
    """Line, marker and grey of the index-th of `count` lines."""
    return {
        "color": str(round(0.55 * index / max(1, count - 1), 3)),
        "linestyle": _LINES[index % len(_LINES)],
        "marker": _MARKERS[index % len(_MARKERS)],
        "markersize": 4.5,
        "markerfacecolor": "white" if index % 2 else None,
    }


def tidy(axes: Any) -> None:
    """No frame at the top and right."""
    axes.spines[["top", "right"]].set_visible(False)


def shorten(text: str, width: int) -> str:
    """A name cut in its middle: head and tail tell most of it."""
    if len(text) <= width:
        return text
    head = max(1, math.ceil((width - 1) * 0.6))
    tail = max(1, width - 1 - head)
    return f"{text[:head]}…{text[-tail:]}"


def short_names(names: Sequence[str], width: int) -> list[str]:
    """Names cut to a width that can still be told apart: those that cannot get their number in front."""
    short = [shorten(name, width) for name in names]
    return [
        f"{index}: {shorten(name, max(3, width - 3))}" if short.count(cut) > 1 else cut
        for index, (name, cut) in enumerate(zip(names, short, strict=True), start=1)
    ]


def wrap(text: str, width: int, lines: int = 3) -> str:
    """A name on several lines, broken after `_`, `-`, `/`, `.` and blanks; what does not fit is cut in its middle.

    Args:
        text: the name.
        width: characters per line.
        lines: number of lines at most.
    """
    parts = [shorten(part, width) for part in re.findall(r"[^_\-/. ]*[_\-/. ]?", text) if part]
    wrapped = [""]
    for part in parts:
        if len(wrapped[-1]) + len(part.rstrip()) <= width:
            wrapped[-1] += part
        else:
            wrapped.append(part)
    if len(wrapped) > lines:
        # cut so short that it fits wherever it breaks
        text = shorten(text, max(3, width * lines))
        return "\n".join(text[at : at + width] for at in range(0, len(text), width))
    return "\n".join(line.strip() for line in wrapped if line)


def layer_ticks(axis: Any, count: int, most: int = 17, of: int | None = None) -> None:
    """Whole numbers on an axis of layers, ever fewer the more layers there are.

    Args:
        axis: the axis.
        count: number of layers.
        most: number of ticks at most.
        of: number of layers that the ticks at most are for; `count` if None.
    """
    step = next(step for step in (1, 2, 4, 5, 10, 20, 50, 10**9) if (of or count) / step <= most)
    axis.set_ticks(range(0, count, step))


def heat_map(figure: Any, axes: Any, values: np.ndarray, names: Sequence[str], unit: str, top: float | None) -> None:
    """Grey cells of (row, layer); what is not finite is hatched.

    Args:
        figure: the figure.
        axes: where to draw.
        values: (rows, layers).
        names: of the rows.
        unit: what the greys mean, for the colour bar.
        top: value of black; the largest value if None.
    """
    from matplotlib.colors import LogNorm, Normalize

    rows, layers = values.shape
    masked = np.ma.masked_invalid(values)
    high = top if top is not None else float(masked.max()) if masked.count() else 1.0
    norm: Any = Normalize(0, high if high > 0 else 1)
    positive = masked.compressed()[masked.compressed() > 0]
    # a few large values would leave all others white
    if top is None and len(positive) > 1 and high > 30 * float(np.median(positive)):
        norm = LogNorm(max(float(positive.min()), high / 1e4), high)
        masked = np.ma.masked_array(np.maximum(masked.filled(0), norm.vmin), masked.mask)
        unit += ", log scale"
    mesh = axes.pcolormesh(
        np.arange(layers + 1) - 0.5, np.arange(rows + 1) - 0.5, masked, cmap="Greys", norm=norm,
        edgecolors="0.85" if layers <= 40 else "none", linewidth=0.4,
    )  # fmt: skip
    axes.patch.set(hatch="//////", edgecolor="0.6", facecolor="white")
    axes.invert_yaxis()
    axes.set_yticks(range(rows), names)
    axes.tick_params(length=2.5)
    layer_ticks(axes.xaxis, layers)
    if layers <= 12:
        for row, layer in zip(*np.nonzero(~np.ma.getmaskarray(masked)), strict=True):
            dark = norm(masked[row, layer]) > 0.55
            axes.text(
                layer, row, f"{values[row, layer]:#.2g}", ha="center", va="center", fontsize=7,
                color="white" if dark else "black",
            )  # fmt: skip
    figure.colorbar(mesh, ax=axes, label=unit, pad=0.01, fraction=0.06, aspect=max(8, 4 * rows))
