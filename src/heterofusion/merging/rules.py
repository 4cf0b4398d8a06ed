"""The ten ways to merge, by the names of `recipes/merge.py --method`.

A rule is a frozen dataclass: its fields are its hyper-parameters and become flags, its docstring has the formula and
the paper; the first line of it is shown by `--help`.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from heterofusion.merging.tau import Factors, Matrices, Updates, magnitude_thresholds
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.flags import check_ranges, flag

# The merged update of a module by its path, dense or as A and B: one, or one per expert where the rule is `per_task`.
# What needs to be known of all modules first is found in passes before.
Merged = Callable[[str], list[Tensor | Factors]]

LAMBDA: dict[str, Any] = {"help": "Factor of the merged update.", "range": "(0, inf)"}
DENSITY: dict[str, Any] = {
    "help": "Share of an expert's entries, of largest magnitude, that is kept; of breadcrumbs, a row's below gamma.",
    "range": "(0, 1]",
}
DROP_RATE: dict[str, Any] = {
    "help": "Share of entries that is dropped at random; the others are rescaled.", "range": "[0, 1)"
}  # fmt: skip
SEED: dict[str, Any] = {"help": "Seed of what is dropped at random.", "range": "[0, inf)"}


class Rule:
    """A way to merge. All merged updates are linear in `merge_lambda`, which its user applies in the end."""

    merge_lambda: float = 1.0  # for rules without such a field
    per_task: ClassVar[bool] = False  # whether there is one result per expert, which needs the task at inference

    def __post_init__(self) -> None:
        check_ranges(self)

    def hyperparameters(self) -> dict[str, float]:
        """The values of its fields, the seed aside."""
        return {name: value for name, value in vars(self).items() if name != "seed"}

    def merge(self, updates: Updates) -> Merged:
        """Merge, but for `merge_lambda`."""
        raise NotImplementedError


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

    merge_lambda: float = flag(0.3, **LAMBDA)

    def merge(self, updates: Updates) -> Merged:
        return stacked(updates, 1.0)


def stacked(updates: Updates, factor: float) -> Merged:
    """`factor * sum_i s_i B_i A_i` as `factor [s_1 B_1, ...] [A_1; ...]`."""

    def merged(path: str) -> list:
        A, B = zip(*updates.factors(path).values(), strict=True)
        return [(torch.cat(A), torch.cat(B, dim=1) * factor)]

    return merged


def total(matrices: Mapping[int, Tensor]) -> Tensor:
    """Sum of the experts' matrices of a module, in their order."""
    first, *others = matrices.values()
    result = first.clone()
    for matrix in others:
        result += matrix
    return result


def summed(matrices: Matrices) -> Merged:
    """The merge that is the sum of the experts' matrices."""
    return lambda path: [total(matrices.of(path))]


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


def share_count(share: float, size: int) -> int:
    """How many of `size` entries a share is, rounded down; what is an integer but for rounding is that integer."""
    return int(share * size + 1e-6)


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


@dataclass(frozen=True)
class Breadcrumbs(Rule):
    """Sum of the entries of middle size of every row.

    Of every row of an update, the `gamma` of largest entries by magnitude is set to 0, the next `density` is kept;
    then `lambda` times the sum (Model Breadcrumbs, arXiv 2312.06795; its beta is `density`, its alpha `lambda`).
    """

    merge_lambda: float = flag(0.4, **LAMBDA)
    density: float = flag(0.2, **DENSITY)
    gamma: float = flag(0.1, help="Share of a row, of largest entries, that is set to 0.", range="[0, 1)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.density + self.gamma > 1 + 1e-9:
            raise UserError(f"--density {self.density} and --gamma {self.gamma} are more than a row; lower one")

    def merge(self, updates: Updates) -> Merged:
        return summed(updates.dense.map(lambda matrix, *_: crumbs(matrix, self.density, self.gamma)))


def crumbs(update: Tensor, density: float, gamma: float) -> Tensor:
    """Of every row, what is left below the `gamma` of largest entries, up to a share of `density`."""
    top, kept = (share_count(share, update.shape[1]) for share in (gamma, density))
    order = update.abs().argsort(dim=1, descending=True, stable=True)[:, top : top + kept]
    return torch.zeros_like(update).scatter_(1, order, update.gather(1, order))


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


@dataclass(frozen=True)
class KnotsTies(Ties):
    """TIES in the basis of the experts' joint SVD.

    `[tau_1 .. tau_N] = U S [V_1 .. V_N]^T`; the V_i are merged as by `ties`, then `U S` is put before (KnOTS, arXiv
    2410.19735). The rank is at most the sum of the ranks.
    """

    def merge(self, updates: Updates) -> Merged:
        return in_joint_basis(updates, lambda matrices: elected(trimmed(matrices, self.density)))


@dataclass(frozen=True)
class KnotsDare(Dare):
    """DARE in the basis of the experts' joint SVD.

    As `knots_ties`, with the V_i merged as by `dare` (KnOTS, arXiv 2410.19735).
    """

    def merge(self, updates: Updates) -> Merged:
        return in_joint_basis(updates, lambda matrices: summed(dropped(matrices, self.drop_rate, self.seed)))


def in_joint_basis(updates: Updates, rule: Callable[[Matrices], Merged]) -> Merged:
    """A rule on the V_i of the joint SVD, as factors with `U S` before."""
    left, right = updates.joint
    merge_right: Any = rule(right)
    return lambda path: [(merge_right(path)[0].cpu(), left[path])]


RULES: dict[str, type[Rule]] = {
    "average": Average, "task_arithmetic": TaskArithmetic, "ties": Ties, "dare": Dare, "dare_ties": DareTies,
    "della": Della, "breadcrumbs": Breadcrumbs, "emr": Emr, "knots_ties": KnotsTies, "knots_dare": KnotsDare,
}  # fmt: skip


def make_rule(method: str, values: Mapping[str, Any]) -> Rule:
    """A rule with some of its hyper-parameters given, the others those of its authors."""
    known = vars(RULES[method]())
    for name, value in values.items():
        if name not in known:
            listed = ", ".join(f"--{name}" for name in known) or "none"
            raise UserError(f"--{name} {value}: the hyper-parameters of {method} are {listed}; leave it out")
    return RULES[method](**values)
