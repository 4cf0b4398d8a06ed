"""The arithmetic of merging on the matrices of one module: dropping, trimming, electing signs. Pure tensor functions.

Every function takes and gives float32 matrices of one shape, (rows, columns), on any device. What spans all modules
(a threshold, a majority) is computed elsewhere and handed in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def seeded_generator(seed: int, expert: int, path: str, device: torch.device) -> torch.Generator:
    """A generator that depends on its arguments alone, so that a module's noise is the same whenever it is drawn.

    Args:
        seed: of the merge.
        expert: position of the expert.
        path: of the module.
        device: where the noise is drawn.
    """
    digest = hashlib.sha256(f"{seed}/{expert}/{path}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def drop(update: Tensor, drop_rate: float, generator: torch.Generator) -> Tensor:
    """DARE: set entries to 0 at random and rescale the others, which keeps the expectation (arXiv 2311.03099).

    Args:
        update: (rows, columns).
        drop_rate: p, the probability of each entry to be dropped; the others are divided by 1 - p.
        generator: on the device of `update`.
    """
    noise = torch.rand(update.shape, generator=generator, device=update.device)
    return torch.where(noise >= drop_rate, update / (1 - drop_rate), 0)


def drop_by_rank(update: Tensor, drop_rate: float, epsilon: float, generator: torch.Generator) -> Tensor:
    """DELLA's MagPrune: the larger an entry is within its row, the less likely it is dropped (arXiv 2406.11617).

    An entry is kept with probability `(1 - p - eps) + 2 eps rho`, where rho is its rank in the row by magnitude, 0 for
    the smallest and 1 for the largest; it is divided by that probability.

    Args:
        update: (rows, columns).
        drop_rate: p.
        epsilon: eps, half of the window.
        generator: on the device of `update`.
    """
    columns = update.shape[1]
    order = update.abs().argsort(dim=1, stable=True)
    ranks = torch.arange(columns, device=update.device, dtype=update.dtype) / max(columns - 1, 1)
    keep = torch.empty_like(update).scatter_(1, order, ranks.expand_as(order))  # rho
    keep = keep.mul_(2 * epsilon).add_(1 - drop_rate - epsilon)
    noise = torch.rand(update.shape, generator=generator, device=update.device)
    return torch.where(noise < keep, update / keep, 0)


def crumbs(update: Tensor, density: float, gamma: float) -> Tensor:
    """Model Breadcrumbs: of every row, neither the largest entries nor the many small ones (arXiv 2312.06795).

    Args:
        update: (rows, columns).
        density: beta, share of the row that is kept.
        gamma: share of the row, of largest magnitude, that is set to 0.
    """
    top = share_count(gamma, update.shape[1])
    kept = share_count(density, update.shape[1])
    order = update.abs().argsort(dim=1, descending=True, stable=True)[:, top : top + kept]
    return torch.zeros_like(update).scatter_(1, order, update.gather(1, order))


def trim(update: Tensor, threshold: float) -> Tensor:
    """TIES: keep the entries whose magnitude reaches a threshold (arXiv 2306.01708)."""
    return torch.where(update.abs() >= threshold, update, 0)


def share_count(share: float, total: int) -> int:
    """How many of `total` entries a share is, rounded down; what is an integer but for rounding is that integer."""
    return int(share * total + 1e-6)


def elected_sign(updates: Sequence[Tensor], majority: float = 0.0) -> Tensor:
    """TIES: the sign of the sum of updates, entry by entry.

    Args:
        updates: of one module, (rows, columns) each.
        majority: sign of the entries at which the updates cancel out, `majority_sign` of all modules.

    Returns:
        (rows, columns) of 1, -1, and of 0 where the sum is 0 and no majority is given.
    """
    sign = total(updates).sign_()
    return sign if majority == 0 else sign.masked_fill_(sign == 0, majority)


def majority_sign(sums: Iterable[Tensor]) -> float:
    """The sign that most entries of all modules have; -1 where both have as many, as in TIES' own code.

    Args:
        sums: the sum of the updates of each module.
    """
    balance = sum(int(entry.sign().sum(dtype=torch.float64)) for entry in sums)
    return 1.0 if balance > 0 else -1.0


def agreeing_mean(updates: Sequence[Tensor], sign: Tensor) -> Tensor:
    """TIES: the mean of those updates whose sign is the elected one, entry by entry; 0 where there is none."""
    mean, count = torch.zeros_like(sign), torch.zeros_like(sign)
    for update in updates:
        agrees = update * sign > 0
        mean += torch.where(agrees, update, 0)
        count += agrees
    return mean.div_(count.clamp_(min=1))


def unified(updates: Sequence[Tensor]) -> Tensor:
    """EMR: the elected sign times the largest magnitude among the updates that have it (arXiv 2405.17461)."""
    sign = elected_sign(updates)
    largest = torch.zeros_like(sign)
    for update in updates:
        largest = torch.maximum(largest, torch.where(update * sign > 0, update.abs(), 0))
    return sign.mul_(largest)


def masked(unified_update: Tensor, update: Tensor) -> Tensor:
    """EMR: the unified update where an expert's own has its sign, 0 elsewhere."""
    return torch.where(unified_update.sign() * update > 0, unified_update, 0)


def total(updates: Sequence[Tensor]) -> Tensor:
    """Sum of updates, in their order."""
    result = updates[0].clone()
    for update in updates[1:]:
        result += update
    return result
