"""What a rule is, and the sums that several rules have."""

from collections.abc import Callable, Mapping
from dataclasses import field
from typing import Any, ClassVar

from torch import Tensor

from heterofusion.merging.tau import Factors, Matrices, Updates
from heterofusion.runtime.flags import check_ranges

# The merged update of a module by its path, dense or as A and B: one, or one per expert where the rule is `per_task`.
# What needs to be known of all modules first is found in passes before.
Merged = Callable[[str], list[Tensor | Factors]]


def factor(default: float) -> Any:
    """The field `merge_lambda`; rules that differ in it alone count as equal: one merge serves them all."""
    metadata = {"help": "Factor of the merged update.", "range": "(0, inf)"}
    return field(default=default, metadata=metadata, compare=False)


class Rule:
    """A way to merge. All merged updates are linear in `merge_lambda`, which its user applies in the end."""

    merge_lambda: float = 1.0  # for rules without such a field
    per_task: ClassVar[bool] = False  # whether there is one result per expert, which needs the task at inference

    def __post_init__(self) -> None:
        check_ranges(self)

    def hyperparameters(self) -> dict[str, float]:
        """The values of its fields, the seed aside."""
        return {name: value for name, value in vars(self).items() if name != "seed"}

    def merge(self, updates: Updates) -> Merged:
        """Merge, but for `merge_lambda`."""
        return self.combine(updates.dense)

    def combine(self, matrices: Matrices) -> Merged:
        """The same of any dense matrices, of rules that know no factors."""
        raise NotImplementedError


def total(matrices: Mapping[int, Tensor]) -> Tensor:
    """Sum of the experts' matrices of a module, in their order."""
    first, *others = matrices.values()
    result = first.clone()
    for matrix in others:
        result += matrix
    return result


def summed(matrices: Matrices) -> Merged:
    """The merge that is the sum of the experts' matrices."""
    return lambda path: [total(matrices.of(path))]
