"""Replay: answered examples on disk or on the Hub become one mixed, tokenized `datasets.Dataset`.

The same arguments always give the same examples in the same order; loss is on the answers only.
"""

import copy
import hashlib
import logging
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from tqdm import tqdm
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from heterofusion.data.files import Records, load_records, sample_indices
from heterofusion.data.formats import IGNORE_INDEX, KNOWN_COLUMNS, detect_format, render, to_conversation, tokenize
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.files import display_name
from heterofusion.runtime.flags import check_ranges, flag

logger = logging.getLogger(__name__)

Example = tuple[list[int], list[int]]  # input_ids, labels


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

    dataset_name: list[str] = flag(
        default_factory=list, help="Replay data sets: .json, .jsonl, .csv or .parquet files, folders, or Hub ids."
    )
    dataset_config: list[str] | None = flag(
        None, help="Configuration of each Hub data set or folder, 'default' where it has only one."
    )
    dataset_split: list[str] = flag(
        default_factory=lambda: ["train"], help="Split of each replay data set; a file has none and is read whole."
    )
    max_examples: list[int] = flag(
        default_factory=lambda: [300], help="Examples sampled from each replay set; 0 takes all.", range="[0, inf)"
    )
    dataset_ratio: list[float] = flag(
        default_factory=lambda: [1.0], help="Fraction sampled of each, before max_examples caps it.", range="(0, 1]"
    )
    dataset_seed: int = flag(42, help="Seed of the sampling and of the order of the mixture.", range="[0, inf)")
    max_length: int = flag(1024, help="Tokens after which an example is cut off on the right.", range="[2, inf)")
    eval_dataset_name: list[str] | None = flag(None, help="Data sets for the evaluation loss, like dataset_name.")
    eval_config: list[str] | None = flag(None, help="Configuration of each evaluation data set, like dataset_config.")
    eval_split: list[str] = flag(
        default_factory=lambda: ["test"], help="Split of each evaluation data set, like dataset_split."
    )
    eval_max_examples: list[int] = flag(
        default_factory=lambda: [300], help="Examples sampled from each evaluation set; 0 takes all.", range="[0, inf)"
    )

    def __post_init__(self) -> None:
        match_lists(self, "dataset_name", "dataset_config", "dataset_split", "max_examples", "dataset_ratio")
        match_lists(self, "eval_dataset_name", "eval_config", "eval_split", "eval_max_examples")
        check_ranges(self)

    def replay_sets(self) -> list[DatasetSpec]:
        """The data sets of the training mixture, with one-valued flags repeated."""
        flags = (self.dataset_config, self.dataset_split, self.max_examples, self.dataset_ratio)
        return _specs(self.dataset_name, *flags)

    def eval_sets(self) -> list[DatasetSpec]:
        """The data sets of the evaluation loss; empty when there are none."""
        return _specs(self.eval_dataset_name or [], self.eval_config, self.eval_split, self.eval_max_examples, [1.0])


def match_lists(flags: Any, name: str, *others: str) -> None:
    """Check that list flags have one value, or one for each of `name`; a single value becomes a list of one."""
    for each in (name, *others):
        if isinstance(getattr(flags, each), (str, int, float)):  # of YAML or a program
            setattr(flags, each, [getattr(flags, each)])
        if any(value is None or not str(value).strip() for value in getattr(flags, each) or []):
            raise UserError(f"--{each} is {getattr(flags, each)!r}; none of its values may be empty")
    count = len(getattr(flags, name) or [])
    for each in others:
        values = getattr(flags, each)
        if count and values is not None and len(values) not in (1, count):
            raise UserError(
                f"--{each} has {len(values)} values, but --{name} has {count}: give one value for all, or one for each"
            )


def nth(values: Sequence[Any] | None, index: int) -> Any:
    """The value of a list flag for the name with this index; None without the flag."""
    return None if values is None else values[0] if len(values) == 1 else values[index]


def _specs(
    names: list[str], configs: Any, splits: list[str], most: list[int], ratios: list[float]
) -> list[DatasetSpec]:
    return [
        DatasetSpec(name, nth(configs, i), nth(splits, i), nth(most, i) or sys.maxsize, nth(ratios, i))
        for i, name in enumerate(names)
    ]


@dataclass
class DatasetReport:
    """What became of one data set."""

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

    def summary(self) -> list[str]:
        """One line per data set, and one for all where there are several."""
        lines = [f"{r.name} ({r.format}): {describe_counts(asdict(r), self.max_length)}" for r in self.datasets]
        if len(self.datasets) > 1:
            names = [item.name for item in fields(DatasetReport) if item.name not in ("name", "format")]
            counts = {name: sum(getattr(report, name) for report in self.datasets) for name in names}
            lines.append(f"all {len(self.datasets)} data sets: {describe_counts(counts, self.max_length)}")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON types; of a local path its last part, since it is published with the adapter."""
        record = asdict(self)
        for entry in record["datasets"]:
            entry["name"] = display_name(entry["name"])
        return record


def describe_counts(count: Mapping[str, Any], max_length: int) -> str:
    """The counts of a `DatasetReport` in words."""
    return (
        f"{count['read']} read, {count['sampled']} sampled, {count['cut']} cut to {max_length} tokens "
        f"({count['cut_tokens']} tokens removed), {count['dropped']} dropped without label tokens "
        f"({count['dropped_empty']} with an empty answer), {count['kept']} kept, {count['tokens']} tokens, "
        f"{count['label_tokens']} of them labels"
    )


def build_replay(
    args: DataArguments, tokenizer: PreTrainedTokenizerBase, kind: str = "replay"
) -> tuple[Dataset, ReplayReport]:
    """Load, sample, tokenize, cut to `max_length` and mix the replay data sets (`kind` is their name in messages)."""
    if not args.dataset_name:
        raise UserError(f"--dataset_name is missing: name at least one {kind} data set")
    examples, report = _build(args.replay_sets(), args, tokenizer, kind)
    # A generator of its own: the order must not depend on how many draws the sampling took.
    order = np.random.default_rng([args.dataset_seed, 1]).permutation(len(examples))
    return as_dataset([examples[i] for i in order]), report


def build_eval(args: DataArguments, tokenizer: PreTrainedTokenizerBase) -> tuple[Dataset, ReplayReport]:
    """Like `build_replay`, of the evaluation data sets, in the order of the files."""
    if not args.eval_dataset_name:
        raise UserError("--eval_dataset_name is missing: name at least one evaluation data set")
    examples, report = _build(args.eval_sets(), args, tokenizer, kind="eval")
    return as_dataset(examples), report


def _build(
    specs: list[DatasetSpec], args: DataArguments, tokenizer: PreTrainedTokenizerBase, kind: str
) -> tuple[list[Example], ReplayReport]:
    report = ReplayReport(args.max_length)
    examples: list[Example] = []
    needed: list[int] = []
    for spec in specs:
        records = load_records(spec.name, spec.config, spec.split, kind)
        found = DatasetReport(spec.name, checked_format(records), read=len(records.rows))
        count = min(spec.max_examples, max(1, round(found.read * spec.ratio)))
        indices = sample_indices(found.read, count, args.dataset_seed)
        kept, _, missing = encode_records(records, indices, found, args.max_length, tokenizer)
        examples += kept
        needed += missing
        report.datasets.append(found)
        if not kept and len(specs) > 1:
            logger.warning("%s gives no example within --max_length %d", records.label, args.max_length)
    if not examples:
        raise no_examples([spec.name for spec in specs], needed, args.max_length)
    if tokenizer.eos_token_id is None:
        logger.warning("the tokenizer has no EOS token: the model does not learn to stop after plain texts")
    return examples, report


def checked_format(records: Records) -> str:
    """The format of a data set, whose rows are all checked if they were parsed by us, whether or not sampled."""
    format = detect_format(records.columns)
    if format is None:
        found = ", ".join(records.columns) or "none"
        raise UserError(f"{records.label} has no known columns (found: {found}): give it {KNOWN_COLUMNS}")
    for i, row in enumerate(records.rows if isinstance(records.rows, list) else []):
        records.call(i, to_conversation, row, format)
    return format


def encode_records(
    records: Records,
    indices: Iterable[int],
    report: DatasetReport,
    max_length: int,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[list[Example], list[int], list[int]]:
    """Tokenize some rows of a data set, and count in the report what becomes of them.

    Gives the examples with a label token left, their indices, and the `max_length` that each of the others (but those
    with an empty answer) would have needed.
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
            report.dropped_empty += first is None
            needed += [] if first is None else [first + 1]
            continue
        examples.append((ids[:max_length], labels[:max_length]))
        kept.append(i)
        report.kept += 1
        report.tokens += len(examples[-1][0])
        report.label_tokens += sum(label != IGNORE_INDEX for label in examples[-1][1])
    return examples, kept, needed


def no_examples(labels: Sequence[str], needed: Sequence[int], max_length: int) -> UserError:
    """The error of data sets that leave nothing to train on; `needed` as of `encode_records`."""
    names = ", ".join(labels)
    if not needed:
        return UserError(f"{names}: every sampled answer is empty, so nothing is left to train on: fill them")
    text = f"all examples are too long for --max_length {max_length}, no label token is left"
    return UserError(f"{names}: {text}: raise it to {min(needed)} at least, which the shortest needs")


def as_dataset(examples: list[Example]) -> Dataset:
    """Examples as the data set that a trainer reads: `input_ids`, `attention_mask` and `labels`."""
    columns = {"input_ids": [ids for ids, _ in examples], "attention_mask": [[1] * len(ids) for ids, _ in examples]}
    return Dataset.from_dict({**columns, "labels": [labels for _, labels in examples]})


def examples_sha256(examples: Dataset) -> str:
    """Hash of token ids and labels of examples, in their order."""
    digest = hashlib.sha256()
    for ids, labels in zip(examples["input_ids"], examples["labels"], strict=True):
        for values in (ids, labels):
            digest.update(np.asarray([len(values), *values], dtype=np.int64).tobytes())
    return digest.hexdigest()


def make_collator(tokenizer: PreTrainedTokenizerBase, pad_to_multiple_of: int | None = None) -> DataCollatorForSeq2Seq:
    """Collator that pads on the right, labels with -100; the tokenizer stays as it was.

    Padding is the padding token, or else EOS, which the attention mask makes harmless.
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
