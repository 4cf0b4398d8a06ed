"""TIES: trim, elect a sign, and take the mean of those that agree with it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from heterofusion.merging.rules.rule import DENSITY, LAMBDA, Merged, Rule, share_count, total
from heterofusion.merging.tau import Matrices, Updates

_HALF = 16  # bits of a float32 that each of the two passes for a threshold looks at
_MASK = (1 << _HALF) - 1


@dataclass(frozen=True)
class Ties(Rule):
    """Mean of the largest entries that agree in sign.

    Of every expert, the `density` of entries that are largest by magnitude, over all modules; the elected sign of an
    entry is that of their sum, where they cancel out that of most entries; `lambda` times the mean of those that have
    it (TIES, arXiv 2306.01708).
    """

    merge_lambda: float = field(default=1.0, metadata=LAMBDA)
    density: float = field(default=0.2, metadata=DENSITY)

    def merge(self, updates: Updates) -> Merged:
        return elected(trimmed(updates.dense, self.density))


def trimmed(matrices: Matrices, density: float) -> Matrices:
    """Matrices with but the largest entries of each expert, by magnitude over all modules; the others are 0."""
    if density == 1:
        return matrices
    count = share_count(density, sum(rows * columns for rows, columns in matrices.shapes.values()))
    thresholds = magnitude_thresholds(matrices, max(1, count))
    return matrices.map(lambda matrix, expert, _: torch.where(matrix.abs() >= thresholds[expert], matrix, 0))


def elected(matrices: Matrices) -> Merged:
    """The mean of those matrices whose sign is the elected one, entry by entry."""
    majority = majority_sign(total(matrices.of(path)) for path in matrices.walk("majority sign"))

    def merged(path: str) -> list:
        updates = matrices.of(path)
        sign = total(updates).sign_()
        return [agreeing_mean(updates, sign.masked_fill_(sign == 0, majority))]

    return merged


def majority_sign(sums: Iterable[Tensor]) -> float:
    """The sign that most entries of all modules have; -1 where both have as many, as in TIES' own code."""
    balance = sum(int(entry.sign().sum(dtype=torch.float64)) for entry in sums)
    return 1.0 if balance > 0 else -1.0


def agreeing_mean(updates: Mapping[int, Tensor], sign: Tensor) -> Tensor:
    """The mean of those updates that have a sign, entry by entry; 0 where there is none."""
    mean, count = torch.zeros_like(sign), torch.zeros_like(sign)
    for update in updates.values():
        agrees = update * sign > 0
        mean += torch.where(agrees, update, 0)
        count += agrees
    return mean.div_(count.clamp_(min=1))


def magnitude_thresholds(matrices: Matrices, count: int) -> dict[int, float]:
    """The exact `count`-th largest magnitude of each expert's entries, which are never held together.

    The bit patterns of non-negative float32 numbers, read as integers, are in the order of the numbers. So a histogram
    of their upper halves finds the bin of the k-th largest, and one of the lower halves within that bin finds the
    number itself: two passes, with 64 Ki counters per expert.

    Args:
        matrices: of all modules. Those that an expert lacks count as 0.
        count: k, at least 1.

    Returns:
        The k-th largest magnitude by expert; 0 where fewer than k entries differ from 0.
    """
    patterns: dict[int, int] = {}  # the bits of the number that are known
    rest: dict[int, int] = {}  # which of the entries with these bits it is, counted from the largest
    for known in (None, patterns):
        histograms: dict[int, Tensor] = {}
        for path in matrices.walk("thresholds"):
            _count(histograms, matrices.of(path), known)
        for expert, histogram in histograms.items():
            if patterns.get(expert, 0) == 0:
                histogram[0] = count  # holds 0, what is denormal, and what the expert lacks: it never runs short
            at_least = histogram.flip(0).cumsum(0)  # entries in the last n + 1 bins
            place = int(torch.searchsorted(at_least, rest.get(expert, count)))
            rest[expert] = rest.get(expert, count) - (int(at_least[place - 1]) if place else 0)
            patterns[expert] = (patterns.get(expert, 0) << _HALF) + _MASK - place
    return {e: float(torch.tensor(bits, dtype=torch.int32).view(torch.float32)) for e, bits in patterns.items()}


def _count(histograms: dict[int, Tensor], matrices: Mapping[int, Tensor], upper: Mapping[int, int] | None) -> None:
    """Count the upper halves of a module's entries, or the lower ones of those with a given upper half."""
    for expert, matrix in matrices.items():
        bits = matrix.abs().flatten().view(torch.int32)
        bits = bits >> _HALF if upper is None else bits[bits >> _HALF == upper[expert]] & _MASK
        histograms[expert] = torch.bincount(bits, minlength=_MASK + 1).cpu() + histograms.get(expert, 0)
