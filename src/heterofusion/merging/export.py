"""Merged updates as LoRA factors: exact where they come stacked, else cut to a rank by an exact SVD, the loss told.

Energy is the squared Frobenius norm.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
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

_ROUNDING = 1e-12  # a share of energy below it is rounding of float64, not a loss


@dataclass
class LowRank:
    """One result of a merge, before `merge_lambda`."""

    factors: dict[str, Factors] = field(default_factory=dict)  # by module, float32 on the CPU
    energy: dict[str, tuple[float, float]] = field(default_factory=dict)  # by module, kept by the factors, and whole

    def lost(self, *paths: str) -> float:
        """Share of the energy of modules that was lost, of all by default."""
        kept, whole = map(sum, zip(*(self.energy[path] for path in paths or self.energy), strict=True))
        return max(0.0, 1 - kept / whole) if whole > 0 else 0.0

    def truncation(self) -> dict[str, Any]:
        """Highest rank, and the share of the energy lost, of all modules and of the one that lost most."""
        worst = max(self.energy, key=self.lost)
        return {
            "rank": max(A.shape[0] for A, _ in self.factors.values()),
            "exact": self.lost() < _ROUNDING,
            "overall": self.lost(),
            "max": self.lost(worst),
            "max_module": worst,
        }

    def state_dict(self, scale: float, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors of an adapter of scaling 1, by PEFT's names."""
        return {
            f"{PREFIX}{path}.{name}.weight": tensor.to(dtype)
            for path, (A, B) in self.factors.items()
            for name, tensor in (("lora_A", A), ("lora_B", B * scale))
        }

    def config(self, base_model: str | None, linear_layers: Sequence[str]) -> LoraConfig:
        """PEFT's config, with `lora_alpha = r` for each module; all `linear_layers` tell what short names reach."""
        ranks = {path: A.shape[0] for path, (A, _) in self.factors.items()}
        r = Counter(ranks.values()).most_common(1)[0][0]
        others = {path: rank for path, rank in ranks.items() if rank != r}
        short = sorted({path.rpartition(".")[2] for path in ranks})
        reached = {path for path in linear_layers if path.rpartition(".")[2] in short}
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
        _add(results, merged(path), path, rank or updates.rank(path))
    return results


def _add(results: list[LowRank], found: Sequence[Tensor | Factors], path: str, rank: int) -> None:
    """Add a module; a function, so that no update outlives its module."""
    results += [LowRank() for _ in found[len(results) :]]
    for result, update in zip(results, found, strict=True):
        factors, kept, whole = truncated(update, rank) if isinstance(update, Tensor) else cut(update, rank)
        result.factors[path], result.energy[path] = factors, (kept, whole)


def truncated(update: Tensor, rank: int) -> tuple[Factors, float, float]:
    """The best approximation of a dense update at a rank (Eckart-Young).

    The leading singular vectors of the shorter side are the eigenvectors of its Gram matrix, which is exact (float64)
    and much cheaper than an SVD: of 4096 x 14336, an eigenvalue problem of size 4096.

    Args:
        update: (out_features, in_features) on any device.
        rank: of the result, as far as the update's shape allows it.

    Returns:
        A = sqrt(S) V^T and B = U sqrt(S) in float32 on the CPU, the energy that they keep, and that of the update.
    """
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
    kept = float(values.sum())
    return (A.float().cpu().contiguous(), B.float().cpu().contiguous()), min(kept, energy), energy


def _leading_eigenvectors(gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues of a Gram matrix, falling, and their vectors in columns."""
    if gram.device.type == "cpu":
        # LAPACK finds a few of them three times faster than all, which is what torch has
        size = len(gram)
        values, vectors = map(torch.from_numpy, eigh(gram.numpy(), subset_by_index=[size - rank, size - 1]))
    else:
        values, vectors = torch.linalg.eigh(gram)
    return values[-rank:].flip(0).clamp_(min=0), vectors[:, -rank:].flip(1)


def cut(factors: Factors, rank: int) -> tuple[Factors, float, float]:
    """Factors of at most a rank, the energy that they keep, and that of the update; unchanged if they have no more."""
    A, B = factors
    energy = float(((A.double() @ A.double().T) * (B.double().T @ B.double())).sum())  # trace(B^T B A A^T)
    if A.shape[0] <= rank:
        return (A.contiguous(), B.contiguous()), energy, energy
    A, B, lost = canonical_factors(A, B, rank)
    return (A.contiguous(), B.contiguous()), energy * (1 - lost), energy


def linear_layers(model: nn.Module) -> list[str]:
    """Paths of what PEFT can put LoRA on in a base (on the meta device will do): all leaves with a matrix."""
    return [
        path
        for path, module in model.named_modules()
        if not list(module.children()) and getattr(getattr(module, "weight", None), "dim", lambda: 0)() == 2
    ]


@contextlib.contextmanager
def added(base: PreTrainedModel, update: Callable[[str], Tensor], paths: Iterable[str]) -> Iterator[None]:
    """Let layers of a base have weights with an update added, rounded once to their dtype; their own come back after.

    The layers get new parameters: one that is tied to another stays as it is there, and nothing has to be subtracted.
    """
    own: dict[str, nn.Parameter] = {}
    try:
        for path in paths:
            layer: Any = base.get_submodule(path)
            weight: nn.Parameter = layer.weight
            delta = update(path).to(weight.device)
            new = weight.detach().float() + (delta.T if isinstance(layer, Conv1D) else delta)
            own[path] = weight
            layer.weight = nn.Parameter(new.to(weight.dtype), requires_grad=False)
        yield
    finally:
        for path, weight in own.items():
            layer = base.get_submodule(path)
            layer.weight = weight
