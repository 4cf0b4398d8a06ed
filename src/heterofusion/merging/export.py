"""Merged updates as LoRA factors: exact where they come stacked, else cut to a rank by an exact SVD, the loss told.

Energy is the squared Frobenius norm.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig
from scipy.linalg import eigh
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from heterofusion.adapters.factors import canonical_factors
from heterofusion.adapters.lora import PREFIX
from heterofusion.merging.rules.rule import Merged
from heterofusion.merging.tau import Factors, Updates


@dataclass
class LowRank:
    """One result of a merge, before `merge_lambda`."""

    factors: dict[str, Factors] = field(default_factory=dict)  # by module, float32 on the CPU
    kept: float = 0.0  # energy of the factors
    whole: float = 0.0  # energy of the update

    @property
    def lost(self) -> float:
        """Share of the energy that was lost; below 1e-12 it is rounding of float64, not a loss."""
        lost = 1 - self.kept / self.whole if self.whole > 0 else 0.0
        return lost if lost > 1e-12 else 0.0

    @property
    def rank(self) -> int:
        """The highest of a module."""
        return max(A.shape[0] for A, _ in self.factors.values())

    def state_dict(self, scale: float, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors of an adapter of scaling 1, by PEFT's names."""
        return {
            f"{PREFIX}{path}.{name}.weight": tensor.to(dtype)
            for path, (A, B) in self.factors.items()
            for name, tensor in (("lora_A", A), ("lora_B", B * scale))
        }

    def config(self, base_model: str | None, modules: Iterable[str]) -> LoraConfig:
        """PEFT's config, with `lora_alpha = r` for each module; all `modules` of the base tell what names reach."""
        ranks = {path: A.shape[0] for path, (A, _) in self.factors.items()}
        r = Counter(ranks.values()).most_common(1)[0][0]
        others = {path: rank for path, rank in ranks.items() if rank != r}
        short = sorted({path.rpartition(".")[2] for path in ranks})
        reached = {path for path in modules if path.rpartition(".")[2] in short}
        return LoraConfig(
            task_type="CAUSAL_LM",
            inference_mode=True,
            base_model_name_or_path=base_model,
            r=r,
            lora_alpha=r,
            lora_dropout=0.0,
            rank_pattern=others,
            alpha_pattern=dict(others),
            target_modules=short if reached == ranks.keys() else sorted(ranks),
        )


def low_rank(merged: Merged, updates: Updates, rank: int | None = None) -> list[LowRank]:
    """What a rule merged as LoRA factors of at most a rank, by default the sum of the experts' ranks."""
    results: list[LowRank] = []
    for path in updates.dense.walk("merging"):
        found = [cut(update, rank or updates.rank(path)) for update in merged(path)]
        results = results or [LowRank() for _ in found]
        for result, (factors, kept, whole) in zip(results, found, strict=True):
            result.factors[path] = factors
            result.kept += kept
            result.whole += whole
    return results


def cut(update: Tensor | Factors, rank: int) -> tuple[Factors, float, float]:
    """The best approximation of an update at a rank (Eckart-Young); factors of no higher rank stay as they are.

    The leading singular vectors of the shorter side of a dense one are the eigenvectors of its Gram matrix, which is
    exact (float64) and much cheaper than an SVD: of 4096 x 14336, an eigenvalue problem of size 4096.

    Returns:
        A = sqrt(S) V^T and B = U sqrt(S) in float32 on the CPU, the energy that they keep, and that of the update.
    """
    if not isinstance(update, Tensor):
        A, B = update
        energy, lost = float(((A.double() @ A.double().T) * (B.double().T @ B.double())).sum()), 0.0  # of B A
        if A.shape[0] > rank:
            A, B, lost = canonical_factors(A, B, rank)
        return (A.contiguous(), B.contiguous()), energy * (1 - lost), energy
    D = update.double()
    energy = float(D.square().sum())
    tall = D.shape[0] > D.shape[1]
    D = D.T if tall else D  # (short, long)
    values, U = _leading_eigenvectors(D @ D.T, min(rank, D.shape[0]))  # (rank,), (short, rank)
    # eigenvalues below rounding are directions that the update does not have
    noise = values.amax() * torch.finfo(values.dtype).eps * D.shape[0]
    root = torch.where(values > noise, values, 0).pow(0.25)  # sqrt(S)
    inverse = torch.where(root > 0, 1 / root, 0)
    short, long = U * root, inverse.unsqueeze(1) * (U.T @ D)  # (short, rank), (rank, long)
    A, B = (short.T, long.T) if tall else (long, short)
    return (A.float().cpu().contiguous(), B.float().cpu().contiguous()), min(float(values.sum()), energy), energy


def _leading_eigenvectors(gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues of a Gram matrix, falling, and their vectors in columns."""
    if gram.device.type == "cpu":  # LAPACK finds a few of them three times faster than all, which is what torch has
        size = len(gram)
        values, vectors = map(torch.from_numpy, eigh(gram.numpy(), subset_by_index=[size - rank, size - 1]))
    else:
        values, vectors = torch.linalg.eigh(gram)
    return values[-rank:].flip(0).clamp_(min=0), vectors[:, -rank:].flip(1)


def merged_update(merged: Merged, factor: float, path: str, index: int = 0) -> Tensor:
    """A merged update of a module as one matrix, `factor` applied."""
    update = merged(path)[index]
    return update.mul(factor) if isinstance(update, Tensor) else (update[1] @ update[0]).mul_(factor)


@contextlib.contextmanager
def added(base: PreTrainedModel, update: Callable[[str], Tensor], paths: Iterable[str]) -> Iterator[None]:
    """Let layers of a base have weights with an update added, rounded once to their dtype; their own come back after.

    The layers get new parameters: one that is tied to another stays as it is there, and nothing has to be subtracted.
    """
    layers: dict[str, Any] = {path: base.get_submodule(path) for path in paths}
    own = {path: layer.weight for path, layer in layers.items()}
    try:
        for path, layer in layers.items():
            delta = update(path).to(own[path].device)
            new = own[path].detach().float() + (delta.T if isinstance(layer, Conv1D) else delta)
            layer.weight = nn.Parameter(new.to(own[path].dtype), requires_grad=False)
        yield
    finally:
        for path, layer in layers.items():
            layer.weight = own[path]
