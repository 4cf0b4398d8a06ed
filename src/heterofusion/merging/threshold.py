"""The exact k-th largest magnitude of tensors that come one at a time and are never held together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

_HALF = 16  # bits of a float32 that each of the two passes looks at
_BINS = 1 << _HALF


def magnitude_thresholds(
    blocks: Callable[[str], Mapping[int, Tensor]], passes: Callable[[], Iterable[str]], counts: Mapping[int, int]
) -> dict[int, float]:
    """Find for each expert the magnitude that its `count` largest entries reach.

    The bit patterns of non-negative float32 numbers, read as integers, are in the order of the numbers. So a histogram
    of their upper halves finds the bin of the k-th largest, and one of the lower halves within that bin finds the
    number itself: exact, in two passes, with 64 Ki counters per expert.

    Args:
        blocks: makes the float32 matrices of a module, by expert, the same every time. What it leaves out counts as 0.
        passes: starts a pass; gives the paths of all modules.
        counts: k by expert, at least 1.

    Returns:
        The k-th largest magnitude by expert; 0 where fewer than k entries differ from 0.
    """
    upper = {expert: torch.zeros(_BINS, dtype=torch.int64) for expert in counts}
    for path in passes():
        _count_upper(upper, blocks(path))
    bins, rest = {}, {}
    for expert, count in counts.items():
        upper[expert][0] = count  # bin 0 holds what is 0 or denormal, and what was left out: it never runs short
        bins[expert], rest[expert] = _descend(upper[expert], count)
    lower = {expert: torch.zeros(_BINS, dtype=torch.int64) for expert in counts}
    for path in passes():
        _count_lower(lower, bins, blocks(path))
    result = {}
    for expert, count in counts.items():
        if bins[expert] == 0:
            lower[expert][0] = count
        place, _ = _descend(lower[expert], rest[expert])
        pattern = torch.tensor((bins[expert] << _HALF) + place, dtype=torch.int32)
        result[expert] = float(pattern.view(torch.float32))
    return result


def _count_upper(histograms: Mapping[int, Tensor], matrices: Mapping[int, Tensor]) -> None:
    for expert, matrix in matrices.items():
        histograms[expert].add_(_histogram(_bits(matrix) >> _HALF))


def _count_lower(histograms: Mapping[int, Tensor], bins: Mapping[int, int], matrices: Mapping[int, Tensor]) -> None:
    for expert, matrix in matrices.items():
        bits = _bits(matrix)
        histograms[expert].add_(_histogram(bits[bits >> _HALF == bins[expert]] & (_BINS - 1)))


def _bits(matrix: Tensor) -> Tensor:
    return matrix.abs().flatten().view(torch.int32)


def _histogram(values: Tensor) -> Tensor:
    return torch.bincount(values, minlength=_BINS).cpu()


def _descend(histogram: Tensor, count: int) -> tuple[int, int]:
    """The bin that holds the `count`-th largest, and which of that bin's entries it is, counted from the largest."""
    at_least = histogram.flip(0).cumsum(0)  # entries in the last n + 1 bins
    place = int(torch.searchsorted(at_least, count))
    above = int(at_least[place - 1]) if place else 0
    return len(histogram) - 1 - place, count - above
