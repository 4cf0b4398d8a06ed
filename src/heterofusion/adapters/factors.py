"""Pure tensor functions on a LoRA pair (A, B): the same update B A written with other factors.

Shapes everywhere: A (rank, in_features), B (out_features, rank). Work is done in float64 through thin QR, so the
dense update (out_features x in_features) is never formed.
"""

import torch
from torch import Tensor


def canonical_factors(A: Tensor, B: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor, float]:
    """The canonical pair of an update at any rank: `B A = U S V^T`, `A' = sqrt(S) V^T`, `B' = U sqrt(S)`.

    (A, B) is only defined up to (M A, B M^-1); this form depends on the product alone. Directions come by falling
    singular value, and the sign of each is fixed by making the entry of U with the largest magnitude positive. The
    product is exact where `rank` is enough, and its best approximation (Eckart-Young) where it is not.

    Args:
        A: (rank_in, in_features).
        B: (out_features, rank_in).
        rank: rank of the result, that of A by default; directions the update does not have are zero.

    Returns:
        A' (rank, in_features) and B' (out_features, rank) in float32, and the truncated energy: the share of
        `||B A||_F^2` that was cut, 0 to 1.
    """
    rank = A.shape[0] if rank is None else rank
    U, S, Vh = thin_svd(A, B)
    energy = S.square()
    total = float(energy.sum())
    truncated = float(energy[rank:].sum()) / total if total > 0 else 0.0
    U, S, Vh = U[:, :rank], S[:rank], Vh[:rank]
    largest = U.abs().argmax(dim=0, keepdim=True)  # (1, kept)
    signs = torch.where(U.gather(0, largest) < 0, -1.0, 1.0).squeeze(0).to(S)
    A_new = S.new_zeros(rank, Vh.shape[1])
    B_new = S.new_zeros(U.shape[0], rank)
    A_new[: len(S)] = (signs * S.sqrt()).unsqueeze(1) * Vh
    B_new[:, : len(S)] = U * (signs * S.sqrt())
    return A_new.float(), B_new.float(), truncated


def thin_svd(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular value decomposition of B A in float64, without forming it.

    Returns:
        U (out_features, k), S (k,) falling, Vh (k, in_features), with k = min(rank, out_features, in_features).
    """
    Q_B, R_B = torch.linalg.qr(B.double())  # (out, p), (p, rank)
    Q_A, R_A = torch.linalg.qr(A.double().T)  # (in, q), (q, rank)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    # rounding leaves about eps * S[0] where the rank is deficient, and its root would show in float32
    noise = S.amax() * torch.finfo(S.dtype).eps * max(A.shape)
    S = S.masked_fill(noise >= S, 0)
    return Q_B @ U, S, Vh @ Q_A.T
