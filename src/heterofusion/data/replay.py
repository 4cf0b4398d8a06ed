"""Replay data: data sets on disk or on the Hub become one mixed, tokenized `datasets.Dataset`.

`build_replay` loads every data set of `DataArguments` (`records.py`), samples it, turns each record into tokens and
labels (`formats.py`: loss on the answers only), cuts to `max_length` and mixes. What was sampled, cut and dropped is
in the `ReplayReport` that comes with it. The same arguments always give the same examples in the same order.
"""

import copy
import hashlib
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from tqdm import tqdm
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from heterofusion.data.arguments import DataArguments, DatasetSpec
from heterofusion.data.files import Records, load_records, sample_indices
from heterofusion.data.formats import IGNORE_INDEX, KNOWN_COLUMNS, detect_format, render, to_conversation, tokenize
from heterofusion.runtime.errors import UserError

logger = logging.getLogger(__name__)


@dataclass
class DatasetReport:
    """What became of one data set: of `read` records `sampled` were taken, and `kept` of those are in the mixture."""

    name: str
    format: str
    read: int
    sampled: int = 0
    cut: int = 0  # examples longer than max_length, those dropped for it included
    cut_tokens: int = 0  # tokens that were cut off them
    dropped: int = 0  # examples left without any label token
    dropped_empty: int = 0  # those of them whose answer is empty, at any length
    kept: int = 0
    tokens: int = 0  # in the kept examples, after the cut
    label_tokens: int = 0


@dataclass
class ReplayReport:
    """What became of all data sets of a mixture."""

    max_length: int
    datasets: list[DatasetReport] = field(default_factory=list)

    def total(self, count: str) -> int:
        """Sum of one count (`kept`, `cut`, ...) over the data sets."""
        return sum(getattr(report, count) for report in self.datasets)

    def summary(self) -> list[str]:
        """One line per data set, and one for all where there are several."""
        lines = [f"{r.name} ({r.format}): {describe_counts(asdict(r), self.max_length)}" for r in self.datasets]
        if len(self.datasets) > 1:
            counts = {name: self.total(name) for name in asdict(self.datasets[0]) if name not in ("name", "format")}
            lines.append(f"all {len(self.datasets)} data sets: {describe_counts(counts, self.max_length)}")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON types; of a local path its last part, since it is published with the adapter."""
        record = asdict(self)
        for entry in record["datasets"]:
            path = Path(entry["name"]).expanduser()
            if path.is_absolute() or path.exists():
                entry["name"] = path.name
        return record


def describe_counts(count: Mapping[str, Any], max_length: int) -> str:
    """The counts of a `DatasetReport` in words, for the log."""
    return (
        f"{count['read']} read, {count['sampled']} sampled, {count['cut']} cut to {max_length} tokens "
        f"({count['cut_tokens']} tokens removed), {count['dropped']} dropped without label tokens "
        f"({count['dropped_empty']} with an empty answer), {count['kept']} kept, {count['tokens']} tokens, "
        f"{count['label_tokens']} of them labels"
    )


def build_replay(
    args: DataArguments, tokenizer: PreTrainedTokenizerBase, kind: str = "replay"
) -> tuple[Dataset, ReplayReport]:
    """Load, sample, tokenize and mix the replay data sets.

    Args:
        args: The mixture.
        tokenizer: The target model's tokenizer; not changed.
        kind: What messages call the data: "replay", or "training" for that of an expert.

    Returns:
        The data set with `input_ids`, `attention_mask` and `labels` (lists of at most `max_length`), shuffled over all
        data sets by `dataset_seed`, and the report of what was sampled, cut and dropped.

    Raises:
        ValueError: A flag, a file or a record is not what it has to be; the message says which and what to do.
    """
    args.validate()
    if not args.dataset_name:
        raise UserError(f"--dataset_name is missing: name at least one {kind} data set")
    examples, report = _build(args.replay_sets(), args, tokenizer, kind)
    # A generator of its own: the order must not depend on how many draws the sampling took.
    order = np.random.default_rng([args.dataset_seed, 1]).permutation(len(examples))
    return as_dataset([examples[i] for i in order]), report


def build_eval(args: DataArguments, tokenizer: PreTrainedTokenizerBase) -> tuple[Dataset, ReplayReport]:
    """Load, sample and tokenize the evaluation data sets; like `build_replay`, but in the order of the files.

    Args:
        args: The mixture, with `eval_dataset_name` set.
        tokenizer: The target model's tokenizer; not changed.

    Returns:
        The data set and the report, as from `build_replay`.

    Raises:
        ValueError: As for `build_replay`.
    """
    args.validate()
    if not args.eval_dataset_name:
        raise UserError("--eval_dataset_name is missing: name at least one evaluation data set")
    examples, report = _build(args.eval_sets(), args, tokenizer, kind="eval")
    return as_dataset(examples), report


def make_collator(tokenizer: PreTrainedTokenizerBase, pad_to_multiple_of: int | None = None) -> DataCollatorForSeq2Seq:
    """Collator that pads on the right, labels with -100.

    Args:
        tokenizer: Gives the padding token, or else EOS, which the attention mask makes harmless. It is copied, so that
            what the user saves stays as it was.
        pad_to_multiple_of: Round the length of a batch up to a multiple of this.

    Returns:
        The collator, for `Trainer(data_collator=...)`.

    Raises:
        ValueError: The tokenizer has neither a padding token nor EOS.
    """
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise UserError("the tokenizer has neither a pad_token nor an eos_token to pad with: set its pad_token")
        tokenizer.pad_token = tokenizer.eos_token
    return DataCollatorForSeq2Seq(
        tokenizer, padding=True, pad_to_multiple_of=pad_to_multiple_of, label_pad_token_id=IGNORE_INDEX
    )


Example = tuple[list[int], list[int]]  # input_ids, labels


def _build(
    specs: list[DatasetSpec], args: DataArguments, tokenizer: PreTrainedTokenizerBase, kind: str
) -> tuple[list[Example], ReplayReport]:
    report = ReplayReport(args.max_length)
    examples: list[Example] = []
    shortest: list[int] = []  # tokens that a dropped example would have needed to keep a label
    labels = []
    for spec in specs:
        records = load_records(spec.name, spec.config, spec.split, kind)
        labels.append(records.label)
        kept, dataset_report, needed = _encode(records, spec, args, tokenizer)
        examples += kept
        report.datasets.append(dataset_report)
        shortest += needed
        if not kept and len(specs) > 1:
            logger.warning(
                "%s gives no example: all %d sampled ones are left without a label token within --max_length %d",
                records.label,
                dataset_report.sampled,
                args.max_length,
            )
    if not examples:
        raise no_examples(labels, shortest, args.max_length)
    if tokenizer.eos_token_id is None:
        logger.warning(
            "the tokenizer has no EOS token: plain texts end without one, and the model does not learn to stop"
        )
    return examples, report


def examples_sha256(examples: Dataset) -> str:
    """Hash of token ids and labels of examples, in their order."""
    digest = hashlib.sha256()
    for ids, labels in zip(examples["input_ids"], examples["labels"], strict=True):
        for values in (ids, labels):
            digest.update(np.asarray([len(values), *values], dtype=np.int64).tobytes())
    return digest.hexdigest()


def no_examples(labels: Sequence[str], needed: Sequence[int], max_length: int) -> ValueError:
    """The error of data that leave nothing to train on.

    Args:
        labels: names of the data sets in messages.
        needed: what `encode_records` gave for the examples that were dropped.
        max_length: `--max_length`.
    """
    if not needed:
        return ValueError(
            f"{', '.join(labels)}: every sampled answer is empty, so nothing is left to train on: fill them"
        )
    return ValueError(
        f"{', '.join(labels)}: all examples are too long for --max_length {max_length}, no label token is "
        f"left: raise it to {min(needed)} at least, which is what the shortest needs for its first label token"
    )


def _encode(
    records: Records, spec: DatasetSpec, args: DataArguments, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Example], DatasetReport, list[int]]:
    """Sample one data set and tokenize the sample: examples, counts, and the lengths that dropped examples need."""
    report = DatasetReport(spec.name, checked_format(records), read=len(records.rows))
    count = min(spec.max_examples, max(1, round(report.read * spec.ratio)))
    indices = sample_indices(report.read, count, args.dataset_seed)
    examples, _, needed = encode_records(records, indices, report, args.max_length, tokenizer)
    return examples, report, needed


def checked_format(records: Records) -> str:
    """The format of a data set's records, all of which are checked where they were parsed by us.

    Raises:
        ValueError: No known columns, or (whether or not it will be sampled) a broken record.
    """
    rows = records.rows
    columns = rows.column_names if isinstance(rows, Dataset) else list(rows[0])
    format = detect_format(columns)
    if format is None:
        raise UserError(
            f"{records.label} has no known columns (found: {', '.join(columns) or 'none'}): give it {KNOWN_COLUMNS}"
        )
    if isinstance(rows, list):  # a broken record is reported whether or not the seed happens to draw it
        for i, row in enumerate(rows):
            records.call(i, to_conversation, row, format)
    return format


def encode_records(
    records: Records,
    indices: Iterable[int],
    report: DatasetReport,
    max_length: int,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[list[Example], list[int], list[int]]:
    """Tokenize some records of a data set.

    Args:
        records: The data set.
        indices: Of the records, in order.
        report: Counts up what becomes of them.
        max_length: Number of tokens after which an example is cut.
        tokenizer: The target model's.

    Returns:
        The examples with a label token left, their indices, and of each other one whose answer is not empty the
        `max_length` that it would have needed.

    Raises:
        ValueError: A record that cannot be read or rendered; names it.
    """
    examples: list[Example] = []
    kept: list[int] = []
    needed: list[int] = []
    # Silent for the first seconds, and on all ranks but the first.
    quiet = os.environ.get("RANK", "0") != "0"
    for i in tqdm(indices, desc=f"Tokenizing {Path(report.name).name}", delay=3, leave=False, disable=quiet):
        report.sampled += 1
        prompt, answer = records.call(i, to_conversation, records.rows[i], report.format)
        rendered = records.call(i, render, prompt, answer, report.format, tokenizer)
        ids, labels = tokenize(rendered, tokenizer) if rendered.spans else ([], [])
        first = next((position for position, label in enumerate(labels) if label != IGNORE_INDEX), None)
        removed = max(0, len(ids) - max_length)
        report.cut += removed > 0
        report.cut_tokens += removed
        if first is None or first >= max_length:
            report.dropped += 1
            if first is None:
                report.dropped_empty += 1
            else:
                needed.append(first + 1)
            continue
        examples.append((ids[:max_length], labels[:max_length]))
        kept.append(i)
        report.kept += 1
        report.tokens += len(examples[-1][0])
        report.label_tokens += sum(label != IGNORE_INDEX for label in examples[-1][1])
    return examples, kept, needed


def as_dataset(examples: list[Example]) -> Dataset:
    """Examples as the data set that a trainer reads: `input_ids`, `attention_mask` and `labels`."""
    return Dataset.from_dict(
        {
            "input_ids": [ids for ids, _ in examples],
            "attention_mask": [[1] * len(ids) for ids, _ in examples],
            "labels": [labels for _, labels in examples],
        }
    )
