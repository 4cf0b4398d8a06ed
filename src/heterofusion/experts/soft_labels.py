"""What a model thinks of given answers: its most probable tokens at every position, as a memory-mapped data set.

The store knows nothing of distillation, of who wrote the answers, or of who will use them. An answer is a sequence of
tokens of the model's own tokenizer; per token there are the `k` most probable ones and their log-probabilities (of
the softmax over the whole vocabulary, natural logarithm, in float32), and per answer its cross-entropy. Answers are
written as they come, in any order, and read one at a time: the disk alone bounds how many there are.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset, Features, List, Value
from numpy.typing import NDArray

from heterofusion.experts.store import cache_key, new_table, read_table
from heterofusion.runtime.errors import UserError

_FORMAT = 2  # another number is another name
_FEATURES = Features(
    {
        "index": Value("int64"),  # of the answer; rows stand in the order in which they were written
        "tokens": List(Value("int32")),  # (n,)
        "top_ids": List(List(Value("int32"))),  # (n, k)
        "top_log_probs": List(List(Value("float32"))),  # (n, k)
        "cross_entropy": Value("float64"),
    }
)


class SoftLabel(NamedTuple):
    """The soft labels of one answer of n tokens.

    Attributes:
        tokens: (n,): the answer.
        top_ids: (n, k): the most probable tokens at each position, the most probable first.
        top_log_probs: (n, k): their log-probabilities.
    """

    tokens: NDArray[np.int32]
    top_ids: NDArray[np.int32]
    top_log_probs: NDArray[np.float32]


class SoftLabels:
    """The soft labels of a number of answers, memory-mapped.

    Args:
        data: the table, in any order.
        record: what was kept with it.

    Attributes:
        cross_entropy: (answers,): minus the log-probability of each answer as a whole, in nats.
        identity: plain values that tell what the labels depend on.
        seconds: that the model took for them.
    """

    def __init__(self, data: Dataset, record: Mapping[str, Any]) -> None:
        self.identity: dict[str, Any] = record["identity"]
        self.seconds = float(record["seconds"])
        self._data = data.with_format("arrow")
        self._rows = np.argsort(data.data.column("index").to_numpy())  # row of every answer
        self.cross_entropy: NDArray[np.float64] = data.data.column("cross_entropy").to_numpy()[self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    def of(self, index: int) -> SoftLabel:
        """The soft labels of one answer; the arrays lie in the file and cannot be written to."""
        row = self._data[int(self._rows[index])]  # a table of one row
        tokens, ids, values = (row[name].chunk(0).flatten() for name in SoftLabel._fields)
        shape = (len(tokens), -1) if len(tokens) else (0, 0)
        return SoftLabel(
            tokens.to_numpy(), ids.flatten().to_numpy().reshape(shape), values.flatten().to_numpy().reshape(shape)
        )


def labels_path(folder: Path, identity: Mapping[str, Any]) -> Path:
    """Where the soft labels of an identity are: another model, other answers or another k are another place."""
    return folder / f"soft-labels-{cache_key({'format': _FORMAT, **identity})}"


def write_labels(
    folder: Path, identity: Mapping[str, Any], batches: Iterable[Sequence[tuple[int, SoftLabel, float]]]
) -> None:
    """Write soft labels, a batch at a time, while they are made. They are there once all of them are."""
    start = time.perf_counter()
    seen: list[int] = []
    with new_table(labels_path(folder, identity), _FEATURES) as table:
        for batch in batches:
            indices, labels, entropies = zip(*batch, strict=True)
            columns = dict(zip(SoftLabel._fields, map(list, zip(*labels, strict=True)), strict=True))
            table.add({"index": list(indices), **columns, "cross_entropy": list(entropies)})
            seen += indices
        if sorted(seen) != [*range(len(seen))]:
            raise UserError(
                f"each answer from 0 on must come once, but {len(seen)} came: {len(set(seen))} different ones, up to "
                f"{max(seen)}"
            )
        table.record |= {"identity": dict(identity), "seconds": round(time.perf_counter() - start, 3)}


def read_labels(folder: Path, identity: Mapping[str, Any], check: bool = True) -> SoftLabels | None:
    """Open the soft labels of an identity."""
    found = read_table(labels_path(folder, identity), _FEATURES, check)
    return None if found is None else SoftLabels(*found)
