"""What rules merge: the updates `tau_i = w_i s_i B_i A_i` of experts on one base, never A and B apart.

Updates are made module by module and anew whenever they are asked for, so that no more than one module's are held at
a time. Shapes everywhere: A (rank, in_features), B (out_features, rank), an update (out_features, in_features).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from tqdm.auto import tqdm

from heterofusion.adapters.factors import thin_svd
from heterofusion.adapters.lora import LoraAdapter, LoraModule

Factors = tuple[Tensor, Tensor]  # A, B

_HALF = 16  # bits of a float32 that each of the two passes for a threshold looks at
_MASK = (1 << _HALF) - 1


@dataclass(frozen=True)
class Matrices:
    """Float32 matrices of experts, by module."""

    shapes: Mapping[str, tuple[int, int]]  # (rows, columns) by the path of a module
    of: Callable[[str], dict[int, Tensor]]  # makes a module's, by the position of the expert; some may lack it

    def walk(self, what: str) -> Iterator[str]:
        """The paths of all modules, for a pass over them."""
        yield from tqdm(self.shapes, desc=what, unit="module", leave=False, delay=2)

    def map(self, change: Callable[[Tensor, int, str], Tensor]) -> "Matrices":
        """The same with every matrix changed: a function of the matrix, the expert's position and the path."""

        def of(path: str) -> dict[int, Tensor]:
            matrices = self.of(path)
            for expert in matrices:  # one by one, so that no two of an expert are held
                matrices[expert] = change(matrices[expert], expert, path)
            return matrices

        return Matrices(self.shapes, of)


class Updates:
    """The updates of experts, in whatever form a rule wants them; dense ones are made on a device.

    Each expert's is scaled by its weight, 1 by default; with 0, an expert counts as if it were not there.
    """

    def __init__(
        self,
        experts: Sequence[LoraAdapter],
        weights: Sequence[float] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.names = [expert.name for expert in experts]
        self.weights = [*weights] if weights else [1.0] * len(experts)
        self.device = torch.device(device)
        self.modules: dict[str, dict[int, LoraModule]] = {}
        for index, expert in enumerate(experts):
            for path, module in expert.modules.items() if self.weights[index] else ():
                self.modules.setdefault(path, {})[index] = module

    def rank(self, path: str) -> int:
        """Sum of the experts' ranks, with which a sum of their updates is exact."""
        return sum(module.rank for module in self.modules[path].values())

    def factors(self, path: str) -> dict[int, Factors]:
        """A and `w s B` of a module by expert, float32 on the CPU."""
        return {
            index: (module.lora_A.float(), module.lora_B.float() * (self.weights[index] * module.scaling))
            for index, module in self.modules[path].items()
        }

    @property
    def dense(self) -> Matrices:
        """The updates themselves."""
        modules = {path: next(iter(found.values())) for path, found in self.modules.items()}
        return Matrices(
            {path: (module.out_features, module.in_features) for path, module in modules.items()},
            lambda path: {i: dense_update(m, self.weights[i], self.device) for i, m in self.modules[path].items()},
        )

    @cached_property
    def joint(self) -> tuple[dict[str, Tensor], Matrices]:
        """By module, `U S` (out_features, k) and the `V_i^T` (k, in_features) of `joint_basis`; made once."""
        bases = {path: joint_basis(self.factors(path)) for path in self.dense.walk("joint SVD")}
        shapes = {path: (US.shape[1], self.dense.shapes[path][1]) for path, (US, _) in bases.items()}
        right = Matrices(shapes, lambda path: {i: V.to(self.device, copy=True) for i, V in bases[path][1].items()})
        return {path: US for path, (US, _) in bases.items()}, right


def dense_update(module: LoraModule, weight: float, device: torch.device) -> Tensor:
    """tau of one expert's module, `weight * scaling * B A`, in float32 on `device`."""
    return (module.lora_B.to(device).float() @ module.lora_A.to(device).float()).mul_(weight * module.scaling)


def joint_basis(factors: Mapping[int, Factors]) -> tuple[Tensor, dict[int, Tensor]]:
    """`[B_1 A_1, ..., B_N A_N] = U S [V_1^T, ..., V_N^T]`: U S (out_features, k) and V_i^T (k, in_features) by expert.

    In float32 on the CPU. Directions without a singular value are left out; without any, k is 1 and all is 0.
    """
    A, B = zip(*factors.values(), strict=True)
    U, S, Vh = thin_svd(torch.block_diag(*A), torch.cat(B, dim=1))  # Vh (k, N * in_features)
    k = max(1, int((S > 0).sum()))
    V = (Vh * (S > 0).unsqueeze(1))[:k].float().split(A[0].shape[1], dim=1)
    return (U * S)[:, :k].float(), dict(zip(factors, V, strict=True))


def magnitude_thresholds(matrices: Matrices, count: int) -> dict[int, float]:
    """The exact `count`-th largest magnitude of each expert's entries, which are never held together.

    The bit patterns of non-negative float32 numbers, read as integers, are in the order of the numbers. So a histogram
    of their upper halves finds the bin of the one that is looked for, and one of the lower halves within that bin the
    number itself: two passes, with 64 Ki counters per expert. It is 0 where fewer than `count` entries differ from 0.
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
