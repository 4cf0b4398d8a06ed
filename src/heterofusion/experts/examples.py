"""Data sets to evaluate on: records become prompts and references, in the order of the data set."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from heterofusion.data.files import Records, load_records, sample_indices
from heterofusion.data.formats import (
    KNOWN_COLUMNS,
    Part,
    detect_format,
    render_prompt,
    to_conversation,
    tokenize_prompt,
)
from heterofusion.evaluation.arguments import EvalDataArguments
from heterofusion.evaluation.metrics import choose_metric, score
from heterofusion.experts.generation import cut_prompt
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.files import file_sha256

_KIND = "test"  # what messages call the data


@dataclass(frozen=True)
class EvalSet:
    """The sample of one data set, before any tokenizer.

    Args:
        label: Its name in results.
        metric: One of `heterofusion.evaluation.metrics.METRICS`.
        format: A key of `heterofusion.data.formats.FORMATS`.
        records: Where the examples are from, for messages.
        indices: Indices of the sampled records, ascending.
        examples: Prompt and answer of each sampled record, as `to_conversation` gives them.
        sha256: Of the file; of a folder or a Hub data set, of the sampled records.
        sample: What was sampled: `max_examples` and, where not all are taken, the seed.
    """

    label: str
    metric: str
    format: str
    records: Records
    indices: list[int]
    examples: list[tuple[Part, Part]]
    sha256: str
    sample: dict[str, int]

    def identity(self) -> dict[str, Any]:
        """What must be the same for predictions to be of the same examples."""
        return {"sha256": self.sha256, **self.sample}


@dataclass(frozen=True)
class Prompts:
    """The examples of one data set for one tokenizer.

    Args:
        texts: Prompts as the tokenizer reads them, before they are cut.
        ids: Their token ids, cut; of an ensemble those of every member, one list each.
        lengths: How many token ids each has.
        references: The right answers.
        cut: How many prompts were cut.
    """

    texts: list[str]
    ids: list[Any]
    lengths: list[int]
    references: list[str]
    cut: int


def load_eval_sets(args: EvalDataArguments) -> list[EvalSet]:
    """Load and sample the data sets, and choose their metrics.

    Args:
        args: The flags.

    Returns:
        One set per data set, in order.

    Raises:
        ValueError: A file or a record is not what it has to be, or there is no metric for it; the message says which
            and what to do.
    """
    sets = []
    for spec, label, metric in zip(args.specs(), args.labels(), args.metrics(), strict=True):
        records = load_records(spec.name, spec.config, spec.split, _KIND)
        columns = records.rows.column_names if isinstance(records.rows, Dataset) else list(records.rows[0])
        format = detect_format(columns)
        if format is None or format == "text":
            raise UserError(
                f"{records.label} has no columns of prompts and answers (found: {', '.join(columns) or 'none'}): give "
                f"it {KNOWN_COLUMNS.rpartition(', or ')[0]}"
            )
        indices = sample_indices(len(records.rows), spec.max_examples, args.dataset_seed)
        rows = [records.rows[i] for i in indices]
        examples = [records.call(i, to_conversation, row, format) for i, row in zip(indices, rows, strict=True)]
        is_file = isinstance(records.rows, list) or os.path.isfile(os.path.expanduser(spec.name))
        sha256 = file_sha256(Path(spec.name).expanduser()) if is_file else _digest(rows)
        sample = {"max_examples": spec.max_examples, "dataset_seed": args.dataset_seed}
        sets.append(
            EvalSet(
                label,
                choose_metric(metric, _kinds(records), records.label),
                format,
                records,
                indices,
                examples,
                sha256,
                sample if len(indices) < len(records.rows) else {"max_examples": len(indices)},
            )
        )
    return sets


def _kinds(records: Records) -> Iterator[dict[str, Any]]:
    """The columns that tell the metric, of all records: a file of several kinds is refused whatever the sample."""
    if isinstance(records.rows, list):
        yield from records.rows
        return
    names = [name for name in ("kind", "task") if name in records.rows.column_names]
    for row in records.rows.select_columns(names) if names else [{}]:
        yield dict(row)


def encode(examples: EvalSet, tokenizer: PreTrainedTokenizerBase, max_prompt_length: int | None) -> Prompts:
    """Render and tokenize prompts as training does.

    Args:
        examples: The sample of one data set.
        tokenizer: Of the model that answers.
        max_prompt_length: Longer prompts are cut to that many tokens, on the left; None cuts none.

    Returns:
        Prompts and references, in the order of the data set.

    Raises:
        ValueError: The chat template refuses a record, a prompt is empty, or a reference is none that the metric
            knows; names the record.
    """
    rendered = [
        examples.records.call(index, render_prompt, prompt, answer, examples.format, tokenizer)
        for index, (prompt, answer) in zip(examples.indices, examples.examples, strict=True)
    ]
    whole = [tokenize_prompt(prompt, tokenizer) for prompt in rendered]
    for index, ids in zip(examples.indices, whole, strict=True):
        if not ids:
            raise UserError(f"{examples.records.where(index)}: the prompt is empty; fill it or leave the record out")
    references = [prompt.reference for prompt in rendered]
    try:
        score(examples.metric, references, references)  # what cannot be scored is refused before it is generated
    except ValueError as error:
        raise UserError(f"{examples.records.label}: {error}") from error
    bos: Any = tokenizer.bos_token_id
    cut = [cut_prompt(ids, max_prompt_length, bos) for ids in whole]
    return Prompts(
        texts=[prompt.text for prompt in rendered],
        ids=cut,
        lengths=list(map(len, cut)),
        references=references,
        cut=0 if max_prompt_length is None else sum(len(ids) > max_prompt_length for ids in whole),
    )


def _digest(rows: list[dict[str, Any]]) -> str:
    """SHA-256 of records, in place of a file's."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()
