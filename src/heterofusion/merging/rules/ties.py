"""TIES: small entries go, a sign is elected, and those that agree with it are averaged."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from heterofusion.merging.rules.rule import DENSITY, LAMBDA, Merged, Rule, share_count, total
from heterofusion.merging.tau import Matrices, Updates, magnitude_thresholds
from heterofusion.runtime.flags import flag


@dataclass(frozen=True)
class Ties(Rule):
    """Mean of the largest entries that agree in sign.

    Of every expert, the `density` of entries that are largest by magnitude, over all modules; the elected sign of an
    entry is that of their sum, where they cancel out that of most entries; `lambda` times the mean of those that have
    it (TIES, arXiv 2306.01708).
    """

    merge_lambda: float = flag(1.0, **LAMBDA)
    density: float = flag(0.2, **DENSITY)

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
    """The mean of those matrices whose sign is the elected one, entry by entry; 0 where there is none."""
    majority = majority_sign(total(matrices.of(path)) for path in matrices.walk("majority sign"))

    def merged(path: str) -> list:
        updates = matrices.of(path)
        sign = total(updates).sign_()
        sign.masked_fill_(sign == 0, majority)
        mean, count = torch.zeros_like(sign), torch.zeros_like(sign)
        for update in updates.values():
            agrees = update * sign > 0
            mean += torch.where(agrees, update, 0)
            count += agrees
        return [mean.div_(count.clamp_(min=1))]

    return merged


def majority_sign(sums: Iterable[Tensor]) -> float:
    """The sign that most entries of all modules have; -1 where both have as many, as in TIES' own code."""
    balance = sum(int(entry.sign().sum(dtype=torch.float64)) for entry in sums)
    return 1.0 if balance > 0 else -1.0
