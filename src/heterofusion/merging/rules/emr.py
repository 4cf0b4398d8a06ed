"""EMR: one unified update, and for every task a mask and a scale of it."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from heterofusion.merging.rules.rule import Merged, Rule, total
from heterofusion.merging.tau import Updates
from heterofusion.runtime.errors import UserError


@dataclass(frozen=True)
class Emr(Rule):
    """Elect, mask and rescale: one adapter per expert, which needs the task at inference.

    `tau_uni` has the sign of the sum and the largest magnitude among the updates that agree with it. Task i gets
    `lambda_i M_i tau_uni` with `M_i = [tau_i agrees]` and `lambda_i = sum |tau_i| / sum |M_i tau_uni|`, over all
    modules (EMR-Merging, arXiv 2405.17461).
    """

    per_task = True

    def merge(self, updates: Updates) -> Merged:
        matrices, experts = updates.dense, range(len(updates.names))
        own, shared = [0.0 for _ in experts], [0.0 for _ in experts]
        for path in matrices.walk("mask scales"):
            _add_norms(matrices.of(path), own, shared)
        for name, mine, kept in zip(updates.names, own, shared, strict=True):
            if not mine or not kept:
                reason = "the others outweigh it with the opposite sign everywhere" if mine else "its update is 0"
                raise UserError(f"adapter {name}: {reason}, so emr cannot scale it; leave it out")

        def merged(path: str) -> list:
            found = matrices.of(path)
            together = unified(found)
            nothing = torch.zeros_like(together)
            return [masked(together, found[i]).mul_(own[i] / shared[i]) if i in found else nothing for i in experts]

        return merged


def _add_norms(matrices: Mapping[int, Tensor], own: list[float], shared: list[float]) -> None:
    """Add a module's L1 norms of each expert's update and of its mask of the unified one."""
    together = unified(matrices)
    for expert, matrix in matrices.items():
        own[expert] += float(matrix.abs().sum(dtype=torch.float64))
        shared[expert] += float(masked(together, matrix).abs().sum(dtype=torch.float64))


def unified(updates: Mapping[int, Tensor]) -> Tensor:
    """The sign of the sum times the largest magnitude among the updates that have it."""
    sign = total(updates).sign_()
    largest = torch.zeros_like(sign)
    for update in updates.values():
        largest = torch.maximum(largest, torch.where(update * sign > 0, update.abs(), 0))
    return sign.mul_(largest)


def masked(unified_update: Tensor, update: Tensor) -> Tensor:
    """The unified update where an expert's own has its sign, 0 elsewhere."""
    return torch.where(unified_update.sign() * update > 0, unified_update, 0)
