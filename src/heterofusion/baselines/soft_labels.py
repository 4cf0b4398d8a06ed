"""What a model thinks of given answers: its most probable tokens at every position, on disk.

The store knows nothing of distillation, of who wrote the answers, or of who will use them. An answer is a sequence of
tokens of the model's own tokenizer; per token there are the `k` most probable ones and their log-probabilities (of
the softmax over the whole vocabulary, natural logarithm, in float32), and per answer its cross-entropy.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heterofusion.baselines.cache import cache_key, read_tensors, write_tensors

_FORMAT = 1  # another number is another file name
_NAMES = {"offsets", "tokens", "top_ids", "top_log_probs", "cross_entropy"}


@dataclass(frozen=True)
class SoftLabels:
    """The soft labels of a number of answers, one after the other.

    Attributes:
        offsets: (answers + 1,): where each answer begins; the last is the number of all tokens.
        tokens: (tokens,): the answers.
        top_ids: (tokens, k): the most probable tokens at each position, the most probable first.
        top_log_probs: (tokens, k): their log-probabilities.
        cross_entropy: (answers,): minus the log-probability of the answer as a whole, in nats.
        seconds: that the model took for them.
    """

    offsets: NDArray[np.int64]
    tokens: NDArray[np.int32]
    top_ids: NDArray[np.int32]
    top_log_probs: NDArray[np.float32]
    cross_entropy: NDArray[np.float64]
    seconds: float = 0.0

    def __len__(self) -> int:
        return len(self.cross_entropy)

    def of(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]:
        """Tokens (n,), top ids (n, k) and log-probabilities (n, k) of one answer."""
        part = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        return self.tokens[part], self.top_ids[part], self.top_log_probs[part]


def join_answers(
    answers: Sequence[tuple[Sequence[int], NDArray[np.int32], NDArray[np.float32], float]], seconds: float
) -> SoftLabels:
    """Soft labels from single answers.

    Args:
        answers: tokens (n,), top ids (n, k), log-probabilities (n, k) and cross-entropy of each.
        seconds: that the model took for them.
    """
    lengths = [len(tokens) for tokens, *_ in answers]
    return SoftLabels(
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        tokens=np.concatenate([np.asarray(tokens, dtype=np.int32) for tokens, *_ in answers]),
        top_ids=np.concatenate([top for _, top, _, _ in answers]).astype(np.int32),
        top_log_probs=np.concatenate([values for _, _, values, _ in answers]).astype(np.float32),
        cross_entropy=np.array([entropy for *_, entropy in answers], dtype=np.float64),
        seconds=seconds,
    )


def labels_path(folder: Path, identity: Mapping[str, Any]) -> Path:
    """The file of the soft labels of an identity: another model, other answers or another k is another file."""
    return folder / f"soft-labels-{cache_key({'format': _FORMAT, **identity})}.safetensors"


def write_labels(folder: Path, identity: Mapping[str, Any], labels: SoftLabels) -> Path:
    """Write soft labels.

    Args:
        folder: of the store.
        identity: plain values that tell what the labels depend on; kept in the file too.
        labels: the soft labels.

    Raises:
        OSError: the file cannot be written.
    """
    path = labels_path(folder, identity)
    tensors = {name: getattr(labels, name) for name in _NAMES}
    write_tensors(path, tensors, {"identity": dict(identity), "seconds": round(labels.seconds, 3)})
    return path


def read_labels(folder: Path, identity: Mapping[str, Any]) -> SoftLabels | None:
    """Read the soft labels of an identity; None if there are none, or (with a warning) if their file is damaged."""
    found = read_tensors(labels_path(folder, identity), _NAMES)
    if found is None:
        return None
    tensors, record = found
    return SoftLabels(**tensors, seconds=float(record["seconds"]))
