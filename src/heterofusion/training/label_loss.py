"""Soft labels in training: next to the answer of a source, what the source thought of other tokens.

At a label token with a soft label P the loss of a model Q is (1 - w) * CE(answer, Q) + w * KL(P || Q), elsewhere the
cross-entropy alone; all of it is a mean over the label tokens of the accumulation window. What is computed here is
w * (KL - CE), which a trainer adds to the loss of the model itself: without soft labels nothing is computed twice.

Origin of the mixed loss: knowledge distillation (Hinton et al., arXiv 1503.02531), with a temperature of 1.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from heterofusion.data.labels import SOFT_COLUMNS, SOFT_IDS, SOFT_POSITIONS, SOFT_PROBS


def kl_divergences(log_probs: Tensor, ids: Tensor, probs: Tensor) -> Tensor:
    """KL(P || Q) of distributions P over a few tokens and Q over all of them.

    Args:
        log_probs: (..., vocabulary), of Q.
        ids: (..., k): tokens of P.
        probs: (..., k): their probabilities; a token of probability 0 counts for nothing.

    Returns:
        (...): nats, 0 where P is nothing.
    """
    return torch.special.xlogy(probs, probs).sum(dim=-1) - (probs * log_probs.gather(-1, ids)).sum(dim=-1)


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
    kl = torch.where(real, kl_divergences(log_probs, ids, probs), 0)
    nll = torch.where(real, -log_probs.gather(-1, answers).squeeze(-1), 0)
    return (kl - nll).sum(), torch.stack([kl.sum(), real.sum()]).detach()


def pad_rows(rows: Sequence[Any], shape: tuple[int, ...], dtype: torch.dtype, fill: int = 0) -> Tensor:
    """Arrays of different sizes as one tensor.

    Args:
        rows: nested lists, arrays or tensors, each of at most `shape[1:]`; one without any entry may be of any shape.
        shape: of the result.
        dtype: of the result.
        fill: what stands behind the end of an array.
    """
    padded = torch.full(shape, fill, dtype=dtype)
    for index, row in enumerate(rows):
        if len(row):
            values = torch.as_tensor(row, dtype=dtype)
            padded[index][tuple(map(slice, values.shape))] = values
    return padded


class SoftCollator:
    """Collates examples with and without soft labels; padding has probability 0.

    Args:
        collate: makes a batch of all other columns.
    """

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
