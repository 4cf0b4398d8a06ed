"""KnOTS: other rules in a basis that the experts share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from heterofusion.merging.rules.dropping import Dare, dropped
from heterofusion.merging.rules.rule import Merged, summed
from heterofusion.merging.rules.ties import Ties, elected, trimmed
from heterofusion.merging.tau import Matrices, Updates


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
