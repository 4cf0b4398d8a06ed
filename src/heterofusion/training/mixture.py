"""What a run trains on: replay, source labels, or both with the same share of each wherever one looks.

Which part the example at a place of the run is of depends on the place and the share alone (error diffusion, as a
straight line is drawn in pixels): every run of neighbours has the share, whichever rank reads it. Which example of the
part it is depends on the seed and the epoch alone, so a run resumes anywhere.

Soft labels: at a label token where the source told of other tokens, P, the loss of a model Q is
(1 - w) * CE(answer, Q) + w * KL(P || Q), elsewhere the cross-entropy alone; all of it is a mean over the label tokens
of the accumulation window (Hinton et al., arXiv 1503.02531, temperature 1). Computed here is KL - CE, which a trainer
adds w times to the loss of the model itself.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset as Examples
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedTokenizerBase, TrainingArguments

from heterofusion.data.formats import IGNORE_INDEX
from heterofusion.data.labels import (
    FINEST_SHARE,
    SOFT_COLUMNS,
    SOFT_IDS,
    SOFT_POSITIONS,
    SOFT_PROBS,
    SourceLabelArguments,
    build_labels,
    check_fraction,
    labels_record,
    labels_summary,
)
from heterofusion.data.replay import DataArguments, build_replay, examples_sha256
from heterofusion.experts.soft import add_soft_labels
from heterofusion.runtime.errors import UserError

PART = "mixture_part"  # column of a batch: the index in PARTS of each example's part
PARTS = ("replay", "labels")


class Mixture(Dataset):
    """Replay and source labels as one training set for `HeteroFusionTrainer`, which reads it in the right order.

    Both hold examples with `input_ids` and `labels`; replay may be empty. `replay_fraction` is its share among the
    examples that are trained on, by default that at which all examples come equally often. `soft_weight` is that of
    KL(source || model) where labels have the columns of soft labels, which are not used by default.
    """

    def __init__(
        self, replay: Any, labels: Any, replay_fraction: float | None = None, soft_weight: float | None = None
    ) -> None:
        self.parts: tuple[Any, Any] = (replay, labels)
        if replay_fraction is None:
            even = len(replay) / max(len(replay) + len(labels), 1)
            replay_fraction = min(max(even, 1 / FINEST_SHARE), 1 - 1 / FINEST_SHARE) if replay else 0.0
        self.share = check_fraction(replay_fraction)
        if soft_weight is not None and not 0 <= soft_weight <= 1:
            raise UserError(f"soft_weight is {soft_weight}: give a weight from 0 to 1")
        self.soft_weight = soft_weight
        if not len(labels):
            raise UserError("there are no source labels to mix with the replay: train on the replay alone")
        if (self.share > 0) != (len(replay) > 0):
            raise UserError(f"--replay_fraction is {replay_fraction:g} with {len(replay)} replay examples")

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Replay first, then labels; the column `PART` tells them apart."""
        replay, labels = self.parts
        part = int(index >= len(replay))
        return {**(labels[index - len(replay)] if part else replay[index]), PART: part}

    def sampler(self, args: TrainingArguments, batch_size: int) -> "MixtureSampler":
        """The order of a run with micro-batches of `batch_size` examples on each device."""
        step = batch_size * args.world_size * args.gradient_accumulation_steps
        return MixtureSampler(self, step, args.seed if args.data_seed is None else args.data_seed)


class MixtureSampler(Sampler[int]):
    """The order in which a `Mixture` is read: all ranks and workers count on the same one.

    Every run of n neighbours, across epochs too, holds `floor` or `ceil` of n times the share of replay. Each part is
    shuffled, and shuffled anew when it is used up and when an epoch begins. An epoch holds every example of both parts
    at least once, and only whole optimizer steps, of `step` examples on all ranks; it does not advance by itself.
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
    """Examples of an epoch: the fewest that hold both parts wherever the epoch begins, in whole optimizer steps."""
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

    Args:
        logits: (batch, length, vocabulary).
        labels: (batch, length); the logits at a place are of the label after it.
        parts: (batch,): index in `PARTS`.

    Returns:
        `loss_replay` and `loss_labels`, each the sum over its label tokens in nats and their number, (2,) float32.
    """
    # one example at a time: logits in float32 of a whole micro-batch would be the largest tensor of a step
    rows = []
    for row, wanted in zip(logits, labels, strict=True):
        loss = F.cross_entropy(row[:-1].float(), wanted[1:], ignore_index=IGNORE_INDEX, reduction="sum")
        rows.append(torch.stack([loss, (wanted[1:] != IGNORE_INDEX).sum()]))
    examples = torch.stack(rows)  # (batch, 2)
    # not a matrix product, which might run in less than float32
    return {
        f"loss_{name}": torch.where((parts == index).unsqueeze(1), examples, 0).sum(dim=0)
        for index, name in enumerate(PARTS)
    }


# ---- soft labels ----


def soft_losses(
    logits: Tensor, labels: Tensor, positions: Tensor, ids: Tensor, probs: Tensor
) -> tuple[Tensor, Tensor]:
    """What soft labels add to the loss of a micro-batch, without waiting for the device.

    Args:
        logits: (batch, length, vocabulary).
        labels: (batch, length); the logits at a place are of the label after it.
        positions: (batch, soft): places of label tokens, from 1; padded with places of any kind.
        ids: (batch, soft, k): token ids.
        probs: (batch, soft, k): their probabilities; all 0 where a row is padded.

    Returns:
        The sum of KL - CE over the soft labels, which has a gradient; and the sum of KL with the number of soft
        labels, (2,), which has none. In nats and float32.
    """
    rows = torch.arange(len(logits), device=logits.device).unsqueeze(1)  # (batch, 1)
    log_probs = torch.log_softmax(logits[rows, positions - 1].float(), dim=-1)  # (batch, soft, vocabulary)
    answers = labels.gather(1, positions).clamp(min=0).unsqueeze(-1)  # (batch, soft, 1); padding may be no label
    real = probs.sum(dim=-1) > 0  # (batch, soft)
    kl = torch.special.xlogy(probs, probs).sum(dim=-1) - (probs * log_probs.gather(-1, ids)).sum(dim=-1)
    kl = torch.where(real, kl, 0)  # a token of probability 0 counts for nothing
    nll = torch.where(real, -log_probs.gather(-1, answers).squeeze(-1), 0)
    return (kl - nll).sum(), torch.stack([kl.sum(), real.sum()]).detach()


def pad_rows(rows: Sequence[Any], shape: tuple[int, ...], dtype: torch.dtype, fill: int = 0) -> Tensor:
    """Arrays of different sizes, each of at most `shape[1:]`, as one tensor; `fill` stands behind their ends."""
    padded = torch.full(shape, fill, dtype=dtype)
    for index, row in enumerate(rows):
        if len(row):
            values = torch.as_tensor(row, dtype=dtype)
            padded[index][tuple(map(slice, values.shape))] = values
    return padded


class SoftCollator:
    """Collates examples with and without soft labels; `collate` makes a batch of all other columns."""

    def __init__(self, collate: Callable[[list[dict[str, Any]]], Mapping[str, Any]]) -> None:
        self._collate = collate

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        plain = [{name: v for name, v in example.items() if name not in SOFT_COLUMNS} for example in examples]
        batch = dict(self._collate(plain))
        positions, ids, probs = ([example.get(name, ()) for example in examples] for name in SOFT_COLUMNS)
        # at least one place: a batch without soft labels has the same columns
        count = max(1, *map(len, positions))
        k = max([1, *(len(row[0]) for row in ids if len(row))])
        batch[SOFT_POSITIONS] = pad_rows(positions, (len(examples), count), torch.long, fill=1)
        batch[SOFT_IDS] = pad_rows(ids, (len(examples), count, k), torch.long)
        batch[SOFT_PROBS] = pad_rows(probs, (len(examples), count, k), torch.float32)
        return batch


# ---- from flags ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingData:
    """What a run trains on: a data set, or a mixture of several `parts`, with what is recorded and logged of them."""

    examples: Examples | Mixture
    parts: tuple[Examples, ...]
    replay_record: dict[str, Any]
    labels_record: dict[str, Any] | None
    summary: Mapping[str, list[str]]  # lines for the log by what they are of

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint tells of the data, so that no run goes on with others."""
        labels = None if self.labels_record is None else dict(self.labels_record)
        share = labels.pop("replay_fraction", None) if labels else None
        # the share comes last: where nobody asked for one it follows from the rest, and what differs there is named
        state = {"source_labels": labels, "replay": self.replay_record, "replay_fraction": share}
        return json.loads(json.dumps(state))


def build_training_data(
    data: DataArguments,
    labels: SourceLabelArguments,
    tokenizer: PreTrainedTokenizerBase,
    args: TrainingArguments,
    kind: str = "replay",
) -> TrainingData:
    """Load, sample and tokenize replay (messages call it `kind`) and source labels; all ranks together."""
    parts, made, summary = [], {}, {}
    if data.dataset_name or not labels.source_labels:
        replay, report = build_replay(data, tokenizer, kind)
        parts, made = [replay], {**report.to_dict(), "sha256": examples_sha256(replay)}
        summary = {kind: report.summary()}
    if not labels.source_labels:
        return TrainingData(replay, (replay,), made, None, summary)
    found = build_labels(labels, data, tokenizer)
    labelled, soft_record, soft_weight, soft_lines = found.examples, None, None, []
    if labels.label_loss == "soft":
        labelled, soft_record, line = add_soft_labels(found, labels, tokenizer)
        soft_weight, soft_lines = labels.soft_weight, [line]
    mixture = Mixture(parts[0] if parts else [], labelled, labels.replay_fraction, soft_weight)
    length = len(mixture.sampler(args, args.train_batch_size))
    summary["source labels"] = [
        *labels_summary(found.reports, data.max_length),
        *soft_lines,
        f"an epoch is {length} examples, {float(mixture.share):.1%} of them replay",
    ]
    record = labels_record(found, labels, float(mixture.share), soft_record)
    return TrainingData(mixture, (*parts, labelled), made, record, summary)
