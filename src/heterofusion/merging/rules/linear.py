"""Sums of updates, exact as stacked factors: the average and Task Arithmetic."""

from dataclasses import dataclass

import torch

from heterofusion.merging.rules.rule import Merged, Rule, factor
from heterofusion.merging.tau import Updates


@dataclass(frozen=True)
class Average(Rule):
    """Mean of the experts' updates.

    `sum_i w_i s_i B_i A_i / sum_i w_i`.
    """

    def merge(self, updates: Updates) -> Merged:
        return stacked(updates, 1 / sum(updates.weights))


@dataclass(frozen=True)
class TaskArithmetic(Rule):
    """Sum of the experts' updates.

    `lambda sum_i tau_i` (Task Arithmetic, arXiv 2212.04089).
    """

    merge_lambda: float = factor(0.3)

    def merge(self, updates: Updates) -> Merged:
        return stacked(updates, 1.0)


def stacked(updates: Updates, share: float) -> Merged:
    """`share * sum_i s_i B_i A_i` as `share [s_1 B_1, ...] [A_1; ...]`."""

    def merged(path: str) -> list:
        A, B = zip(*updates.factors(path).values(), strict=True)
        return [(torch.cat(A), torch.cat(B, dim=1) * share)]

    return merged
