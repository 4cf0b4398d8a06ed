"""Data sets with the right answers: their flags, samples and metrics."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset

from heterofusion.data.files import SUFFIXES
from heterofusion.data.replay import DataArguments, DatasetSpec, match_lists, nth
from heterofusion.evaluation.metrics import AUTO, METRICS, choose_metric, score
from heterofusion.experts.examples import Examples, Prompts, load_examples
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.flags import check_ranges, flag


def is_file_name(name: str) -> bool:
    """Whether a label or a name can be that of a file or a folder everywhere."""
    return re.fullmatch(r"\w[\w.+=-]*", name) is not None  # no colon, slash, bar or leading dot


def check_file_names(names: Sequence[str], owners: Sequence[str], what: str, flag: str) -> list[str]:
    """Names of files or folders, one for each owner: all different, and none that a file cannot have."""
    if len(names) != len(owners):
        raise UserError(f"--{flag} has {len(names)} values for {len(owners)} of them; give one per {what}")
    for index, (name, owner) in enumerate(zip(names, owners, strict=True)):
        if not is_file_name(name):
            told = f"{name!r}, the name of {what} {owner}, cannot be the name of a file"
            raise UserError(f"{told}; give --{flag}, one per {what}, of letters, digits and . _ + = -")
        if name in names[:index]:
            told = f"{what} {owners[names.index(name)]} and {what} {owner} have the same name {name!r}"
            raise UserError(f"{told}; give --{flag}, one per {what}, all different")
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
        help=f"Metric of each data set; {AUTO} reads the columns kind and task of its records.",
        choices=[AUTO, *METRICS],
    )

    def __post_init__(self) -> None:
        if not self.dataset_name:
            raise UserError("--dataset_name is missing: name at least one data set to evaluate on")
        match_lists(self, "dataset_name", "metric")
        check_ranges(self)
        self.specs()
        self.labels()

    def specs(self) -> list[DatasetSpec]:
        """The data sets, checked as those of a replay mixture are."""
        names = ("dataset_name", "dataset_config", "dataset_split", "max_examples", "dataset_seed")
        return DataArguments(**{name: getattr(self, name) for name in names}).replay_sets()

    def labels(self) -> list[str]:
        """The names of the data sets in results, one per data set."""
        paths = [Path(name).expanduser() for name in self.dataset_name]
        # a Hub id may hold a dot too; what ends like a data file is one
        own = [path.stem if path.suffix.lower() in SUFFIXES else path.resolve().name for path in paths]
        return check_file_names(self.dataset_label or own, self.dataset_name, "data set", "dataset_label")

    def metrics(self) -> list[str]:
        """The metrics, one per data set."""
        return [nth(self.metric, index) for index in range(len(self.dataset_name))]


@dataclass(frozen=True)
class EvalSet(Examples):
    """Examples whose answers are scored."""

    metric: str  # one of `heterofusion.evaluation.metrics.METRICS`


def load_eval_sets(args: EvalDataArguments) -> list[EvalSet]:
    """Load and sample the data sets, in order, and choose their metrics by all of their records."""
    sets = []
    for spec, label, wanted in zip(args.specs(), args.labels(), args.metrics(), strict=True):
        examples = load_examples(spec, label, args.dataset_seed)
        rows = examples.records.rows
        if isinstance(rows, Dataset):
            names = [name for name in rows.column_names if name in ("kind", "task")]
            rows = rows.select_columns(names or rows.column_names[:1]).to_list()
        sets.append(EvalSet(**vars(examples), metric=choose_metric(wanted, rows, examples.records.label)))
    return sets


def check_references(examples: EvalSet, prompts: Prompts) -> None:
    """Refuse references that the metric cannot score, before anything is generated."""
    try:
        score(examples.metric, prompts.references, prompts.references)
    except UserError as error:
        raise UserError(f"{examples.records.label}: {error}") from error
