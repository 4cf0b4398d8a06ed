"""EMR: one unified update, and for every task a mask and a scale of it."""

from collections.abc import Iterable, Mapping
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
        norms = torch.zeros(len(experts), 2, dtype=torch.float64)  # L1 norms of tau_i and of M_i tau_uni
        for path in matrices.walk("mask scales"):
            norms += torch.tensor(_norms(matrices.of(path), experts), dtype=torch.float64)
        for name, (_, shared) in zip(updates.names, norms.tolist(), strict=True):
            if not shared:
                raise UserError(f"adapter {name}: its update is 0, or outweighed everywhere; emr cannot scale it")
        scales = (norms[:, 0] / norms[:, 1]).tolist()

        def merged(path: str) -> list:
            found = masked(matrices.of(path))
            nothing = torch.zeros(matrices.shapes[path], device=updates.device)
            return [found[i].mul_(scales[i]) if i in found else nothing for i in experts]

        return merged


def _norms(updates: Mapping[int, Tensor], experts: Iterable[int]) -> list[list[float]]:
    parts = masked(updates)
    pairs = [(updates[i], parts[i]) if i in updates else () for i in experts]
    return [[float(matrix.abs().sum(dtype=torch.float64)) for matrix in pair] or [0.0, 0.0] for pair in pairs]


def masked(updates: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """By expert the unified update of a module, where its own agrees in sign; 0 elsewhere."""
    sign = total(updates).sign_()
    agreeing = {expert: update * sign > 0 for expert, update in updates.items()}
    largest = torch.zeros_like(sign)
    for expert, update in updates.items():
        largest = torch.maximum(largest, torch.where(agreeing[expert], update.abs(), 0))
    return {expert: torch.where(agrees, sign * largest, 0) for expert, agrees in agreeing.items()}
