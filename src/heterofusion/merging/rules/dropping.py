"""Updates of which entries are dropped at random and the others rescaled: DARE and DELLA."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from heterofusion.merging.rules.rule import DENSITY, DROP_RATE, LAMBDA, SEED, Merged, Rule, summed
from heterofusion.merging.rules.ties import elected, trimmed
from heterofusion.merging.tau import Matrices, Updates
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.flags import flag


@dataclass(frozen=True)
class Dare(Rule):
    """Sum of updates with entries dropped at random.

    An entry is set to 0 with probability p = `drop_rate`, else divided by 1 - p, which keeps the expectation; then
    `lambda` times the sum (DARE, arXiv 2311.03099).
    """

    merge_lambda: float = flag(0.3, **LAMBDA)
    drop_rate: float = flag(0.5, **DROP_RATE)
    seed: int = flag(0, **SEED)

    def merge(self, updates: Updates) -> Merged:
        return summed(dropped(updates.dense, self.drop_rate, self.seed))


@dataclass(frozen=True)
class DareTies(Dare):
    """TIES of updates with entries dropped at random.

    As `dare`, then as `ties` (arXiv 2311.03099). With a `density` of 1 it is that of PEFT and mergekit.
    """

    merge_lambda: float = flag(1.0, **LAMBDA)
    density: float = flag(0.2, **DENSITY)

    def merge(self, updates: Updates) -> Merged:
        return elected(trimmed(dropped(updates.dense, self.drop_rate, self.seed), self.density))


@dataclass(frozen=True)
class Della(Rule):
    """Mean of agreeing entries, of which the small ones are dropped more often.

    An entry is kept with probability `(1 - p - eps) + 2 eps rho`, where rho is its rank by magnitude within its row,
    0 for the smallest and 1 for the largest, and divided by that probability; then the mean of those that agree with
    the elected sign, times `lambda` (DELLA, arXiv 2406.11617).
    """

    merge_lambda: float = flag(1.1, **LAMBDA)
    drop_rate: float = flag(0.3, **DROP_RATE)
    epsilon: float = flag(0.07, help="An entry's drop rate is this much higher or lower by rank.", range="[0, 1)")
    seed: int = flag(0, **SEED)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.drop_rate + self.epsilon >= 1 or self.drop_rate < self.epsilon:
            raise UserError(
                f"--drop_rate {self.drop_rate} and --epsilon {self.epsilon}: entries are dropped with probabilities "
                "from drop_rate - epsilon to drop_rate + epsilon, which must lie between 0 and 1; lower --epsilon"
            )

    def merge(self, updates: Updates) -> Merged:
        return elected(dropped(updates.dense, self.drop_rate, self.seed, partial(drop_by_rank, epsilon=self.epsilon)))


def drop(update: Tensor, drop_rate: float, generator: torch.Generator) -> Tensor:
    """DARE: 0 with probability `drop_rate`, else divided by `1 - drop_rate`, entry by entry."""
    noise = torch.rand(update.shape, generator=generator, device=update.device)
    return torch.where(noise >= drop_rate, update / (1 - drop_rate), 0)


def drop_by_rank(update: Tensor, drop_rate: float, generator: torch.Generator, epsilon: float) -> Tensor:
    """DELLA's MagPrune of the rows of an update, as `Della` has it."""
    columns = update.shape[1]
    order = update.abs().argsort(dim=1, stable=True)
    ranks = torch.arange(columns, device=update.device, dtype=update.dtype) / max(columns - 1, 1)
    keep = torch.empty_like(update).scatter_(1, order, ranks.expand_as(order))  # rho
    keep = keep.mul_(2 * epsilon).add_(1 - drop_rate - epsilon)
    noise = torch.rand(update.shape, generator=generator, device=update.device)
    return torch.where(noise < keep, update / keep, 0)


def dropped(matrices: Matrices, drop_rate: float, seed: int, change: Callable[..., Tensor] = drop) -> Matrices:
    """Matrices with entries dropped as `drop` does, or by another change; every matrix has noise of its own."""

    def changed(matrix: Tensor, expert: int, path: str) -> Tensor:
        return change(matrix, drop_rate, seeded_generator(seed, expert, path, matrix.device))

    return matrices.map(changed)


def seeded_generator(seed: int, expert: int, path: str, device: torch.device) -> torch.Generator:
    """A generator that depends on its arguments alone, so that a module's noise is the same whenever it is drawn."""
    digest = hashlib.sha256(f"{seed}/{expert}/{path}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
