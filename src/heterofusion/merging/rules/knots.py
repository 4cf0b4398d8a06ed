"""KnOTS: other rules in a basis that the experts share."""

from dataclasses import dataclass
from typing import Any

from heterofusion.merging.rules.rule import Merged, Rule
from heterofusion.merging.rules.sparse import Dare, Ties
from heterofusion.merging.tau import Updates


class InJointBasis(Rule):
    """A rule that combines the V_i of the joint SVD, as factors with `U S` before."""

    def merge(self, updates: Updates) -> Merged:
        left, right = updates.joint
        combined: Any = self.combine(right)
        return lambda path: [(combined(path)[0].cpu(), left[path])]


@dataclass(frozen=True)
class KnotsTies(InJointBasis, Ties):
    """TIES in the basis of the experts' joint SVD.

    `[tau_1 .. tau_N] = U S [V_1 .. V_N]^T`; the V_i are merged as by `ties`, then `U S` is put before (KnOTS, arXiv
    2410.19735). The rank is at most the sum of the ranks.
    """


@dataclass(frozen=True)
class KnotsDare(InJointBasis, Dare):
    """DARE in the basis of the experts' joint SVD.

    As `knots_ties`, with the V_i merged as by `dare` (KnOTS, arXiv 2410.19735).
    """
