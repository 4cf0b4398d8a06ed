"""Updates of which some entries are dropped, by size or at random: TIES, Model Breadcrumbs, DARE and DELLA."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from heterofusion.merging.rules.rule import Merged, Rule, factor, summed, total
from heterofusion.merging.tau import Matrices, magnitude_thresholds
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.flags import flag

_DENSITY = {
    "help": "Share of an expert's entries, of largest magnitude, that is kept; of breadcrumbs, a row's below gamma.",
    "range": "(0, 1]",
}
_DROP_RATE = {"help": "Share of entries that is dropped at random; the others are rescaled.", "range": "[0, 1)"}
_SEED = {"help": "Seed of what is dropped at random.", "range": "[0, inf)"}


@dataclass(frozen=True)
class Ties(Rule):
    """Mean of the largest entries that agree in sign.

    Of every expert, the `density` of entries that are largest by magnitude, over all modules; the elected sign of an
    entry is that of their sum, where they cancel out that of most entries; `lambda` times the mean of those that have
    it (TIES, arXiv 2306.01708).
    """

    merge_lambda: float = factor(1.0)
    density: float = flag(0.2, **_DENSITY)

    def combine(self, matrices: Matrices) -> Merged:
        return elected(trimmed(matrices, self.density))


@dataclass(frozen=True)
class Breadcrumbs(Rule):
    """Sum of the entries of middle size of every row.

    Of every row of an update, the `gamma` of largest entries by magnitude is set to 0, the next `density` is kept;
    then `lambda` times the sum (Model Breadcrumbs, arXiv 2312.06795; its beta is `density`, its alpha `lambda`).
    """

    merge_lambda: float = factor(0.4)
    density: float = flag(0.2, **_DENSITY)
    gamma: float = flag(0.1, help="Share of a row, of largest entries, that is set to 0.", range="[0, 1)")

    def combine(self, matrices: Matrices) -> Merged:
        return summed(matrices.map(lambda matrix, *_: crumbs(matrix, self.density, self.gamma)))


@dataclass(frozen=True)
class Dare(Rule):
    """Sum of updates with entries dropped at random.

    An entry is set to 0 with probability p = `drop_rate`, else divided by 1 - p, which keeps the expectation; then
    `lambda` times the sum (DARE, arXiv 2311.03099).
    """

    merge_lambda: float = factor(0.3)
    drop_rate: float = flag(0.5, **_DROP_RATE)
    seed: int = flag(0, **_SEED)

    def combine(self, matrices: Matrices) -> Merged:
        return summed(dropped(matrices, self.seed, partial(drop, drop_rate=self.drop_rate)))


@dataclass(frozen=True)
class DareTies(Dare):
    """TIES of updates with entries dropped at random.

    As `dare`, then as `ties` (arXiv 2311.03099). With a `density` of 1 it is that of PEFT and mergekit.
    """

    merge_lambda: float = factor(1.0)
    density: float = flag(0.2, **_DENSITY)

    def combine(self, matrices: Matrices) -> Merged:
        return elected(trimmed(dropped(matrices, self.seed, partial(drop, drop_rate=self.drop_rate)), self.density))


@dataclass(frozen=True)
class Della(Rule):
    """Mean of agreeing entries, of which the small ones are dropped more often.

    An entry is kept with probability `(1 - p - eps) + 2 eps rho`, where rho is its rank by magnitude within its row,
    0 for the smallest and 1 for the largest, and divided by that probability; then the mean of those that agree with
    the elected sign, times `lambda` (DELLA, arXiv 2406.11617).
    """

    merge_lambda: float = factor(1.1)
    drop_rate: float = flag(0.3, **_DROP_RATE)
    epsilon: float = flag(0.07, help="An entry's drop rate is this much higher or lower by rank.", range="[0, 1)")
    seed: int = flag(0, **_SEED)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.drop_rate + self.epsilon >= 1 or self.drop_rate < self.epsilon:
            raise UserError(
                f"--drop_rate {self.drop_rate} and --epsilon {self.epsilon}: drop_rate - epsilon and drop_rate + "
                "epsilon are probabilities and must lie between 0 and 1; lower --epsilon"
            )

    def combine(self, matrices: Matrices) -> Merged:
        change = partial(drop_by_rank, drop_rate=self.drop_rate, epsilon=self.epsilon)
        return elected(dropped(matrices, self.seed, change))


def trimmed(matrices: Matrices, density: float) -> Matrices:
    """Matrices with but the largest entries of each expert, by magnitude over all modules; the others are 0."""
    if density == 1:
        return matrices
    size = sum(rows * columns for rows, columns in matrices.shapes.values())
    thresholds = magnitude_thresholds(matrices, max(1, share_count(density, size)))
    return matrices.map(lambda matrix, expert, _: torch.where(matrix.abs() >= thresholds[expert], matrix, 0))


def elected(matrices: Matrices) -> Merged:
    """The mean of those matrices whose sign is the elected one, entry by entry; 0 where there is none."""
    # the sign that most entries of all modules have; -1 where both have as many, as in TIES' own code
    signs = (total(matrices.of(path)).sign().sum(dtype=torch.float64) for path in matrices.walk("majority sign"))
    majority = 1.0 if sum(map(int, signs)) > 0 else -1.0

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


def crumbs(update: Tensor, density: float, gamma: float) -> Tensor:
    """Of every row, what is left below the `gamma` of largest entries, up to a share of `density`."""
    top, kept = (share_count(share, update.shape[1]) for share in (gamma, density))
    order = update.abs().argsort(dim=1, descending=True, stable=True)[:, top : top + kept]
    return torch.zeros_like(update).scatter_(1, order, update.gather(1, order))


def share_count(share: float, size: int) -> int:
    """How many of `size` entries a share is, rounded down; what is an integer but for rounding is that integer."""
    return int(share * size + 1e-6)


def drop(update: Tensor, generator: torch.Generator, drop_rate: float) -> Tensor:
    """DARE: 0 with probability `drop_rate`, else divided by `1 - drop_rate`, entry by entry."""
    noise = torch.rand(update.shape, generator=generator, device=update.device)
    return torch.where(noise >= drop_rate, update / (1 - drop_rate), 0)


def drop_by_rank(update: Tensor, generator: torch.Generator, drop_rate: float, epsilon: float) -> Tensor:
    """DELLA's MagPrune of the rows of an update, as `Della` has it."""
    columns = update.shape[1]
    order = update.abs().argsort(dim=1, stable=True)
    ranks = torch.arange(columns, device=update.device, dtype=update.dtype) / max(columns - 1, 1)
    keep = torch.empty_like(update).scatter_(1, order, ranks.expand_as(order))  # rho
    keep = keep.mul_(2 * epsilon).add_(1 - drop_rate - epsilon)
    noise = torch.rand(update.shape, generator=generator, device=update.device)
    return torch.where(noise < keep, update / keep, 0)


def dropped(matrices: Matrices, seed: int, change: Callable[[Tensor, torch.Generator], Tensor]) -> Matrices:
    """Matrices with entries dropped, by noise that depends on seed, expert and path alone, whenever it is drawn."""

    def changed(matrix: Tensor, expert: int, path: str) -> Tensor:
        digest = hashlib.sha256(f"{seed}/{expert}/{path}".encode()).digest()
        noise = torch.Generator(matrix.device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return change(matrix, noise)

    return matrices.map(changed)
