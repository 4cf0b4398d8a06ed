"""Data sets with the right answers: their flags, samples and metrics."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heterofusion.data.files import Records
from heterofusion.data.replay import DataArguments, DatasetSpec
from heterofusion.evaluation.metrics import AUTO, METRICS, check_metric, choose_metric, score
from heterofusion.experts.examples import Examples, Prompts, load_examples
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.flags import flag

# No colon, slash or leading dot: these become names of files and folders, and columns of a Markdown table.
_FILE_NAME = re.compile(r"\w[\w.+=-]*")


def is_file_name(name: str) -> bool:
    """Whether a label or a name can be that of a file or a folder everywhere."""
    return _FILE_NAME.fullmatch(name) is not None


def check_file_names(names: Sequence[str], owners: Sequence[str], what: str, flag: str) -> list[str]:
    """Names of files or folders, one for each owner: all different, and none that a file cannot have."""
    if len(names) != len(owners):
        raise UserError(f"--{flag} has {len(names)} values for {len(owners)} of them; give one per {what}")
    for index, (name, owner) in enumerate(zip(names, owners, strict=True)):
        if not is_file_name(name):
            raise UserError(
                f"{name!r}, the name of {what} {owner}, cannot be the name of a file; give --{flag}, one per {what}, "
                "of letters, digits and . _ + = -"
            )
        if name in names[:index]:
            raise UserError(
                f"{what} {owners[names.index(name)]} and {what} {owner} have the same name {name!r}; give --{flag}, "
                f"one per {what}, all different"
            )
    return [*names]


@dataclass
class EvalDataArguments:
    """What it is evaluated on; list flags have one value for all data sets, or one per data set."""

    dataset_name: list[str] = flag(
        default_factory=list,
        help="Data sets with the right answers: .json, .jsonl, .csv or .parquet files, folders, or Hub ids.",
    )
    dataset_config: list[str] | None = flag(None, help="Configuration of each Hub data set or local folder.")
    dataset_split: list[str] = flag(
        default_factory=lambda: ["test"], help="Split of each data set; a local file is read whole."
    )
    dataset_label: list[str] | None = flag(None, help="Name of each data set in results; by default its own.")
    max_examples: list[int] = flag(
        default_factory=lambda: [0], help="Examples that are sampled from each data set at most; 0 takes all."
    )
    dataset_seed: int = flag(42, help="Seed of the sampling.")
    metric: list[str] = flag(
        default_factory=lambda: [AUTO],
        help=f"Metric of each data set: {', '.join(METRICS)}; {AUTO} reads the columns kind and task of its records.",
    )

    def __post_init__(self) -> None:
        if not self.dataset_name:
            raise UserError("--dataset_name is missing: name at least one data set to evaluate on")
        self.specs()
        if len(self.metric) not in (1, len(self.dataset_name)):
            raise UserError(
                f"--metric has {len(self.metric)} values, but --dataset_name has {len(self.dataset_name)}: give one "
                "per data set"
            )
        for metric in self.metric:
            if metric != AUTO:
                check_metric(metric)
        self.labels()

    def specs(self) -> list[DatasetSpec]:
        """The data sets, checked as those of a replay mixture are."""
        return DataArguments(
            dataset_name=self.dataset_name,
            dataset_config=self.dataset_config,
            dataset_split=self.dataset_split,
            max_examples=self.max_examples,
            dataset_seed=self.dataset_seed,
        ).replay_sets()

    def labels(self) -> list[str]:
        """The names of the data sets in results, one per data set."""
        paths = [Path(name).expanduser() for name in self.dataset_name]
        # a Hub id may hold a dot too; what ends like a data file is one
        files = (".json", ".jsonl", ".csv", ".parquet")
        labels = self.dataset_label or [p.stem if p.suffix.lower() in files else p.resolve().name for p in paths]
        return check_file_names(labels, self.dataset_name, "data set", "dataset_label")

    def metrics(self) -> list[str]:
        """The metrics, one per data set."""
        return self.metric * len(self.dataset_name) if len(self.metric) == 1 else self.metric


@dataclass(frozen=True)
class EvalSet(Examples):
    """Examples whose answers are scored."""

    metric: str  # one of `heterofusion.evaluation.metrics.METRICS`

    def identity(self) -> dict[str, Any]:
        """What must be the same for predictions to be of the same examples."""
        return {"sha256": self.sha256, **self.sample}


def load_eval_sets(args: EvalDataArguments) -> list[EvalSet]:
    """Load and sample the data sets, in order, and choose their metrics."""
    sets = []
    for spec, label, wanted in zip(args.specs(), args.labels(), args.metrics(), strict=True):
        examples = load_examples(spec, label, args.dataset_seed)
        metric = choose_metric(wanted, _kinds(examples.records), examples.records.label)
        sets.append(EvalSet(**vars(examples), metric=metric))
    return sets


def check_references(examples: EvalSet, prompts: Prompts) -> None:
    """Refuse references that the metric cannot score, before anything is generated."""
    try:
        score(examples.metric, prompts.references, prompts.references)
    except UserError as error:
        raise UserError(f"{examples.records.label}: {error}") from error


def _kinds(records: Records) -> Iterator[dict[str, Any]]:
    """The columns that tell the metric, of all records: a file of several kinds is refused whatever the sample."""
    if isinstance(records.rows, list):
        yield from records.rows
        return
    names = [name for name in ("kind", "task") if name in records.rows.column_names]
    for row in records.rows.select_columns(names) if names else [{}]:
        yield dict(row)
