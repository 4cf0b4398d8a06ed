"""Merged updates as factors (A, B): cut to a rank by an exact SVD, and the joint SVD of KnOTS.

Shapes everywhere: A (rank, in_features), B (out_features, rank), an update B A (out_features, in_features). Energy is
the squared Frobenius norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from scipy.linalg import eigh
from torch import Tensor

from heterofusion.adapters.factors import canonical_factors

Factors = tuple[Tensor, Tensor]  # A, B
_ROUNDING = 1e-12  # a share of energy below it is rounding of float64, not a loss


@dataclass
class Truncation:
    """The energy that modules lost when their rank was cut, 0 where nothing was.

    Attributes:
        shares: share of a module's energy that was lost, by path.
        kept: energy of what is left of all modules.
        energy: energy of all modules before.
        rank: the highest rank that a module has now.
    """

    shares: dict[str, float] = field(default_factory=dict)
    kept: float = 0.0
    energy: float = 0.0
    rank: int = 0

    def add(self, path: str, rank: int, kept: float, energy: float) -> None:
        """Add a module."""
        self.rank = max(self.rank, rank)
        self.shares[path] = max(0.0, 1 - kept / energy) if energy > 0 else 0.0
        self.kept += kept
        self.energy += energy

    def to_dict(self) -> dict[str, Any]:
        """Highest rank, and the share of the energy lost, of all modules and of the one that lost most."""
        worst = max(self.shares, key=lambda path: self.shares[path])
        lost = max(0.0, 1 - self.kept / self.energy) if self.energy > 0 else 0.0
        exact = lost < _ROUNDING
        return {"rank": self.rank, "exact": exact, "overall": lost, "max": self.shares[worst], "max_module": worst}


def truncated(update: Tensor, rank: int) -> tuple[Factors, float, float]:
    """The best approximation of a dense update at a rank (Eckart-Young).

    The leading singular vectors of the shorter side are the eigenvectors of its Gram matrix, which is exact (float64)
    and much cheaper than an SVD: of 4096 x 14336, an eigenvalue problem of size 4096.

    Args:
        update: (out_features, in_features) on any device.
        rank: at most the smaller of the two.

    Returns:
        A = sqrt(S) V^T and B = U sqrt(S) in float32 on the CPU, the energy that they keep, and that of the update.
    """
    D = update.double()
    energy = float(D.square().sum())
    tall = D.shape[0] > D.shape[1]
    D = D.T if tall else D  # (short, long)
    values, U = _leading_eigenvectors(D @ D.T, rank)  # (rank,), (short, rank)
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


def cut(factors: Factors, rank: int | None) -> tuple[Factors, float, float]:
    """Factors of at most a rank; as they are where they have no more.

    Returns:
        The factors, the energy that they keep, and that of the update before.
    """
    A, B = factors
    energy = float(((A.double() @ A.double().T) * (B.double().T @ B.double())).sum())  # trace(B^T B A A^T)
    if rank is None or A.shape[0] <= rank:
        return (A.contiguous(), B.contiguous()), energy, energy
    A, B, lost = canonical_factors(A, B, rank)
    return (A.contiguous(), B.contiguous()), energy * (1 - lost), energy


def joint_basis(pairs: Mapping[int, Factors], shape: tuple[int, int]) -> tuple[Tensor, dict[int, Tensor]]:
    """The SVD of updates side by side, `[B_1 A_1, ..., B_N A_N] = U S [V_1^T, ..., V_N^T]`, from their factors.

    With thin QR of the stacked B and of every A^T, only a matrix of the size of all ranks is decomposed; no update is
    formed. Directions without a singular value are left out.

    Args:
        pairs: A and B of each expert, by expert, scaled.
        shape: (out_features, in_features).

    Returns:
        U S (out_features, k) and V_i^T (k, in_features) by expert, float32 on the CPU, with k <= sum of the ranks.
        Without any direction, k is 1 and all is 0.
    """
    nothing = torch.zeros(shape[0], 1), {index: torch.zeros(1, shape[1]) for index in pairs}
    if not pairs:
        return nothing[0], {}
    Q, R = torch.linalg.qr(torch.cat([B.double() for _, B in pairs.values()], dim=1))  # (out, p), (p, sum of ranks)
    rows = [torch.linalg.qr(A.double().T) for A, _ in pairs.values()]  # (in, q_i), (q_i, rank_i)
    core = R @ torch.block_diag(*(R_A.T for _, R_A in rows))  # (p, sum of q_i)
    U, S, Vh = torch.linalg.svd(core, full_matrices=False)
    noise = S[0] * torch.finfo(S.dtype).eps * max(core.shape)
    kept = int((noise < S).sum())
    if kept == 0:
        return nothing
    parts = Vh[:kept].split([Q_A.shape[1] for Q_A, _ in rows], dim=1)  # (k, q_i) each
    V = {index: (part @ Q_A.T).float() for index, part, (Q_A, _) in zip(pairs, parts, rows, strict=True)}
    return ((Q @ U[:, :kept]) * S[:kept]).float(), V
