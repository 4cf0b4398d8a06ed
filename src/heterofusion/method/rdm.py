"""Rectified distribution matching (RDM): a sliced Wasserstein pull of rectified embeddings to a rectified Gaussian.

METHOD section "RDM regularizer". Both sets are projected on random unit directions, sorted, and compared.
"""

import torch
from torch import Tensor

from heterofusion.method.config import MethodConfig


def sliced_distance(
    z: Tensor, noise: Tensor, directions: Tensor, mu: float, sigma: float, mask: Tensor | None = None
) -> Tensor:
    """RDM of given draws.

    Args:
        z: (S, M, e): S sets of M embeddings, compared set by set.
        noise: (S, M, e) standard normal draws.
        directions: (e, P), any length of the columns; they are scaled to unit length here.
        mu: mean of the Gaussian before rectification.
        sigma: its standard deviation.
        mask: (S, M) bool, True at real embeddings; None if all are.

    Returns:
        Scalar: mean over the sets of mean over (M x P) of (sort(relu(z) D) - sort(relu(mu + sigma noise) D))^2.
    """
    unit = (directions / directions.norm(dim=0, keepdim=True)).T  # (P, e)
    found = unit @ torch.relu(z).transpose(1, 2)  # (S, P, M): sorting is fastest along the last dimension
    wanted = unit @ torch.relu(mu + sigma * noise).transpose(1, 2)
    if mask is None:
        return (found.sort().values - wanted.sort().values).square().mean()
    padding = ~mask.unsqueeze(1)  # (S, 1, M)
    found = found.masked_fill(padding, torch.inf).sort().values  # padding goes last
    wanted = wanted.masked_fill(padding, torch.inf).sort().values
    lengths = mask.sum(dim=1)  # (S,)
    beyond = torch.arange(z.shape[1], device=z.device) >= lengths.view(-1, 1, 1)  # (S, 1, M)
    gaps = (found - wanted).masked_fill(beyond, 0.0).square()
    return (gaps.sum(dim=(1, 2)) / (lengths * directions.shape[1])).mean()


def rdm_loss(z: Tensor, method: MethodConfig, generator: torch.Generator, mask: Tensor | None = None) -> Tensor:
    """RDM of embeddings as in `sliced_distance`, with fresh draws: the Gaussian, then the directions of all sets."""
    noise = torch.randn(z.shape, generator=generator, device=z.device, dtype=z.dtype)
    shape = z.shape[-1], method.rdm_projections
    directions = torch.randn(shape, generator=generator, device=z.device, dtype=z.dtype)
    return sliced_distance(z, noise, directions, method.rdm_mu, method.rdm_sigma, mask)
