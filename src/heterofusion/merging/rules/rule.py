"""What a rule is: hyper-parameters as the fields of a dataclass, and a merge of what `tau.py` feeds it."""

import hashlib
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from heterofusion.merging.tau import Factors, Matrices, Updates
from heterofusion.runtime.flags import check_ranges

# The merged update of a module by its path, dense or as A and B: one, or one per expert where the rule is `per_task`.
# What needs to be known of all modules first is found in passes before.
Merged = Callable[[str], list[Tensor | Factors]]

LAMBDA = {"help": "Factor of the merged update.", "range": "(0, inf)"}
DENSITY = {"help": "Share of an expert's entries, of largest magnitude, that is kept.", "range": "(0, 1]"}
DROP_RATE = {"help": "Share of entries that is dropped at random; the others are rescaled.", "range": "[0, 1)"}
SEED = {"help": "Seed of what is dropped at random.", "range": "[0, inf)"}


class Rule:
    """A way to merge. Its subclasses are frozen dataclasses; their docstrings have the formula and the paper.

    The first line of a docstring is shown by `recipes/merge.py --help`, the fields are its flags. All merged updates
    are linear in `merge_lambda`, which is applied in the end, by the one who asked for the merge.
    """

    merge_lambda: float = 1.0  # for rules without such a field
    per_task: ClassVar[bool] = False  # whether there is one result per expert, which needs the task at inference

    def __post_init__(self) -> None:
        check_ranges(self)

    def merge(self, updates: Updates) -> Merged:
        """Merge, but for `merge_lambda`."""
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


def share_count(share: float, size: int) -> int:
    """How many of `size` entries a share is, rounded down; what is an integer but for rounding is that integer."""
    return int(share * size + 1e-6)


def seeded_generator(seed: int, expert: int, path: str, device: torch.device) -> torch.Generator:
    """A generator that depends on its arguments alone, so that a module's noise is the same whenever it is drawn."""
    digest = hashlib.sha256(f"{seed}/{expert}/{path}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
