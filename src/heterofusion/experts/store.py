"""What several runs share on disk: tables larger than memory, written batch by batch and read by memory map.

    NAME/table.arrow   an Arrow stream, which `datasets.Dataset.from_file` opens
    NAME/record.json   plain values, size and SHA-256 of the table

A table is filled in a folder beside its place, which is renamed once both files are on the disk: what bears the name
is complete, whenever a program was killed. What a disk or a copy did to it later is told by the hash, for which one
process reads it through once per run.
"""

import contextlib
import hashlib
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
from huggingface_hub import constants

from heterofusion.runtime.errors import UserError
from heterofusion.runtime.files import TEMPORARY, file_sha256

logger = logging.getLogger(__name__)

TABLE_FILE, RECORD_FILE = "table.arrow", "record.json"
_CONTENT, _BYTES = "content_sha256", "bytes"
_ABANDONED = 24 * 3600  # seconds without a batch, after which a table's writer is taken for dead


def cache_folder(logits_cache: str | None) -> Path:
    """The folder of `--logits_cache`, by default `heterofusion/soft_labels` in HF_HOME."""
    folder = Path(logits_cache or Path(constants.HF_HOME) / "heterofusion" / "soft_labels").expanduser()
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        kind = "not writable" if nearest.is_dir() else "a file"
        raise UserError(f"--logits_cache {folder.absolute()}: {nearest} is {kind}; name another folder")
    return folder


def cache_key(identity: Mapping[str, Any]) -> str:
    """A short name for plain values: it differs when one of them does."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Say of a failed write which file it was, and which flag names another place."""
    try:
        yield
    except OSError as error:
        raise OSError(f"--logits_cache: {path} could not be written ({error}); name another folder") from error


class TableWriter:
    """A table that is being filled; `record` takes plain values that go with it."""

    def __init__(self, path: Path, file: Path, features: Features) -> None:
        self.record: dict[str, Any] = {}
        self._path = path
        self.writer = ArrowWriter(path=str(file), features=features)

    def add(self, columns: Mapping[str, Any]) -> None:
        """Append rows. They go to the file at once, only a small buffer of it stays in memory."""
        with naming(self._path):
            self.writer.write_batch(dict(columns))


@contextlib.contextmanager
def new_table(path: Path, features: Features) -> Iterator[TableWriter]:
    """Write a table; it is at its path once the block is left without an error.

    It takes the place of a damaged one. Several programs may write the same: the first one's stays.
    """
    staging = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}{TEMPORARY}")
    try:
        with naming(path):
            _remove_abandoned(path.parent)
            staging.mkdir(parents=True)
        table = TableWriter(path, staging / TABLE_FILE, features)
        with contextlib.closing(table.writer):
            yield table
            with naming(path):
                table.writer.finalize()
        with naming(path):
            _seal(staging, table.record)
            _move(staging, path, features)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def read_table(path: Path, features: Features, check: bool = True) -> tuple[Dataset, dict[str, Any]] | None:
    """Open what `new_table` wrote, memory-mapped, with its record; None if it is not there or damaged.

    Its size is always checked, its content with `check`.
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
        raise ValueError(f"{TABLE_FILE} has {file.stat().st_size} bytes, {record[_BYTES]} were written")
    if check and file_sha256(file) != record[_CONTENT]:
        raise ValueError("its content is not what was written")
    data = Dataset.from_file(str(file))
    if data.features != features:
        raise ValueError(f"its columns are {data.features}")
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


def _remove_abandoned(folder: Path) -> None:
    """Remove what killed programs left of their tables, which may be large."""
    for left in folder.glob(f"*{TEMPORARY}"):
        newest = max((p.stat().st_mtime for p in (left, *left.glob("*"))), default=0.0)
        if left.is_dir() and time.time() - newest > _ABANDONED:
            logger.info("removing %s, which a killed program left", left)
            shutil.rmtree(left, ignore_errors=True)
