"""Examples that experts answer: records become prompts and references, in the order of the data set."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from heterofusion.data.files import Records, load_records, sample_indices
from heterofusion.data.formats import (
    KNOWN_COLUMNS,
    Part,
    detect_format,
    render_prompt,
    to_conversation,
    tokenize_prompt,
)
from heterofusion.data.replay import DatasetSpec
from heterofusion.experts.generation import cut_prompt
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


@dataclass(frozen=True)
class Prompts:
    """The examples of one data set for one tokenizer."""

    texts: list[str]  # as the tokenizer reads them, before they are cut
    ids: list[Any]  # token ids, cut; of an ensemble those of every member, one list each
    lengths: list[int]
    references: list[str]
    cut: int  # how many were cut


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


def encode(examples: Examples, tokenizer: Any, max_prompt_length: int | None) -> Prompts:
    """Render and tokenize prompts as training does; longer ones are cut on the left."""
    rendered = [
        examples.records.call(index, render_prompt, prompt, answer, examples.format, tokenizer)
        for index, (prompt, answer) in zip(examples.indices, examples.examples, strict=True)
    ]
    whole = [tokenize_prompt(prompt, tokenizer) for prompt in rendered]
    for index, ids in zip(examples.indices, whole, strict=True):
        if not ids:
            raise UserError(f"{examples.records.where(index)}: the prompt is empty; fill it or leave the record out")
    cut = [cut_prompt(ids, max_prompt_length, tokenizer.bos_token_id) for ids in whole]
    return Prompts(
        texts=[prompt.text for prompt in rendered],
        ids=cut,
        lengths=list(map(len, cut)),
        references=[prompt.reference for prompt in rendered],
        cut=sum(len(short) < len(ids) for short, ids in zip(cut, whole, strict=True)),
    )
