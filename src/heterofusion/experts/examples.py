"""Examples that experts answer: records become prompts and references, in the order of the data set."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset

from heterofusion.data.files import Records, load_records, sample_indices
from heterofusion.data.formats import KNOWN_COLUMNS, Part, detect_format, to_conversation
from heterofusion.data.replay import DatasetSpec
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.files import file_sha256


@dataclass(frozen=True)
class Examples:
    """A sample of one data set, before any tokenizer."""

    label: str  # its name in results
    format: str  # a key of `heterofusion.data.formats.FORMATS`
    records: Records  # where it is from, for messages
    indices: list[int]  # of the sampled records, ascending
    examples: list[tuple[Part, Part]]  # prompt and answer of each, as `to_conversation` gives them
    sha256: str  # of the file; of a folder or a Hub data set, of the sampled records
    sample: dict[str, int]  # `max_examples` and, where not all are taken, the seed


@dataclass
class Prompts:
    """The examples of one data set for one tokenizer."""

    texts: list[str] = field(default_factory=list)  # as the tokenizer reads them, before they are cut
    ids: list[Any] = field(default_factory=list)  # token ids, cut; of an ensemble those of every member, one list each
    lengths: list[int] = field(default_factory=list)
    references: list[str] = field(default_factory=list)
    cut: int = 0  # how many were cut


def load_examples(spec: DatasetSpec, label: str, seed: int) -> Examples:
    """Load a data set of prompts and answers, and draw its sample."""
    records = load_records(spec.name, spec.config, spec.split, "test")
    columns = records.rows.column_names if isinstance(records.rows, Dataset) else list(records.rows[0])
    format = detect_format(columns)
    if format is None or format == "text":
        raise UserError(
            f"{records.label} has no columns of prompts and answers (found: {', '.join(columns) or 'none'}): give "
            f"it {KNOWN_COLUMNS.rpartition(', or ')[0]}"
        )
    indices = sample_indices(len(records.rows), spec.max_examples, seed)
    rows = [records.rows[i] for i in indices]
    examples = [records.call(i, to_conversation, row, format) for i, row in zip(indices, rows, strict=True)]
    path = Path(os.path.expanduser(spec.name))
    if path.is_file():
        sha256 = file_sha256(path)
    else:
        sha256 = hashlib.sha256("".join(json.dumps(r, sort_keys=True, default=str) for r in rows).encode()).hexdigest()
    whole = len(indices) == len(records.rows)
    sample = {"max_examples": len(indices)} if whole else {"max_examples": spec.max_examples, "dataset_seed": seed}
    return Examples(label, format, records, indices, examples, sha256, sample)
