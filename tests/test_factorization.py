"""Other factors of the same update, compared with the dense singular value decomposition in float64."""

import pytest
import torch

from heterofusion.adapters.factors import canonical_factors, thin_svd


def pair(rank: int, in_features: int, out_features: int, seed: int = 0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, in_features, generator=generator) * 0.1
    B = torch.randn(out_features, rank, generator=generator) * 0.1
    return A.to(dtype), B.to(dtype)


def dense(A, B):
    return B.double() @ A.double()


def relative_error(actual, expected):
    return float((actual - expected).norm() / expected.norm())


SIZES = {
    "wide": (4, 40, 24),
    "tall": (4, 24, 40),
    "out below rank": (8, 40, 3),
    "in below rank": (8, 3, 40),
    "both below rank": (8, 5, 3),
    "rank one": (1, 20, 30),
    "out of one": (4, 20, 1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("rank", [None, 8, 9, 16])
def test_product_is_kept_at_equal_and_larger_rank(size, rank, dtype):
    A, B = pair(*size, dtype=dtype)
    A_new, B_new, truncated = canonical_factors(A, B, rank)
    wanted = rank or size[0]
    assert A_new.shape == (wanted, size[1])
    assert B_new.shape == (size[2], wanted)
    assert A_new.dtype == B_new.dtype == torch.float32
    assert relative_error(dense(A_new, B_new), dense(A, B)) < 1e-6
    assert truncated == 0.0


@pytest.mark.parametrize("size", [(8, 40, 24), (16, 40, 6)], ids=str)
@pytest.mark.parametrize("rank", [1, 2, 4, 5])
def test_smaller_rank_is_the_best_approximation(size, rank):
    A, B = pair(*size)
    A_new, B_new, truncated = canonical_factors(A, B, rank)
    U, S, Vh = torch.linalg.svd(dense(A, B), full_matrices=False)
    best = U[:, :rank] * S[:rank] @ Vh[:rank]
    assert relative_error(dense(A_new, B_new), best) < 1e-6
    expected = float(S[rank:].square().sum() / S.square().sum())
    assert truncated == pytest.approx(expected, rel=1e-9)
    lost = (dense(A, B) - dense(A_new, B_new)).norm() / dense(A, B).norm()
    assert truncated == pytest.approx(float(lost) ** 2, rel=1e-5)


def test_deficient_update_leaves_zero_directions():
    A, B = pair(8, 30, 20)
    A[4:], B[:, 6:] = A[:4], 0
    A_new, B_new, _ = canonical_factors(A, B)
    assert relative_error(dense(A_new, B_new), dense(A, B)) < 1e-6
    assert torch.equal(A_new[4:], torch.zeros(4, 30))
    assert torch.equal(B_new[:, 4:], torch.zeros(20, 4))


@pytest.mark.parametrize("rank", [2, 4, 6])
def test_zero_update_stays_zero(rank):
    A, B = pair(4, 12, 10)
    A_new, B_new, truncated = canonical_factors(A, torch.zeros_like(B), rank)
    assert torch.equal(A_new, torch.zeros(rank, 12))
    assert torch.equal(B_new, torch.zeros(10, rank))
    assert truncated == 0.0


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("rank", [2, 8, 16])
def test_form_depends_on_the_product_alone(size, rank):
    A, B = (tensor.double() for tensor in pair(*size))
    expected = canonical_factors(A, B, rank)
    for seed in range(2):
        M = torch.randn(len(A), len(A), generator=torch.Generator().manual_seed(seed)).double() + 2 * torch.eye(len(A))
        actual = canonical_factors(M @ A, B @ torch.linalg.inv(M), rank)
        torch.testing.assert_close(actual[0], expected[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(actual[1], expected[1], atol=1e-5, rtol=0)


def test_form_is_balanced_sorted_and_signed():
    A, B = pair(6, 40, 30)
    A_new, B_new, _ = canonical_factors(A, B)
    S = torch.linalg.svdvals(dense(A, B))[:6]
    # A' A'^T = B'^T B' = diag(S), falling
    torch.testing.assert_close(A_new.double() @ A_new.double().T, torch.diag(S), atol=1e-6, rtol=0)
    torch.testing.assert_close(B_new.double().T @ B_new.double(), torch.diag(S), atol=1e-6, rtol=0)
    largest = B_new.abs().argmax(dim=0)
    assert (B_new[largest, torch.arange(6)] > 0).all()


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_thin_svd_is_the_dense_one(size):
    A, B = pair(*size)
    U, S, Vh = thin_svd(A, B)
    k = min(size)
    assert (U.shape, S.shape, Vh.shape) == ((size[2], k), (k,), (k, size[1]))
    torch.testing.assert_close(S, torch.linalg.svdvals(dense(A, B))[:k], atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(U * S @ Vh, dense(A, B), atol=1e-12, rtol=0)
    torch.testing.assert_close(U.T @ U, torch.eye(k).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(Vh @ Vh.T, torch.eye(k).double(), atol=1e-12, rtol=0)
