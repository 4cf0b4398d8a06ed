"""Replay data as records: a file, a folder or a Hub id becomes rows that still know where they came from.

JSON and CSV files are parsed here, so that a message can name the line and no value is re-interpreted; folders and
Hub ids go through `datasets`.
"""

import csv
import io
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError
from pyarrow import parquet

from heterofusion.data.formats import detect_format, type_name
from heterofusion.runtime.errors import UserError

T = TypeVar("T")

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
# A name that ends like this was meant as a file, not as a Hub id (which may hold a dot too).
FILE_SUFFIXES = (*SUFFIXES, ".txt", ".tsv", ".gz", ".bz2", ".xz", ".zip", ".zst", ".arrow", ".ndjson", ".yaml", ".yml")

Parsed = tuple[list[dict[str, Any]], list[int] | None]  # records, and the line of each where a record has its own


@dataclass
class Records:
    """The records of one data set, and how to name one of them in a message."""

    label: str
    rows: list[dict[str, Any]] | Dataset
    lines: list[int] | None = None  # line number of each record, where the file has one record a line

    def where(self, index: int) -> str:
        """Name the record with this index (from 0) as a user counts it (from 1)."""
        return f"{self.label}, line {self.lines[index]}" if self.lines else f"{self.label}, record {index + 1}"

    def call(self, index: int, function: Callable[..., T], *args: Any) -> T:
        """Call a function for the record with this index; a ValueError that it raises gets the record's name."""
        try:
            return function(*args)
        except ValueError as error:
            raise UserError(f"{self.where(index)}: {error}") from error


def load_records(
    name: str, config: str | None = None, split: str = "train", kind: str = "replay", revision: str | None = None
) -> Records:
    """Load one data set.

    JSON and CSV files are parsed by us, so that messages can name the line and no value is re-interpreted; folders and
    Hub ids go through `datasets`.

    Args:
        name: A local file or folder, or a Hub id.
        config: Configuration of a Hub data set or a folder.
        split: Split of a Hub data set or a folder; a file has none.
        kind: "replay", "training" or "eval", for messages.
        revision: Commit, branch or tag of a Hub data set.

    Returns:
        The records; never empty.

    Raises:
        ValueError: Nothing there, empty, or not readable.
    """
    path = Path(os.path.abspath(os.path.expanduser(name)))
    if os.path.isdir(path):
        records = Records(f"{kind} folder {path}", _load_folder(path, config, split, kind))
    elif os.path.exists(path):  # unlike Path.exists, no error for a name that is too long
        if "[" in split:
            raise UserError(
                f"{kind} file {path} has no splits, but {_split_flag(kind)} slices one ({split!r}): use max_examples"
            )
        records = _load_file(path, f"{kind} file {path}")
    elif name.startswith((".", "/", "~")) or name.count("/") > 1 or path.suffix.lower() in FILE_SUFFIXES:
        raise UserError(f"{kind} file {path} does not exist: check the path")
    else:
        try:
            rows = load_dataset(name, config, split=split, revision=revision)
        # These two are what datasets and huggingface_hub raise when the Hub or the data set is out of reach.
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"data set {name!r} is neither a local file or folder nor reachable on the Hub ({_one_line(error)}): "
                "check the name, or download it first"
            ) from error
        except ValueError as error:
            _raise_not_loaded(f"data set {name!r}", config, split, kind, error)
        records = Records(f"data set {name!r}", rows)
    if len(records.rows) == 0:
        raise UserError(f"{records.label} holds no records: leave it out or fill it")
    return records


def sample_indices(total: int, count: int, seed: int) -> list[int]:
    """Indices of a sample, ascending; they depend on these numbers alone.

    Args:
        total: Number of records.
        count: Number of records to take at most.
        seed: Seed of the choice.

    Returns:
        `min(total, count)` indices; a larger count only adds some.
    """
    return sorted(np.random.default_rng(seed).permutation(total)[:count].tolist())


def _load_file(path: Path, label: str) -> Records:
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f"{label} has the extension '{path.suffix}': give one of {', '.join(SUFFIXES)}")
    if suffix == ".parquet":
        return Records(label, _read_parquet(path, label))
    text = read_text(path, label)
    rows, lines = parse_csv(text, label) if suffix == ".csv" else parse_json(text, label, suffix == ".jsonl")
    return Records(label, rows, lines)


def read_text(path: Path, label: str) -> str:
    """Text of a UTF-8 file, without a byte order mark.

    Args:
        path: The file.
        label: Names the file in messages.

    Returns:
        The text; never blank.

    Raises:
        ValueError: It cannot be read, is empty, or is not UTF-8.
    """
    try:
        text = _read_bytes(path, label).decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{label} is not UTF-8 (byte 0x{error.object[error.start]:02x} at offset {error.start}): convert it"
        ) from error
    if not text.strip():
        raise UserError(f"{label} is empty: leave it out or fill it")
    return text


def _read_bytes(path: Path, label: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{label} cannot be read ({_one_line(error)}): check its permissions") from error


def _read_parquet(path: Path, label: str) -> Dataset:
    content = _read_bytes(path, label)
    if not content.strip():
        raise UserError(f"{label} is empty: leave it out or fill it")
    try:
        # Not Dataset.from_parquet: it copies the file into the user's cache, and its bar stands beside an error.
        return Dataset(parquet.read_table(io.BytesIO(content)))
    except (OSError, ValueError) as error:  # what pyarrow raises are subclasses
        raise UserError(f"{label} is not a readable parquet file ({_one_line(error)}): write it again") from error


def _load_folder(path: Path, config: str | None, split: str, kind: str) -> Dataset:
    label = f"{kind} folder {path}"
    try:
        if not any((path / name).exists() for name in ("dataset_dict.json", "dataset_info.json", "state.json")):
            return load_dataset(str(path), config, split=split)
        data = load_from_disk(str(path))
    except OSError as error:
        raise UserError(
            f"{label} holds no data set that can be read ({_one_line(error)}): name a folder of data files, or one "
            "that save_to_disk wrote"
        ) from error
    except DatasetGenerationError as error:
        cause = error.__cause__ or error
        raise UserError(f"{label} holds a file that cannot be read ({_one_line(cause)}): correct that file") from error
    except (ValueError, RuntimeError) as error:
        _raise_not_loaded(label, config, split, kind, error)
    if isinstance(data, DatasetDict):
        if split not in data and kind == "prompt":
            raise UserError(f"{label} has no split {split!r}, only {', '.join(data)}: name a file")
        if split not in data:
            raise UserError(f"{label} has no split {split!r}: set {_split_flag(kind)} to one of {', '.join(data)}")
        return data[split]
    return data


def _raise_not_loaded(label: str, config: str | None, split: str, kind: str, error: Exception) -> NoReturn:
    if kind == "prompt":  # no flag chooses a part of it
        raise UserError(
            f"{label} has no split {split!r} that can be loaded ({_one_line(error)}): name a file"
        ) from error
    config_flag = "--eval_config" if kind == "eval" else "--dataset_config"
    raise UserError(
        f"{label} has no configuration {config!r} with split {split!r} that can be loaded ({_one_line(error)}): check "
        f"{config_flag} and {_split_flag(kind)}"
    ) from error


def _split_flag(kind: str) -> str:
    return "--eval_split" if kind == "eval" else "--dataset_split"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def parse_json(
    text: str, label: str, lines_expected: bool, is_record: Callable[[dict[str, Any]], Any] = detect_format
) -> Parsed:
    """Read JSON: a list of objects, an object that holds one such list, or one object a line.

    Args:
        text: The file's text.
        label: Names the file in messages.
        lines_expected: Whether the extension says that there is one object a line (`.jsonl`).
        is_record: Tells a record from an object that holds a list of records.

    Returns:
        The records, and their line numbers where there is one object a line.

    Raises:
        ValueError: A syntax error (with its line and column), or something else where an object has to be.
    """
    first_line = text.lstrip().split("\n", 1)[0]
    if not first_line.startswith("[") and (lines_expected or _is_object(first_line)):
        rows, lines = [], []
        # Not splitlines(): a JSON string may hold U+2028 and other characters that it takes for line ends.
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                rows.append(load_json(line.strip("\r"), label, number))
                lines.append(number)
                if not isinstance(rows[-1], dict):
                    raise UserError(
                        f"{label}, line {number} is {type_name(rows[-1])}, not an object: write one {{...}} object "
                        "a line"
                    )
        if len(rows) > 1 or is_record(rows[0]) or not _lists(rows[0]):
            return rows, lines
    value = load_json(text, label)
    if isinstance(value, dict) and not is_record(value):
        lists = _lists(value)
        if len(lists) != 1:
            raise UserError(
                f"{label} is an object with {len(lists)} lists and no known columns (found: "
                f"{', '.join(value) or 'none'}): make it a list of records, or an object with one list, such as "
                '{"data": [...]}'
            )
        value = value[lists[0]]
    rows = [value] if isinstance(value, dict) else value
    if not isinstance(rows, list):
        raise UserError(f"{label} is {type_name(value)}: make it a list of objects")
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(
                f"{label}: the item at index {i} is {type_name(row)}, not an object: make every item an object"
            )
    return rows, None


def load_json(text: str, label: str, line: int | None = None) -> Any:
    """Parse one JSON value.

    Args:
        text: The text.
        label: Names the file in messages.
        line: Line of the file that the text is, if it is one.

    Raises:
        ValueError: A syntax error (with its line and column), or a value that cannot be held.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{label} is not valid JSON at line {line or error.lineno}, column {error.colno} ({error.msg}): "
            "correct that line"
        ) from error
    except RecursionError as error:
        raise UserError(f"{label} is nested too deeply to be read: make it a flat list of objects") from error
    except ValueError as error:  # a number with thousands of digits
        raise UserError(f"{label} holds a value that cannot be read ({error}): remove it") from error


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _lists(value: dict[str, Any]) -> list[str]:
    return [key for key, item in value.items() if isinstance(item, list)]


def parse_csv(text: str, label: str) -> Parsed:
    """Read a CSV text with a header line; every value stays a string.

    Args:
        text: The file's text.
        label: Names the file in messages.

    Returns:
        The records, and the line on which each ends.

    Raises:
        ValueError: Broken quoting, or a row whose number of fields is not the header's.
    """
    # Not pandas: it reads "NA" or an empty answer as null, and an answer "42" as a number.
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows, lines = [], []
    try:
        for row in reader:
            if None in row or None in row.values():
                found = len([value for key, value in row.items() if key is not None and value is not None])
                found += len(row.get(None, []))
                raise UserError(
                    f"{label}, line {reader.line_num} has {found} fields, but the header has "
                    f"{len(reader.fieldnames or [])}: quote fields that hold commas"
                )
            rows.append(dict(row))
            lines.append(reader.line_num)
    except csv.Error as error:
        start = (lines[-1] if lines else 1) + 1  # the reader has gone on to look for a closing quote
        raise UserError(f"{label} is not valid CSV from line {start} on ({error}): correct that line") from error
    return rows, lines
