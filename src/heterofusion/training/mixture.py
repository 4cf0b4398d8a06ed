"""Replay and source labels in one training set, with the same share of both wherever one looks.

Which part the example at a place of the run is of depends on the place and the share alone (error diffusion, as a
straight line is drawn in pixels), so every run of neighbours has the share, however short it is and whichever rank
reads it. Which example of the part it is depends on the seed and the epoch alone, so a run resumes anywhere.
"""

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from transformers import TrainingArguments

from heterofusion.data.formats import IGNORE_INDEX
from heterofusion.data.labels import FINEST_SHARE, check_fraction
from heterofusion.runtime.errors import UserError

PART = "mixture_part"  # column of a batch: the index in PARTS of each example's part
PARTS = ("replay", "labels")


def default_fraction(replay: int, labels: int) -> float:
    """The share of replay where none is asked for: all examples come equally often.

    Args:
        replay: number of replay examples.
        labels: number of source labels.

    Returns:
        The share, from 0.001 to 0.999; 0 without replay.
    """
    if not replay:
        return 0.0
    return min(max(replay / (replay + labels), 1 / FINEST_SHARE), 1 - 1 / FINEST_SHARE)


class Mixture(Dataset):
    """Replay and source labels as one training set for `HeteroFusionTrainer`, which reads it in the right order.

    Args:
        replay: examples with `input_ids` and `labels`; may be empty.
        labels: the same, answered by the sources.
        replay_fraction: share of replay among the examples that are trained on; that of `default_fraction` if None.
        soft_weight: weight of KL(source || model) where labels have the columns of `training.label_loss`; by
            default these are not used.

    Raises:
        ValueError: the fraction is not in [0, 1), or the weight not in [0, 1]; there are no labels; or the fraction is
            0 with replay, or above 0 without.
    """

    def __init__(
        self, replay: Any, labels: Any, replay_fraction: float | None = None, soft_weight: float | None = None
    ) -> None:
        self.parts: tuple[Any, Any] = (replay, labels)
        if replay_fraction is None:
            replay_fraction = default_fraction(len(replay), len(labels))
        self.share = check_fraction(replay_fraction)
        if soft_weight is not None and not 0 <= soft_weight <= 1:
            raise UserError(f"soft_weight is {soft_weight}: give a weight from 0 to 1")
        self.soft_weight = soft_weight
        if not len(labels):
            raise UserError("there are no source labels to mix with the replay: train on the replay alone")
        if (self.share > 0) != (len(replay) > 0):
            raise UserError(
                f"--replay_fraction is {replay_fraction:g} with {len(replay)} replay examples: 0 goes with an empty "
                "replay, and with no other"
            )

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Replay first, then labels; the column `PART` tells them apart."""
        replay, labels = self.parts
        part = int(index >= len(replay))
        return {**(labels[index - len(replay)] if part else replay[index]), PART: part}

    def sampler(self, args: TrainingArguments, batch_size: int) -> "MixtureSampler":
        """The order of a run.

        Args:
            args: of the run.
            batch_size: examples of a micro-batch on one device.
        """
        step = batch_size * args.world_size * args.gradient_accumulation_steps
        return MixtureSampler(self, step, args.seed if args.data_seed is None else args.data_seed)


class MixtureSampler(Sampler[int]):
    """The order in which a `Mixture` is read: all ranks and workers count on the same one.

    Every run of n neighbours, across epochs too, holds `floor` or `ceil` of n times the share of replay. Each part is
    shuffled, and shuffled anew when it is used up and when an epoch begins. An epoch holds every example of both parts
    at least once, and only whole optimizer steps.

    Args:
        mixture: what is read.
        step: examples of an optimizer step, on all ranks.
        seed: of the shuffling.

    Attributes:
        epoch: set by `set_epoch`; it does not advance by itself.
    """

    def __init__(self, mixture: Mixture, step: int, seed: int) -> None:
        self.counts = (len(mixture.parts[0]), len(mixture.parts[1]))
        self.share = mixture.share
        self.seed = seed
        self.epoch = 0
        self.length = epoch_length(self.counts, self.share, step)

    def __len__(self) -> int:
        return self.length

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that is iterated over next, from 0."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        replay = replay_places(self.share, self.epoch * self.length, self.length)
        order = np.empty(self.length, dtype=np.int64)
        for part, places in enumerate((replay, ~replay)):
            first = self.counts[0] if part else 0
            order[places] = first + shuffled(self.counts[part], int(places.sum()), (self.seed, self.epoch, part))
        yield from order.tolist()


def epoch_length(counts: tuple[int, int], share: Fraction, step: int) -> int:
    """Examples of an epoch: the fewest that hold both parts wherever the epoch begins, in whole optimizer steps.

    Args:
        counts: examples of replay and of labels.
        share: of replay.
        step: examples of an optimizer step.
    """
    replay = math.ceil(counts[0] / share) if share else 0
    return math.ceil(max(replay, math.ceil(counts[1] / (1 - share))) / step) * step


def replay_places(share: Fraction, first: int, count: int) -> NDArray[np.bool_]:
    """Whether the examples at places `first`, `first + 1`, ... are replay: (count,).

    Place i is replay where the line of slope `share` passes an integer between i and i + 1, so any n neighbours hold
    floor(n * share) or ceil(n * share) of it (Bresenham's line).
    """
    line = (np.arange(first, first + count + 1, dtype=np.int64) * share.numerator) // share.denominator
    return np.diff(line) > 0


def shuffled(total: int, count: int, seed: tuple[int, ...]) -> NDArray[np.int64]:
    """The first `count` of an endless row of permutations of `range(total)`, each of its own seed: (count,)."""
    rounds = [np.random.default_rng([*seed, i]).permutation(total) for i in range(-(-count // total) if count else 0)]
    return np.concatenate(rounds)[:count] if rounds else np.empty(0, dtype=np.int64)


@torch.no_grad()
def part_losses(logits: Tensor, labels: Tensor, parts: Tensor) -> dict[str, Tensor]:
    """Cross-entropy of each part in a micro-batch, without waiting for the device.

    One example at a time: logits in float32 of a whole micro-batch would be the largest tensor of a step.

    Args:
        logits: (batch, length, vocabulary).
        labels: (batch, length); the logits at a place are of the label after it.
        parts: (batch,): index in `PARTS`.

    Returns:
        `loss_replay` and `loss_labels`, each the sum over its label tokens in nats and their number, (2,) float32.
    """
    examples = torch.stack(
        [
            torch.stack(
                [
                    F.cross_entropy(row[:-1].float(), wanted[1:], ignore_index=IGNORE_INDEX, reduction="sum"),
                    (wanted[1:] != IGNORE_INDEX).sum(),
                ]
            )
            for row, wanted in zip(logits, labels, strict=True)
        ]
    )  # (batch, 2)
    # not a matrix product, which might run in less than float32
    return {
        f"loss_{name}": torch.where((parts == index).unsqueeze(1), examples, 0).sum(dim=0)
        for index, name in enumerate(PARTS)
    }
