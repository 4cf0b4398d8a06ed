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
    if os.path.isdir(path):
        label = f"{kind} folder {path}"
        saved = any((path / file).exists() for file in ("dataset_dict.json", "dataset_info.json", "state.json"))
        load = (lambda: load_from_disk(str(path))) if saved else (lambda: load_dataset(str(path), config, split=split))
        unreadable = "holds no data set that can be read", "name a folder of data files, or one of save_to_disk"
        records = Records(label, _from_datasets(load, label, config, split, kind, unreadable))
    elif os.path.exists(path):  # unlike Path.exists, no error for a name that is too long
        if "[" in split:
            raise UserError(
                f"{kind} file {path} has no splits, but {_flags(kind)[1]} slices one ({split!r}): use max_examples"
            )
        records = _load_file(path, f"{kind} file {path}")
    elif name.startswith((".", "/", "~")) or name.count("/") > 1 or path.suffix.lower() in FILE_SUFFIXES:
        raise UserError(f"{kind} file {path} does not exist: check the path")
    else:
        label = f"data set {name!r}"
        unreadable = (
            "is neither a local file or folder nor reachable on the Hub",
            "check the name, or download it first",
        )
        rows = _from_datasets(
            lambda: load_dataset(name, config, split=split, revision=revision), label, config, split, kind, unreadable
        )
        records = Records(label, rows)
    if len(records.rows) == 0:
        raise UserError(f"{records.label} holds no records: leave it out or fill it")
    return records


def sample_indices(total: int, count: int, seed: int) -> list[int]:
    """`min(total, count)` of `range(total)`, ascending; a larger count only adds some."""
    return sorted(np.random.default_rng(seed).permutation(total)[:count].tolist())


def _from_datasets(
    load: Callable[[], Any], label: str, config: str | None, split: str, kind: str, unreadable: tuple[str, str]
) -> Dataset:
    """What `load` gives; `unreadable` is what is told, and the remedy, if there is nothing that it can read."""
    config_flag, split_flag = _flags(kind)
    try:
        data = load()
    except DatasetGenerationError as error:
        found = one_line(error.__cause__ or error)
        raise UserError(f"{label} holds a file that cannot be read ({found}): correct that file") from error
    except ValueError as error:
        remedy = "name a file" if kind == "prompt" else f"check {config_flag} and {split_flag}"
        raise UserError(
            f"{label} has no configuration {config!r} with split {split!r} that can be loaded ({one_line(error)}): "
            f"{remedy}"
        ) from error
    except (OSError, RuntimeError) as error:
        raise UserError(f"{label} {unreadable[0]} ({one_line(error)}): {unreadable[1]}") from error
    if not isinstance(data, DatasetDict):
        return data
    if split not in data:
        names = ", ".join(data)
        remedy = "name a file" if kind == "prompt" else f"set {split_flag} to one of {names}"
        raise UserError(f"{label} has no split {split!r}, only {names}: {remedy}")
    return data[split]


def _flags(kind: str) -> tuple[str, str]:
    return ("--eval_config", "--eval_split") if kind == "eval" else ("--dataset_config", "--dataset_split")


def _load_file(path: Path, label: str) -> Records:
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f"{label} has the extension '{path.suffix}': give one of {', '.join(SUFFIXES)}")
    if suffix == ".parquet":
        content = _read_bytes(path, label)
        try:
            # Not Dataset.from_parquet: it copies the file into the user's cache, and its bar stands beside an error.
            return Records(label, Dataset(parquet.read_table(io.BytesIO(content))))
        except (OSError, ValueError) as error:  # what pyarrow raises are subclasses
            raise UserError(f"{label} is not a readable parquet file ({one_line(error)}): write it again") from error
    text = read_text(path, label)
    return Records(label, *(parse_csv(text, label) if suffix == ".csv" else parse_json(text, label)))


def read_text(path: Path, label: str) -> str:
    """Text of a UTF-8 file, never blank, without a byte order mark; `label` names the file in messages."""
    try:
        text = _read_bytes(path, label).decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        byte = f"byte 0x{error.object[error.start]:02x} at offset {error.start}"
        raise UserError(f"{label} is not UTF-8 ({byte}): convert it") from error
    if not text.strip():
        raise UserError(f"{label} is empty: leave it out or fill it")
    return text


def _read_bytes(path: Path, label: str) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{label} cannot be read ({one_line(error)}): check its permissions") from error
    if not content:
        raise UserError(f"{label} is empty: leave it out or fill it")
    return content


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
            raise UserError(
                f"{label} is an object with {len(lists)} lists and no known columns (found: {', '.join(value)}): make "
                'it a list of records, or an object with one list, such as {"data": [...]}'
            )
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


def parse_csv(text: str, label: str) -> Parsed:
    """Rows of a CSV text with a header, all values as strings, and the line on which each ends."""
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    try:
        for row in reader:
            if None in row or None in row.values():
                found = sum(value is not None for key, value in row.items() if key is not None)
                found += len(row.get(None, []))
                raise UserError(
                    f"{label}, line {reader.line_num} has {found} fields, but the header has "
                    f"{len(reader.fieldnames or [])}: quote fields that hold commas"
                )
            rows.append(row)
            lines.append(reader.line_num)
    except csv.Error as error:
        start = (lines[-1] if lines else 1) + 1  # the reader has gone on to look for a closing quote
        raise UserError(f"{label} is not valid CSV from line {start} on ({error}): correct that line") from error
    return rows, lines
