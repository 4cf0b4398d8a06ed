"""Data sets as rows that still know where they came from: a file, a folder or a Hub id.

JSON and CSV are parsed by the standard library, not by `datasets`: it infers one type for a column (an answer "42"
becomes a number, "NA" nothing) and names no line. Parquet, folders and Hub ids are read by `datasets` and pyarrow.
"""

import csv
import io
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError
from pyarrow import parquet

from heterofusion.data.formats import detect_format, type_name
from heterofusion.runtime.errors import UserError, one_line

T = TypeVar("T")

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
# A name that ends like this was meant as a file, not as a Hub id (which may hold a dot too).
FILE_SUFFIXES = (*SUFFIXES, ".txt", ".tsv", ".gz", ".bz2", ".xz", ".zip", ".zst", ".arrow", ".ndjson", ".yaml", ".yml")

Parsed = tuple[list[dict[str, Any]], list[int] | None]  # rows, and the line of each where a row has its own


@dataclass
class Records:
    """The rows of one data set, and how to name one of them in a message."""

    label: str
    rows: list[dict[str, Any]] | Dataset
    lines: list[int] | None = None  # line number of each row, where the file has one row a line

    @property
    def columns(self) -> list[str]:
        """Those of the data set; of rows that we parsed, those of the first."""
        return self.rows.column_names if isinstance(self.rows, Dataset) else list(self.rows[0])

    def where(self, index: int) -> str:
        """Name the row with this index (from 0) as a user counts it (from 1)."""
        return f"{self.label}, line {self.lines[index]}" if self.lines else f"{self.label}, record {index + 1}"

    def call(self, index: int, function: Callable[..., T], *args: Any) -> T:
        """Call a function for the row with this index; a UserError that it raises gets the row's name."""
        try:
            return function(*args)
        except UserError as error:
            raise UserError(f"{self.where(index)}: {error}") from error


def load_records(
    name: str, config: str | None = None, split: str = "train", kind: str = "replay", revision: str | None = None
) -> Records:
    """Load one data set, which is never empty: a local file or folder, or a Hub id with configuration and split.

    `kind` ("replay", "training", "eval", "prompt", ...) is what messages call it.
    """
    path = Path(os.path.abspath(os.path.expanduser(name)))
    flags = ("--eval_config", "--eval_split") if kind == "eval" else ("--dataset_config", "--dataset_split")
    if os.path.exists(path) and not os.path.isdir(path):  # unlike Path.exists, no error for a name that is too long
        if "[" in split:
            raise UserError(f"{kind} file {path} has no splits, but {flags[1]} is {split!r}: use max_examples")
        records = _load_file(path, f"{kind} file {path}")
    elif os.path.isdir(path):
        records = _load_with_datasets(str(path), f"{kind} folder {path}", config, split, flags, None)
    elif name.startswith((".", "/", "~")) or name.count("/") > 1 or path.suffix.lower() in FILE_SUFFIXES:
        raise UserError(f"{kind} file {path} does not exist: check the path")
    else:
        records = _load_with_datasets(name, f"data set {name!r}", config, split, flags, revision)
    if len(records.rows) == 0:
        raise UserError(f"{records.label} holds no records: leave it out or fill it")
    return records


def sample_indices(total: int, count: int, seed: int) -> list[int]:
    """`min(total, count)` of `range(total)`, ascending; a larger count only adds some."""
    return sorted(np.random.default_rng(seed).permutation(total)[:count].tolist())


def _load_with_datasets(
    source: str, label: str, config: str | None, split: str, flags: tuple[str, str], revision: str | None
) -> Records:
    """A folder or a Hub id as `datasets` reads it."""
    saved = any((Path(source) / name).exists() for name in ("dataset_dict.json", "dataset_info.json", "state.json"))
    try:
        data = load_from_disk(source) if saved else load_dataset(source, config, split=split, revision=revision)
    except DatasetGenerationError as error:
        found = one_line(error.__cause__ or error)
        raise UserError(f"{label} holds a file that cannot be read ({found}): correct that file") from error
    except ValueError as error:
        found = f"no configuration {config!r} with split {split!r} that can be loaded ({one_line(error)})"
        raise UserError(f"{label} has {found}: check {' and '.join(flags)}, or name a file") from error
    except (OSError, RuntimeError) as error:
        local = "holds no data set that can be read"
        found = local if os.path.isdir(source) else "is neither a local file or folder nor reachable on the Hub"
        raise UserError(f"{label} {found} ({one_line(error)}): check the name, or download it first") from error
    if isinstance(data, DatasetDict):
        if split not in data:
            names = ", ".join(data)
            raise UserError(f"{label} has no split {split!r}, only {names}: set {flags[1]} to one of {names}")
        data = data[split]
    return Records(label, data)


def _load_file(path: Path, label: str) -> Records:
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f"{label} has the extension '{path.suffix}': give one of {', '.join(SUFFIXES)}")
    if suffix == ".parquet":
        try:
            # Not Dataset.from_parquet: it copies the file into the user's cache, and its bar stands beside an error.
            return Records(label, Dataset(parquet.ParquetFile(path).read()))
        except ValueError as error:  # what pyarrow raises are subclasses
            raise UserError(f"{label} is not a readable parquet file ({one_line(error)}): write it again") from error
    text = read_text(path, label)
    return Records(label, *(_parse_csv(text, label) if suffix == ".csv" else parse_json(text, label)))


def read_text(path: Path, label: str) -> str:
    """Text of a UTF-8 file, never blank, without a byte order mark; `label` names the file in messages."""
    try:
        text = path.read_bytes().decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        byte = f"byte 0x{error.object[error.start]:02x} at offset {error.start}"
        raise UserError(f"{label} is not UTF-8 ({byte}): convert it") from error
    if not text.strip():
        raise UserError(f"{label} is empty: leave it out or fill it")
    return text


def parse_json(text: str, label: str, is_record: Callable[[dict[str, Any]], Any] = detect_format) -> Parsed:
    """Rows of JSON: a list of objects, an object that holds one such list, or one object a line.

    `is_record` tells a row from an object that holds a list of rows.
    """
    lines = None
    try:
        value = load_json(text, label)
    except UserError as error:
        cause = error.__cause__
        if not isinstance(cause, json.JSONDecodeError) or cause.msg != "Extra data" or text.lstrip().startswith("["):
            raise
        # Not splitlines(): a JSON string may hold U+2028 and other characters that it takes for line ends.
        numbered = [(i, line) for i, line in enumerate(text.split("\n"), start=1) if line.strip()]
        value, lines = [load_json(line, label, i) for i, line in numbered], [i for i, _ in numbered]
    if isinstance(value, dict) and not is_record(value):
        lists = [item for item in value.values() if isinstance(item, list)]
        if len(lists) > 1:
            found = f"{len(lists)} lists and no known columns (found: {', '.join(value)})"
            raise UserError(f"{label} is an object with {found}: make it a list of records, or leave one list in it")
        value = lists[0] if lists else value
    if isinstance(value, dict):
        return [value], [1] if "\n" not in text.strip() else None
    if not isinstance(value, list):
        raise UserError(f"{label} is {type_name(value)}: make it a list of objects")
    for i, row in enumerate(value):
        if not isinstance(row, dict):
            place = f", line {lines[i]}" if lines else f": the item at index {i}"
            raise UserError(f"{label}{place} is {type_name(row)}, not an object: make it one")
    return value, lines


def load_json(text: str, label: str, line: int | None = None) -> Any:
    """Parse one JSON value, which is a line of the file that `label` names if `line` is given."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {line or error.lineno}, column {error.colno}"
        raise UserError(f"{label} is not valid JSON at {place} ({error.msg}): correct that line") from error
    except (ValueError, RecursionError) as error:  # a number with thousands of digits, nested without end
        raise UserError(f"{label} holds a value that cannot be read ({one_line(error)}): remove it") from error


def _parse_csv(text: str, label: str) -> Parsed:
    """Rows of a CSV text with a header, all values as strings, and the line on which each ends."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    try:
        header = next(reader)
        for fields in filter(None, reader):  # no blank lines
            if len(fields) != len(header):
                raise UserError(
                    f"{label}, line {reader.line_num} has {len(fields)} fields, but the header has {len(header)}: "
                    "quote fields that hold commas"
                )
            rows.append(dict(zip(header, fields, strict=True)))
            lines.append(reader.line_num)
    except csv.Error as error:
        start = (lines[-1] if lines else 1) + 1  # the reader has gone on to look for a closing quote
        raise UserError(f"{label} is not valid CSV from line {start} on ({error}): correct that line") from error
    return rows, lines
