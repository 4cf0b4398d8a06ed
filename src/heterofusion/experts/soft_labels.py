"""What a model thinks of given answers: its most probable tokens at every position, in tables larger than memory.

    NAME/table.arrow   an Arrow stream, which `datasets.Dataset.from_file` opens as a memory map
    NAME/record.json   plain values, size and SHA-256 of the table

A table is filled, batch by batch, in a folder beside its place, which is renamed once both files are on the disk: what
bears the name is complete, whenever a program was killed. What a disk or a copy did to it later is told by the hash,
for which one process reads it through once per run.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset, Features, List, Value
from datasets.arrow_writer import ArrowWriter
from huggingface_hub import constants
from numpy.typing import NDArray

from heterofusion.runtime.errors import UserError
from heterofusion.runtime.files import TEMPORARY, file_sha256, told_writes

logger = logging.getLogger(__name__)

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
_ABANDONED = 24 * 3600  # seconds without a batch, after which a table's writer is taken for dead


def cache_folder(logits_cache: str | None) -> Path:
    """The folder of `--logits_cache`, by default `heterofusion/soft_labels` in HF_HOME."""
    folder = Path(logits_cache or Path(constants.HF_HOME) / "heterofusion" / "soft_labels").expanduser().absolute()
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        kind = "not writable" if nearest.is_dir() else "a file"
        raise UserError(f"--logits_cache {folder}: {nearest} is {kind}; name another folder")
    return folder


def cache_key(identity: Mapping[str, Any]) -> str:
    """A short name for plain values: it differs when one of them does."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]


def told_cache(path: Path) -> contextlib.AbstractContextManager[None]:
    """Say of a failed write which file it was, and which flag names another place."""
    return told_writes(f"--logits_cache: {path} could not be written", "name another folder")


# ---- tables -----------------------------------------------------------------------------------------------------


@dataclass
class Table:
    """A table that is being filled; `record` takes plain values that go with it."""

    writer: ArrowWriter
    record: dict[str, Any] = field(default_factory=dict)

    def add(self, columns: Mapping[str, Any]) -> None:
        """Append rows. They go to the file at once, only a small buffer of it stays in memory."""
        self.writer.write_batch(dict(columns))


@contextlib.contextmanager
def new_table(path: Path, features: Features) -> Iterator[Table]:
    """Write a table; it is at its path once the block is left without an error.

    It takes the place of a damaged one. Several programs may write the same: the first one's stays.
    """
    staging = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}{TEMPORARY}")
    file = staging / "table.arrow"
    with told_cache(path):
        try:
            _remove_abandoned(path.parent)
            staging.mkdir(parents=True)
            with contextlib.closing(ArrowWriter(path=str(file), features=features)) as writer:
                table = Table(writer)
                yield table
                writer.finalize()
            whole = {**table.record, "bytes": file.stat().st_size, "content_sha256": file_sha256(file)}
            (staging / "record.json").write_text(json.dumps(whole, sort_keys=True) + "\n", encoding="utf-8")
            for name in ("table.arrow", "record.json"):
                with open(staging / name, "rb") as written:
                    os.fsync(written.fileno())
            there = partial(read_table, path, features, level=logging.DEBUG)  # of another program that was faster
            if there() is None:
                shutil.rmtree(path, ignore_errors=True)
                try:
                    os.rename(staging, path)
                except OSError:
                    if there() is None:
                        raise
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _remove_abandoned(folder: Path) -> None:
    """Remove what killed programs left of their tables, which may be large."""
    for left in folder.glob(f"*{TEMPORARY}"):
        newest = max((p.stat().st_mtime for p in (left, *left.glob("*"))), default=0.0)
        if left.is_dir() and time.time() - newest > _ABANDONED:
            logger.info("removing %s, which a killed program left", left)
            shutil.rmtree(left, ignore_errors=True)


def read_table(
    path: Path, features: Features, check: bool = True, level: int = logging.WARNING
) -> tuple[Dataset, dict[str, Any]] | None:
    """Open what `new_table` wrote, memory-mapped, with its record; None if it is not there or damaged.

    Its size is always checked, its content with `check`.
    """
    if not path.exists():
        return None
    file = path / "table.arrow"
    try:
        record = json.loads((path / "record.json").read_text(encoding="utf-8"))
        if file.stat().st_size != record["bytes"] or (check and file_sha256(file) != record["content_sha256"]):
            raise ValueError("its content is not what was written")
        data = Dataset.from_file(str(file))
        if data.features != features:
            raise ValueError(f"its columns are {data.features}")
    except (OSError, ValueError, KeyError, TypeError) as error:  # those of Arrow and JSON are among them
        logger.log(level, "%s is damaged (%s): it is made anew", path, " ".join(str(error).split()))
        return None
    return data, record


# ---- soft labels ------------------------------------------------------------------------------------------------


class SoftLabel(NamedTuple):
    """The soft labels of one answer of n tokens, in the model's own tokenizer.

    Attributes:
        tokens: (n,): the answer.
        top_ids: (n, k): the most probable tokens at each position, the most probable first.
        top_log_probs: (n, k): their log-probabilities, of the softmax over the whole vocabulary.
    """

    tokens: NDArray[np.int32]
    top_ids: NDArray[np.int32]
    top_log_probs: NDArray[np.float32]


class SoftLabels:
    """The soft labels of a number of answers, memory-mapped.

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
    """Write soft labels and cross-entropies by number of the answer, a batch at a time, while they are made."""
    start = time.perf_counter()
    with new_table(labels_path(folder, identity), _FEATURES) as table:
        for batch in batches:
            indices, labels, entropies = zip(*batch, strict=True)
            columns = dict(zip(SoftLabel._fields, map(list, zip(*labels, strict=True)), strict=True))
            table.add({"index": list(indices), **columns, "cross_entropy": list(entropies)})
        table.record |= {"identity": dict(identity), "seconds": round(time.perf_counter() - start, 3)}


def read_labels(folder: Path, identity: Mapping[str, Any], check: bool = True) -> SoftLabels | None:
    """Open the soft labels of an identity."""
    found = read_table(labels_path(folder, identity), _FEATURES, check)
    return None if found is None else SoftLabels(*found)
