"""Model Breadcrumbs: neither the largest entries of a row nor the many small ones."""

from dataclasses import dataclass

import torch
from torch import Tensor

from heterofusion.merging.rules.rule import DENSITY, LAMBDA, Merged, Rule, share_count, summed
from heterofusion.merging.tau import Updates
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.flags import flag


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
