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

from heterofusion.data.files import Records, load_records, sample_indices
from heterofusion.data.formats import IGNORE_INDEX, KNOWN_COLUMNS, detect_format, render, to_conversation, tokenize
from heterofusion.runtime.errors import UserError


@dataclass(frozen=True)
class DatasetSpec:
    """One data set of a mixture, with the values of the list flags that belong to it."""

    name: str
    config: str | None
    split: str
    max_examples: int
    ratio: float


@dataclass
class DataArguments:
    """Flags for the replay mixture; list flags have one value for all data sets, or one per data set."""

    dataset_name: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Replay data sets: local .json, .jsonl, .csv or .parquet files, local folders, or ids on the Hub."
        },
    )
    dataset_config: list[str] | None = field(
        default=None,
        metadata={"help": "Configuration of each Hub data set or local folder ('default' where there is only one)."},
    )
    dataset_split: list[str] = field(
        default_factory=lambda: ["train"],
        metadata={"help": "Split of each replay data set; a local file has no splits and is read whole."},
    )
    max_examples: list[int] = field(
        default_factory=lambda: [300],
        metadata={"help": "Number of examples that are sampled from each replay data set at most."},
    )
    dataset_ratio: list[float] = field(
        default_factory=lambda: [1.0],
        metadata={"help": "Fraction of each replay data set to sample, before max_examples caps it (0 < ratio <= 1)."},
    )
    dataset_seed: int = field(
        default=42, metadata={"help": "Seed of the sampling and of the order in which the data sets are mixed."}
    )
    max_length: int = field(
        default=1024, metadata={"help": "Number of tokens after which an example is cut off on the right."}
    )
    eval_dataset_name: list[str] | None = field(
        default=None, metadata={"help": "Data sets for the evaluation loss, named like those of dataset_name."}
    )
    eval_config: list[str] | None = field(
        default=None, metadata={"help": "Configuration of each evaluation data set, like dataset_config."}
    )
    eval_split: list[str] = field(
        default_factory=lambda: ["test"],
        metadata={"help": "Split of each evaluation data set; a local file has no splits and is read whole."},
    )
    eval_max_examples: list[int] = field(
        default_factory=lambda: [300],
        metadata={"help": "Number of examples that are sampled from each evaluation data set at most."},
    )

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Check every value; a single value where a list is meant (as in YAML) becomes a list of one.

        Raises:
            ValueError: A value is out of range or of the wrong type, or the lengths of two lists do not match.
        """
        lists: dict[str, type] = {
            "dataset_name": str,
            "dataset_config": str,
            "dataset_split": str,
            "max_examples": int,
            "dataset_ratio": float,
            "eval_dataset_name": str,
            "eval_config": str,
            "eval_split": str,
            "eval_max_examples": int,
        }
        for flag, kind in lists.items():
            values = getattr(self, flag)
            if values is None and flag in ("dataset_config", "eval_dataset_name", "eval_config"):
                continue
            if isinstance(values, (str, int, float)):
                values = [values]
                setattr(self, flag, values)
            if not isinstance(values, (list, tuple)):
                raise UserError(f"--{flag} is {values!r}: give one or more values")
            for value in values:
                _check_value(flag, value, kind)
            base = "eval_dataset_name" if flag.startswith("eval") else "dataset_name"
            names = getattr(self, base) or []
            if flag != base and names and len(values) not in (1, len(names)):
                raise UserError(
                    f"--{flag} has {len(values)} values, but --{base} has {len(names)}: give one value for all data "
                    "sets, or one per data set"
                )
        for flag, lowest in (("dataset_seed", 0), ("max_length", 2)):
            value = getattr(self, flag)
            if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
                raise UserError(f"--{flag} is {value!r}: give an integer of at least {lowest}")

    def replay_sets(self) -> list[DatasetSpec]:
        """The data sets of the training mixture, with one-valued flags repeated."""
        names = self.dataset_name
        return _specs(names, self.dataset_config, self.dataset_split, self.max_examples, self.dataset_ratio)

    def eval_sets(self) -> list[DatasetSpec]:
        """The data sets of the evaluation loss; empty when there are none."""
        return _specs(self.eval_dataset_name or [], self.eval_config, self.eval_split, self.eval_max_examples, [1.0])


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
        return UserError(
            f"{', '.join(labels)}: every sampled answer is empty, so nothing is left to train on: fill them"
        )
    return UserError(
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


def _check_value(flag: str, value: Any, kind: type) -> None:
    if kind is str:
        good, wanted = isinstance(value, str) and bool(value.strip()), "a name that is not empty"
    elif kind is int:
        good = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        wanted = "an integer of at least 1"
    else:
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 1
        wanted = "a fraction with 0 < ratio <= 1"
    if not good:
        raise UserError(f"--{flag} has the value {value!r}: give {wanted}")


def _specs(
    names: list[str],
    configs: list[str] | None,
    splits: list[str],
    max_examples: list[int],
    ratios: list[float],
) -> list[DatasetSpec]:
    def at(values: Sequence[Any], i: int) -> Any:
        return values[0] if len(values) == 1 else values[i]

    return [
        DatasetSpec(name, at(configs or [None], i), at(splits, i), at(max_examples, i), float(at(ratios, i)))
        for i, name in enumerate(names)
    ]
