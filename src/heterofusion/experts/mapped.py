"""Tables on disk that are larger than memory: written batch by batch, read by memory map, there whole or not at all.

    NAME/table.arrow   an Arrow stream, which `datasets.Dataset.from_file` opens
    NAME/record.json   plain values, size and SHA-256 of the table

A table is filled in a folder beside its place, which is renamed once both files are on the disk: what bears the name
is complete, whenever a program was killed. What a disk or a copy did to it later is told by the hash, for which one
process reads it through in pieces once per run. That takes seconds per gigabyte, where the models that filled the
table took hours; without it, damaged labels would be trained on without a word.
"""

import contextlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, Features
from datasets.arrow_writer import ArrowWriter

from heterofusion.runtime.errors import UserError
from heterofusion.runtime.files import TEMPORARY, file_sha256

logger = logging.getLogger(__name__)

TABLE_FILE, RECORD_FILE = "table.arrow", "record.json"
_CONTENT, _BYTES = "content_sha256", "bytes"
_ABANDONED = 24 * 3600  # seconds without a batch, after which a table's writer is taken for dead


class TableWriter:
    """A table that is being filled.

    Args:
        path: the table's folder, for messages.
        file: where its rows go.
        features: names and types of the columns.

    Attributes:
        record: plain values that go with the table; to be filled too.
    """

    def __init__(self, path: Path, file: Path, features: Features) -> None:
        self.record: dict[str, Any] = {}
        self._path = path
        self._writer = ArrowWriter(path=str(file), features=features)

    def add(self, columns: Mapping[str, Any]) -> None:
        """Append rows. They go to the file at once, only a small buffer of it stays in memory.

        Args:
            columns: the values of every column.

        Raises:
            OSError: they cannot be written; names the table.
        """
        with _naming(self._path):
            self._writer.write_batch(dict(columns))

    def finish(self) -> None:
        """Write the end of the table."""
        self._writer.finalize()

    def close(self) -> None:
        """Let go of the file."""
        self._writer.close()


@contextlib.contextmanager
def new_table(path: Path, features: Features) -> Iterator[TableWriter]:
    """Write a table; it is at its path once the block is left without an error. Several programs may write the same.

    Args:
        path: its folder, which is made, in place of a damaged one. If another program was first, its table stays.
        features: names and types of the columns.

    Raises:
        OSError: it cannot be written; names it.
    """
    staging = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}{TEMPORARY}")
    try:
        with _naming(path):
            _remove_abandoned(path.parent)
            staging.mkdir(parents=True)
        with contextlib.closing(TableWriter(path, staging / TABLE_FILE, features)) as table:
            yield table
            with _naming(path):
                table.finish()
        with _naming(path):
            _seal(staging, table.record)
            _move(staging, path, features)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def read_table(path: Path, features: Features, check: bool = True) -> tuple[Dataset, dict[str, Any]] | None:
    """Open what `new_table` wrote. Nothing is read into memory but the record.

    Args:
        path: the table's folder.
        features: names and types that its columns must have.
        check: whether to hash the content; its size is always checked.

    Returns:
        The table, memory-mapped, and its record; None if there is no such table, or (with a warning) if it is damaged.
    """
    if not path.exists():
        return None
    try:
        return _open(path, features, check)
    except _DAMAGE as error:
        logger.warning("%s is damaged (%s): it is made anew", path, " ".join(str(error).split()))
        return None


_DAMAGE = (OSError, ValueError, KeyError, TypeError)  # those of Arrow and JSON are among them


def _open(path: Path, features: Features, check: bool) -> tuple[Dataset, dict[str, Any]]:
    record = json.loads((path / RECORD_FILE).read_text(encoding="utf-8"))
    file = path / TABLE_FILE
    if file.stat().st_size != record[_BYTES]:
        raise UserError(f"{TABLE_FILE} has {file.stat().st_size} bytes, {record[_BYTES]} were written")
    if check and file_sha256(file) != record[_CONTENT]:
        raise UserError("its content is not what was written")
    data = Dataset.from_file(str(file))
    if data.features != features:
        raise UserError(f"its columns are {data.features}")
    return data, record


def _is_whole(path: Path, features: Features) -> bool:
    try:
        _open(path, features, check=True)
    except _DAMAGE:
        return False
    return True


def _seal(staging: Path, record: Mapping[str, Any]) -> None:
    """Put a finished table on the disk, and the record beside it."""
    file = staging / TABLE_FILE
    whole = {**record, _BYTES: file.stat().st_size, _CONTENT: file_sha256(file)}
    (staging / RECORD_FILE).write_text(json.dumps(whole, sort_keys=True) + "\n", encoding="utf-8")
    for name in (TABLE_FILE, RECORD_FILE):
        with open(staging / name, "rb") as written:
            os.fsync(written.fileno())


def _move(staging: Path, path: Path, features: Features) -> None:
    """Rename a finished table, if no other program has put the same there meanwhile."""
    if path.exists():
        if _is_whole(path, features):
            return
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    try:
        os.rename(staging, path)
    except OSError:
        if not _is_whole(path, features):  # else another program was faster by a moment
            raise


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(f"--logits_cache: {path} could not be written ({error}); name another folder") from error


def _remove_abandoned(folder: Path) -> None:
    """Remove what killed programs left of their tables, which may be large."""
    for left in folder.glob(f"*{TEMPORARY}"):
        newest = max((p.stat().st_mtime for p in (left, *left.glob("*"))), default=0.0)
        if left.is_dir() and time.time() - newest > _ABANDONED:
            logger.info("removing %s, which a killed program left", left)
            shutil.rmtree(left, ignore_errors=True)
