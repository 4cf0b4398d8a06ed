"""Merging LoRA experts of one base into one adapter, module by module.

All methods work on the updates `tau_i = w_i s_i B_i A_i` (weight w_i, scaling s_i), never on A and B apart, and on one
module's updates of all experts at a time. What a method needs to know of all modules first, such as a threshold, is
collected in passes of its own, in which the updates are made anew. The results stay factored: they are low-rank anyway
(stacked factors, KnOTS), or are cut to a rank by SVD.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from heterofusion.adapters.lora import LoraAdapter, LoraModule
from heterofusion.merging.arguments import PER_TASK, MergeError, MergeSettings
from heterofusion.merging.arithmetic import (
    agreeing_mean,
    crumbs,
    drop,
    drop_by_rank,
    elected_sign,
    majority_sign,
    masked,
    seeded_generator,
    share_count,
    total,
    trim,
    unified,
)
from heterofusion.merging.factors import Factors, Truncation, cut, joint_basis, truncated
from heterofusion.merging.threshold import magnitude_thresholds

_ELECTING = ("ties", "dare_ties", "della", "knots_ties")
Blocks = Callable[[str], dict[int, Tensor]]  # matrices of a module, by expert


def dense_update(module: LoraModule, weight: float, device: torch.device) -> Tensor:
    """tau of one expert's module, `weight * scaling * B A`.

    Returns:
        (out_features, in_features) in float32, on `device`.
    """
    return (module.lora_B.to(device).float() @ module.lora_A.to(device).float()).mul_(weight * module.scaling)


@dataclass
class MergedAdapter:
    """One result of a merge, before `merge_lambda`.

    Attributes:
        factors: A (rank, in_features) and B (out_features, rank) by module, float32 on the CPU.
        truncation: what cutting the rank lost.
    """

    factors: dict[str, Factors] = field(default_factory=dict)
    truncation: Truncation = field(default_factory=Truncation)

    def add(self, path: str, factors: Factors, kept: float, energy: float) -> None:
        """Take a module's factors, and the energy (squared Frobenius norm) of them and of the whole update."""
        self.factors[path] = factors
        self.truncation.add(path, factors[0].shape[0], kept, energy)


class Merger:
    """Merges the same experts by any method; what settings share (the SVDs of KnOTS) is computed once.

    Args:
        experts: adapters of one base, as `check_experts` passes them.
        device: where dense updates are made.
        progress: whether to show progress bars.
    """

    def __init__(self, experts: Sequence[LoraAdapter], device: torch.device, progress: bool = True) -> None:
        self.experts, self.device, self.progress = list(experts), device, progress
        self.modules: dict[str, dict[int, LoraModule]] = {}
        for index, expert in enumerate(experts):
            for path, module in expert.modules.items():
                self.modules.setdefault(path, {})[index] = module
        self._bases: tuple[tuple[float, ...], dict[str, tuple[Tensor, dict[int, Tensor]]]] | None = None

    # ---- results ----

    def merge(self, settings: MergeSettings, rank: int | None = None) -> list[MergedAdapter]:
        """Merge into factors.

        Args:
            settings: the method; its `merge_lambda` is not applied.
            rank: the highest rank of a module; the sum of the experts' ranks by default.

        Returns:
            One adapter; of `emr`, one per expert.

        Raises:
            MergeError: the experts do not go with the method.
        """
        settings = settings.without_lambda()
        if settings.method in ("average", "task_arithmetic"):
            return [self._stack(settings, rank)]
        if settings.method.startswith("knots"):
            return [self._merge_in_joint_basis(settings, rank)]
        results = [MergedAdapter() for _ in (self.experts if settings.method == PER_TASK else [None])]
        updates = self._dense_updates(settings)
        for path in self._bar(f"merging ({settings.method})"):
            highest = min(*self._shape(path), rank or self._rank_sum(path, settings.weights))
            self._add_truncated(results, updates(path), path, highest)
        return results

    @staticmethod
    def _add_truncated(results: Sequence[MergedAdapter], updates: Iterator[Tensor], path: str, rank: int) -> None:
        for result, update in zip(results, updates, strict=True):  # in a function: none outlives its module
            result.add(path, *truncated(update, rank))

    def dense(self, settings: MergeSettings) -> list[Callable[[str], Tensor]]:
        """The merged updates as they are, before their rank is cut, `merge_lambda` applied.

        Args:
            settings: the method.

        Returns:
            One function, of `emr` one per expert, that makes the update (out_features, in_features) of a module.
        """
        if settings.method in ("average", "task_arithmetic") or settings.method.startswith("knots"):
            (merged,) = self.merge(settings)  # exact

            def product(path: str) -> Tensor:
                A, B = merged.factors[path]
                return (B.to(self.device) @ A.to(self.device)).mul_(settings.merge_lambda)

            return [product]
        updates = self._dense_updates(settings)

        def one(index: int) -> Callable[[str], Tensor]:
            def update(path: str) -> Tensor:
                for position, found in enumerate(updates(path)):
                    if position == index:
                        return found.mul_(settings.merge_lambda)
                raise IndexError(index)

            return update

        return [one(index) for index in range(len(self.experts) if settings.method == PER_TASK else 1)]

    # ---- exact methods ----

    def _stack(self, settings: MergeSettings, rank: int | None) -> MergedAdapter:
        """`sum c_i s_i B_i A_i` as `[c_1 s_1 B_1, ...] [A_1; ...]`."""
        divisor = sum(settings.weights) if settings.method == "average" else 1.0
        result = MergedAdapter()
        for path in self._bar(f"merging ({settings.method})"):
            out, columns = self._shape(path)
            A, B = [torch.zeros(1, columns)], [torch.zeros(out, 1)]  # for modules of experts with weight 0 alone
            for index, module in self._active(path, settings.weights).items():
                A.append(module.lora_A.float())
                B.append(module.lora_B.float() * (settings.weights[index] * module.scaling / divisor))
            first = 1 if len(A) > 1 else 0
            result.add(path, *cut((torch.cat(A[first:]), torch.cat(B[first:], dim=1)), rank))
        return result

    def _merge_in_joint_basis(self, settings: MergeSettings, rank: int | None) -> MergedAdapter:
        """KnOTS: `[tau_1 .. tau_N] = U S [V_1 .. V_N]^T`, the V_i merged, `U S` put before (arXiv 2410.19735)."""
        bases = self._joint_bases(settings.weights)

        def blocks(path: str) -> dict[int, Tensor]:
            return {index: V.to(self.device, copy=True) for index, V in bases[path][1].items()}

        shapes = {path: (US.shape[1], self._shape(path)[1]) for path, (US, _) in bases.items()}
        updates = self._updates(settings, blocks, shapes)
        result = MergedAdapter()
        for path in self._bar(f"merging ({settings.method})"):
            (merged,) = updates(path)
            result.add(path, *cut((merged.cpu(), bases[path][0]), rank))
        return result

    def _joint_bases(self, weights: tuple[float, ...]) -> dict[str, tuple[Tensor, dict[int, Tensor]]]:
        if self._bases is None or self._bases[0] != weights:
            bases = {}
            for path in self._bar("joint SVD"):
                scaled = {
                    index: (module.lora_A, module.lora_B.float() * (weights[index] * module.scaling))
                    for index, module in self._active(path, weights).items()
                }
                bases[path] = joint_basis(scaled, self._shape(path))
            self._bases = weights, bases
        return self._bases[1]

    # ---- dense methods ----

    def _dense_updates(self, settings: MergeSettings) -> Callable[[str], Iterator[Tensor]]:
        def blocks(path: str) -> dict[int, Tensor]:
            return {
                index: dense_update(module, settings.weights[index], self.device)
                for index, module in self._active(path, settings.weights).items()
            }

        if settings.method == PER_TASK:
            return self._masked_updates(blocks)
        return self._updates(settings, blocks, {path: self._shape(path) for path in self.modules})

    def _updates(
        self, settings: MergeSettings, blocks: Blocks, shapes: Mapping[str, tuple[int, int]]
    ) -> Callable[[str], Iterator[Tensor]]:
        """The merged matrix of a module, after the passes that look at all modules.

        Args:
            settings: the method.
            blocks: the experts' matrices of a module, made anew on every call.
            shapes: (rows, columns) of a module's matrix, for what no expert of any weight has.
        """
        values = settings.hyperparameters

        def dropped(path: str) -> dict[int, Tensor]:
            matrices = blocks(path)
            if settings.seed is None:
                return matrices
            for index, matrix in matrices.items():
                noise = seeded_generator(settings.seed, index, path, matrix.device)
                if settings.method == "della":
                    matrices[index] = drop_by_rank(matrix, values["drop_rate"], values["epsilon"], noise)
                else:
                    matrices[index] = drop(matrix, values["drop_rate"], noise)
            return matrices

        thresholds: dict[int, float] = {}
        if settings.method in ("ties", "dare_ties", "knots_ties") and values["density"] < 1:
            count = max(1, share_count(values["density"], sum(rows * columns for rows, columns in shapes.values())))
            counts = {index: count for index, weight in enumerate(settings.weights) if weight}
            thresholds = magnitude_thresholds(dropped, lambda: self._bar("thresholds"), counts)

        def sparse(path: str) -> list[Tensor]:
            matrices = dropped(path)
            for index, matrix in matrices.items():
                if thresholds:
                    matrices[index] = trim(matrix, thresholds[index])
                elif settings.method == "breadcrumbs":
                    matrices[index] = crumbs(matrix, values["density"], values["gamma"])
            return [*matrices.values()] or [torch.zeros(shapes[path], device=self.device)]

        if settings.method not in _ELECTING:
            return lambda path: iter([total(sparse(path))])
        majority = majority_sign(total(sparse(path)) for path in self._bar("majority sign"))

        def elected(path: str) -> Iterator[Tensor]:
            matrices = sparse(path)
            yield agreeing_mean(matrices, elected_sign(matrices, majority))

        return elected

    def _masked_updates(self, blocks: Blocks) -> Callable[[str], Iterator[Tensor]]:
        """EMR: a masked and rescaled copy of the unified update for every expert."""
        own, shared = [0.0] * len(self.experts), [0.0] * len(self.experts)
        for path in self._bar("mask scales"):
            self._add_norms(blocks(path), own, shared)
        for expert, mine, kept in zip(self.experts, own, shared, strict=True):
            if mine == 0:
                raise MergeError(f"adapter {expert.name}: its update is 0, so emr cannot scale it; leave it out")
            if kept == 0:
                raise MergeError(
                    f"adapter {expert.name}: the others outweigh it with the opposite sign everywhere, so that emr's "
                    "mask leaves it nothing; leave it out"
                )
        scales = [mine / kept for mine, kept in zip(own, shared, strict=True)]

        def updates(path: str) -> Iterator[Tensor]:
            matrices = blocks(path)
            together = unified([*matrices.values()])
            for index, scale in enumerate(scales):
                if index in matrices:
                    yield masked(together, matrices[index]).mul_(scale)
                else:
                    yield torch.zeros_like(together)

        return updates

    @staticmethod
    def _add_norms(matrices: Mapping[int, Tensor], own: list[float], shared: list[float]) -> None:
        """Add a module's L1 norms of each expert's update and of its mask of the unified one."""
        together = unified([*matrices.values()])
        for index, matrix in matrices.items():
            own[index] += float(matrix.abs().sum(dtype=torch.float64))
            shared[index] += float(masked(together, matrix).abs().sum(dtype=torch.float64))

    # ---- modules ----

    def _active(self, path: str, weights: Sequence[float]) -> dict[int, LoraModule]:
        """A module of the experts that have it and count."""
        return {index: module for index, module in self.modules[path].items() if weights[index]}

    def _shape(self, path: str) -> tuple[int, int]:
        module = next(iter(self.modules[path].values()))
        return module.out_features, module.in_features

    def _rank_sum(self, path: str, weights: Sequence[float]) -> int:
        return sum(module.rank for module in self._active(path, weights).values()) or 1

    def _bar(self, what: str) -> Any:
        # a bar that is soon done would only flicker
        return tqdm(self.modules, desc=what, unit="module", disable=not self.progress, leave=False, delay=2)
