"""Source labels: answers of the source experts to unlabelled prompts, as examples for the target.

A file of `recipes/label.py` has, beside the replay's columns, `task`, `kind`, `source`, `log_probability` (mean per
token of the answer), `format_ok`, and `control` if it is one; each of them may be missing.
"""

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainingArguments

from heterofusion.data.files import Records, load_records, sample_indices
from heterofusion.data.replay import (
    DataArguments,
    DatasetReport,
    Example,
    as_dataset,
    checked_format,
    describe_counts,
    encode_records,
    examples_sha256,
    match_lists,
    no_examples,
    nth,
)
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.files import display_name, file_sha256, read_json_object
from heterofusion.runtime.flags import as_text, check_ranges, flag, in_range

logger = logging.getLogger(__name__)

# Columns of an example with s label tokens that have a soft label. Those of others are empty or missing.
SOFT_POSITIONS = "soft_positions"  # (s,): where these tokens stand in the example
SOFT_IDS = "soft_ids"  # (s, k): token ids
SOFT_PROBS = "soft_probs"  # (s, k): their probabilities, which add up to 1; a token of probability 0 fills a place
SOFT_COLUMNS = (SOFT_POSITIONS, SOFT_IDS, SOFT_PROBS)

LABELS_FILE = "labels.json"  # beside the files of labels that recipes/label.py wrote
ANCHOR = "anchor"  # its name among those of the sources, of which none may have it
CONTROL_COLUMN = "control"  # of a label: which control it is; labels that are none have no such column
LABEL_CONTROLS = ("bases", "shuffle", "anchor")
FINEST_SHARE = 1000  # largest denominator of a share of replay: an epoch of a finer one would be very long


@dataclass
class SourceLabelArguments:
    """Answers of the source experts to unlabelled prompts, which join the replay."""

    source_labels: list[str] = flag(
        default_factory=list,
        help="Files of prompts that the source experts answered, in any format of the replay, or folders that "
        "recipes/label.py wrote; they join the replay, which may then be empty.",
    )
    source_labels_max_examples: list[int] | None = flag(
        None, help="Number of labels sampled from each file at most; all by default.", range="[1, inf)"
    )
    min_log_probability: float | None = flag(
        None,
        help="Drop labels that their source was less sure of: mean log-probability of the answer's tokens "
        "(-0.1 is a probability of 0.9 per token).",
        range="(-inf, 0]",
    )
    keep_malformed: bool = flag(False, help="Keep labels that are not in the output format of their task.")
    replay_fraction: float | None = flag(
        None,
        help="Share of replay among the examples of every run of neighbours, the rest are source labels. By "
        "default all examples, replay and labels, come equally often.",
    )
    label_loss: str = flag(
        "hard",
        help="Train on the labels' answers alone, or (soft) also on what their source thought of other tokens "
        "(recipes/label.py --top_k_logits stores it).",
        choices=["hard", "soft"],
    )
    soft_weight: float = flag(
        0.5,
        help="With --label_loss soft, the weight of KL(source || model) at tokens that both see alike; "
        "cross-entropy has the rest there, and all of it elsewhere.",
        range="[0, 1]",
    )
    logits_cache: str | None = flag(
        None, help="With --label_loss soft, folder of soft labels in the target's tokens, in HF_HOME if None."
    )

    def __post_init__(self) -> None:
        match_lists(self, "source_labels", "source_labels_max_examples")
        check_ranges(self)
        for item in fields(self)[1:]:
            value = getattr(self, item.name)
            if value == item.default:
                continue
            if not self.source_labels:
                raise UserError(f"--{item.name} is {value}, but --source_labels is not given: name the files")
            if item.name in ("soft_weight", "logits_cache") and self.label_loss == "hard":
                raise UserError(f"--{item.name} is {value}, but --label_loss is hard: add --label_loss soft")


def check_label_flags(labels: SourceLabelArguments, data: DataArguments, args: TrainingArguments) -> None:
    """Refuse what does not go with source labels, before any file is read."""
    if not labels.source_labels:
        return
    check_settings(args, soft=labels.label_loss == "soft")
    share, replay = labels.replay_fraction, bool(data.dataset_name)
    if share is not None and (check_fraction(share) > 0) != replay:
        with_replay = "the replay of --dataset_name would never be seen: leave one of the two out"
        without = "there is no replay: name it with --dataset_name, or leave --replay_fraction out"
        raise UserError(f"--replay_fraction is {share}, but {with_replay if replay else without}")


def check_settings(args: TrainingArguments, soft: bool) -> None:
    """Refuse settings of training that would break the shares of a mixture, or the loss of its parts."""
    refused = {
        "train_sampling_strategy": args.train_sampling_strategy != "random" and "--source_labels has its own order",
        "use_liger_kernel": args.use_liger_kernel and "--source_labels needs the logits, which its loss does not keep",
        "label_smoothing_factor": soft and args.label_smoothing_factor and "with --label_loss soft the sources smooth",
    }
    for name, reason in refused.items():
        if reason:
            raise UserError(f"--{name} is {as_text(getattr(args, name))}, but {reason}: leave one of the two out")


def check_fraction(fraction: float) -> Fraction:
    """The share of replay, in [0, 1), as the nearest ratio with a denominator of at most `FINEST_SHARE`."""
    share = Fraction(fraction).limit_denominator(FINEST_SHARE) if math.isfinite(fraction) else Fraction(-1)
    if not (fraction == 0 or (0 < fraction < 1 and 0 < share < 1)):
        finest = f"0, or from {1 / FINEST_SHARE} to {1 - 1 / FINEST_SHARE}"
        raise UserError(f"--replay_fraction is {fraction}: give a share of at least 0 and below 1 ({finest})")
    return share


# ---- the labels --------------------------------------------------------------------------------------------------


@dataclass
class LabelReport(DatasetReport):
    """What became of one file: the counts of a `DatasetReport` are of the labels that were good enough."""

    sha256: str = ""  # of the file
    malformed: int = 0  # labels dropped because they are not in their task's output format
    unsure: int = 0  # labels dropped because their source was not sure enough of them
    by_source: dict[str, dict[str, int]] = field(default_factory=dict)  # kept labels by source and task
    control: str | None = None  # which control they are labels of


@dataclass(frozen=True)
class Origin:
    """Where a label comes from."""

    path: Path
    line: int  # index of its row there
    where: str  # its name in messages
    record: Mapping[str, Any]  # the row


@dataclass(frozen=True)
class SourceLabels:
    """Source labels as examples for the target, like those of `build_replay`, each with its origin."""

    examples: Dataset
    reports: list[LabelReport]
    origins: list[Origin]


def build_labels(args: SourceLabelArguments, data: DataArguments, tokenizer: PreTrainedTokenizerBase) -> SourceLabels:
    """Load, filter, sample (by `dataset_seed`), tokenize and mix the files of source labels."""
    examples: list[Example] = []
    reports: list[LabelReport] = []
    origins: list[Origin] = []
    needed: list[int] = []
    files = _label_files(args.source_labels)
    for index, path in files:
        records = load_records(str(path), kind="source label")
        report = LabelReport(str(path), checked_format(records), read=len(records.rows), sha256=file_sha256(path))
        good = _good_labels(records, args, report)
        limit = nth(args.source_labels_max_examples, index)
        if limit is not None:
            good = [good[i] for i in sample_indices(len(good), limit, data.dataset_seed)]
        found, kept, missing = encode_records(records, good, report, data.max_length, tokenizer)
        _count_sources(records, kept, report)
        if not good and len(files) > 1:
            logger.warning("%s gives no label: %s", records.label, _dropped([report], args))
        examples += found
        origins += [Origin(path, i, records.where(i), records.rows[i]) for i in kept]
        needed += missing
        reports.append(report)
    names = [report.name for report in reports]
    if not any(report.sampled for report in reports):
        dropped = f"of {sum(report.read for report in reports)} {_dropped(reports, args)}"
        raise UserError(f"{', '.join(names)}: no source label is left, {dropped}: lower what is asked of them")
    if not examples:
        raise no_examples(names, needed, data.max_length)
    order = np.random.default_rng([data.dataset_seed, 2]).permutation(len(examples))  # replay has 1
    return SourceLabels(as_dataset([examples[i] for i in order]), reports, [origins[i] for i in order])


def _label_files(names: Sequence[str]) -> list[tuple[int, Path]]:
    """The files that `--source_labels` names, each with the index of its name: a folder's are those with labels."""
    files: list[tuple[int, Path]] = []
    for index, name in enumerate(names):
        path = Path(name).expanduser().absolute()
        if not path.exists():
            raise UserError(f"--source_labels {path} does not exist: check the path")
        if not path.is_dir():
            files.append((index, path))
            continue
        if not (path / LABELS_FILE).is_file():
            left = f"{LABELS_FILE}, which a finished recipes/label.py leaves"
            raise UserError(f"--source_labels {path} is a folder without {left}: name the files in it")
        tasks = read_json_object(path / LABELS_FILE).get("tasks") or {}
        made = [(index, path / f"{task}.jsonl") for task, entry in tasks.items() if entry.get("labels")]
        if not made:
            raise UserError(f"--source_labels {path}: its {LABELS_FILE} tells of no labels; label more prompts")
        files += made
    return files


def _good_labels(records: Records, args: SourceLabelArguments, report: LabelReport) -> list[int]:
    """Indices of the labels that are good enough; the others are counted in the report."""
    faults = [records.call(i, _fault, row, args) for i, row in enumerate(records.rows)]
    report.malformed, report.unsure = faults.count("malformed"), faults.count("unsure")
    return [index for index, fault in enumerate(faults) if fault is None]


def _fault(label: Mapping[str, Any], args: SourceLabelArguments) -> str | None:
    """All filters of labels: why one is dropped (`malformed`, `unsure`), or None where it is good enough."""
    well_formed, confidence, lowest = label.get("format_ok"), label.get("log_probability"), args.min_log_probability
    if not isinstance(well_formed, bool | None):
        raise UserError(f"`format_ok` is {well_formed!r}: make it true, false or null")
    if confidence is not None and not in_range(confidence, "(-inf, inf)"):
        raise UserError(f"`log_probability` is {confidence!r}: make it a finite number or null")
    if confidence is None and lowest is not None:
        raise UserError(f"--min_log_probability is {lowest}, but the label has no `log_probability`: leave it out")
    if well_formed is False and not args.keep_malformed:
        return "malformed"
    return "unsure" if lowest is not None and (confidence or 0.0) < lowest else None


def _count_sources(records: Records, kept: list[int], report: LabelReport) -> None:
    """Who answered the kept labels of which task, and whether they are a control's."""
    counts: dict[str, Counter[str]] = {}
    for index in kept:
        label = records.rows[index]
        names = [label.get(name) for name in ("source", "task")]
        source, task = (display_name(str(name)) if name else "not named" for name in names)
        counts.setdefault(source, Counter())[task] += 1
    report.by_source = {source: dict(sorted(tasks.items())) for source, tasks in sorted(counts.items())}
    controls = {label[CONTROL_COLUMN] for label in records.rows if label.get(CONTROL_COLUMN)}
    report.control = "+".join(sorted(controls)) or None


def _dropped(reports: Sequence[LabelReport], args: SourceLabelArguments) -> str:
    malformed, unsure = sum(report.malformed for report in reports), sum(report.unsure for report in reports)
    return (
        f"{malformed} are malformed (--keep_malformed true keeps them) and {unsure} below --min_log_probability "
        f"{args.min_log_probability}"
    )


def labels_summary(reports: Sequence[LabelReport], max_length: int) -> list[str]:
    """What became of the files, in lines for the log."""
    lines = []
    for report in reports:
        sources = [
            f"{source}: {', '.join(f'{count} {task}' for task, count in tasks.items())}"
            for source, tasks in report.by_source.items()
        ]
        lines += [
            f"{report.name} ({report.format}): {report.malformed} malformed and {report.unsure} not sure enough "
            f"dropped; {describe_counts(asdict(report), max_length)}",
            f"  kept by source and task: {'; '.join(sources) or 'none'}",
            *([] if report.control is None else [f"  CONTROL ({report.control}): not of the sources that know"]),
        ]
    return lines


def labels_record(
    labels: SourceLabels, args: SourceLabelArguments, fraction: float, soft: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What records hold of the source labels, as plain JSON types; of a file its name alone.

    Settings come first, then files, then what came of them: a run that resumes names the first that differs.
    """
    return {
        "replay_fraction": fraction,
        **({"loss": "hard"} if soft is None else {"loss": "soft", "soft": dict(soft)}),
        "min_log_probability": args.min_log_probability,
        "keep_malformed": args.keep_malformed,
        "files": [_file_record(asdict(report)) for report in labels.reports],
        "kept": sum(report.kept for report in labels.reports),
        "sha256": examples_sha256(labels.examples),
    }


def _file_record(found: dict[str, Any]) -> dict[str, Any]:
    name, control = display_name(found.pop("name")), found.pop("control")
    return {"name": name, **({"control": control} if control else {}), "sha256": found.pop("sha256"), **found}


def is_labelled_by_sources(record: Mapping[str, Any] | None) -> bool:
    """Whether a training record of source labels holds any that are not the anchor's own answers."""
    return record is not None and any(source != ANCHOR for file in record["files"] for source in file["by_source"])
