"""Flags of the evaluation program."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from heterofusion.data.replay import DataArguments, DatasetSpec
from heterofusion.evaluation.metrics import AUTO, METRICS, check_metric
from heterofusion.experts.expert import NO_ADAPTER, BaseArguments
from heterofusion.experts.generation import GenerationArguments
from heterofusion.runtime.errors import UserError

BASE_NAME = "base"
# No colon, slash or leading dot: these become names of files and folders, and columns of a Markdown table.
_FILE_NAME = re.compile(r"\w[\w.+=-]*")


def is_file_name(name: str) -> bool:
    """Whether a label or a name can be that of a file or a folder everywhere."""
    return _FILE_NAME.fullmatch(name) is not None


@dataclass
class EvalModelArguments(BaseArguments):
    """What is evaluated: a base model and adapters on it."""

    model_name_or_path: str = field(metadata={"help": "Base model of the adapters: local folder or Hub id."})
    adapters: list[str] = field(
        default_factory=lambda: [NO_ADAPTER],
        metadata={
            "help": "PEFT adapters to evaluate one after the other: local folders or Hub ids; the word none is the "
            "base model alone, which is also the default."
        },
    )
    adapter_revision: list[str] | None = field(
        default=None, metadata={"help": "Hub revision of the adapters: one for all, or one per adapter."}
    )
    merge_adapters: bool = field(
        default=False,
        metadata={
            "help": "Merge each adapter into the base before it answers, which is two to four times faster on a GPU; "
            "in bfloat16 the weights are rounded once more, so answers may differ."
        },
    )
    adapter_per_dataset: bool = field(
        default=False,
        metadata={
            "help": "Give each data set an adapter of its own: the first of --adapters answers the first of "
            "--dataset_name alone, and so on, in one row of results that needs to know the task."
        },
    )

    def __post_init__(self) -> None:
        if not self.adapters or not all(self.adapters):
            raise UserError(f"--adapters has an empty name; write {NO_ADAPTER} for the base model alone")
        if self.merge_adapters and (self.load_in_4bit or self.load_in_8bit):
            raise UserError("--merge_adapters would round an adapter to the bits of a quantized base: leave it out")
        if self.adapter_revision is not None and len(self.adapter_revision) not in (1, len(self.adapters)):
            raise UserError(
                f"--adapter_revision has {len(self.adapter_revision)} values, but --adapters has "
                f"{len(self.adapters)}: give one for all, or one per adapter"
            )

    def revisions(self) -> list[str | None]:
        """The Hub revisions of the adapters, one each."""
        if self.adapter_revision is None or len(self.adapter_revision) == 1:
            return [self.adapter_revision[0] if self.adapter_revision else None] * len(self.adapters)
        return [*self.adapter_revision]


@dataclass
class EvalDataArguments:
    """What it is evaluated on; list flags have one value for all data sets, or one per data set."""

    dataset_name: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Data sets with the right answers: local .json, .jsonl, .csv or .parquet files, local folders, or "
            "ids on the Hub."
        },
    )
    dataset_config: list[str] | None = field(
        default=None,
        metadata={"help": "Configuration of each Hub data set or local folder ('default' where there is only one)."},
    )
    dataset_split: list[str] = field(
        default_factory=lambda: ["test"],
        metadata={"help": "Split of each data set; a local file has no splits and is read whole."},
    )
    dataset_label: list[str] | None = field(
        default=None,
        metadata={"help": "Name of each data set in results; by default its file's, or the last part of its Hub id."},
    )
    max_examples: list[int] = field(
        default_factory=lambda: [0],
        metadata={"help": "Number of examples that are sampled from each data set at most; 0 takes all."},
    )
    dataset_seed: int = field(default=42, metadata={"help": "Seed of the sampling."})
    metric: list[str] = field(
        default_factory=lambda: [AUTO],
        metadata={
            "help": f"Metric of each data set: {', '.join(METRICS)}; {AUTO} reads the columns kind and task of its "
            "records."
        },
    )

    def __post_init__(self) -> None:
        if not self.dataset_name:
            raise UserError("--dataset_name is missing: name at least one data set to evaluate on")
        self.specs()
        for flag, values in (("dataset_label", self.dataset_label or []), ("metric", self.metric)):
            allowed = (len(self.dataset_name),) if flag == "dataset_label" else (1, len(self.dataset_name))
            if values and len(values) not in allowed:
                raise UserError(
                    f"--{flag} has {len(values)} values, but --dataset_name has {len(self.dataset_name)}: give one "
                    "per data set"
                )
        for metric in self.metric:
            if metric != AUTO:
                check_metric(metric)
        self.labels()

    def specs(self) -> list[DatasetSpec]:
        """The data sets, checked as those of a replay mixture are.

        Raises:
            ValueError: a value is out of range, or the lengths of two lists do not match.
        """
        return DataArguments(
            dataset_name=self.dataset_name,
            dataset_config=self.dataset_config,
            dataset_split=self.dataset_split,
            max_examples=[sys.maxsize if count == 0 else count for count in self.max_examples],
            dataset_seed=self.dataset_seed,
        ).replay_sets()

    def labels(self) -> list[str]:
        """The names of the data sets in results, one per data set.

        Raises:
            ValueError: two are the same, or one cannot be the name of a file.
        """
        labels = self.dataset_label or [_default_label(name) for name in self.dataset_name]
        for index, label in enumerate(labels):
            if not is_file_name(label):
                raise UserError(
                    f"the label {label!r} of data set {self.dataset_name[index]} cannot be the name of a file; give "
                    "--dataset_label, one per data set, of letters, digits and . _ + = -"
                )
            if label in labels[:index]:
                raise UserError(
                    f"data sets {self.dataset_name[labels.index(label)]} and {self.dataset_name[index]} have the same "
                    f"label {label!r}; give --dataset_label, one per data set, all different"
                )
        return labels

    def metrics(self) -> list[str]:
        """The metrics, one per data set."""
        return self.metric * len(self.dataset_name) if len(self.metric) == 1 else self.metric


def _default_label(name: str) -> str:
    path = Path(name).expanduser()
    # A Hub id may hold a dot too; what ends like a data file is one.
    return path.stem if path.suffix.lower() in (".json", ".jsonl", ".csv", ".parquet") else path.resolve().name


@dataclass
class EvalOutputArguments:
    """Where results go, and how reports call them."""

    output_dir: str = field(metadata={"help": "Folder for results.json and the predictions."})
    resume: bool = field(
        default=False, metadata={"help": "Go on with the evaluation of the same settings that output_dir holds."}
    )
    overwrite: bool = field(
        default=False,
        metadata={"help": "Write into an output_dir that is not empty; what an earlier evaluation wrote there goes."},
    )
    name: str | None = field(
        default=None,
        metadata={"help": "Name of the row in reports, for one adapter; by default the adapter's, or base."},
    )
    names: list[str] | None = field(
        default=None,
        metadata={"help": "One name per adapter, for its folder and its row in reports; by default its own."},
    )
    labels: list[str] = field(
        default_factory=list,
        metadata={"help": "Labels key=value by which reports group results, such as experiment=noise seed=0."},
    )

    def __post_init__(self) -> None:
        if self.resume and self.overwrite:
            raise UserError("--resume and --overwrite exclude each other; choose one")
        self.label_values()

    def label_values(self) -> dict[str, str]:
        """The labels as a dictionary.

        Raises:
            ValueError: one is not `key=value`, or a key comes twice.
        """
        values: dict[str, str] = {}
        for label in self.labels:
            key, sign, value = label.partition("=")
            if not (key.strip() and sign):
                raise UserError(f"--labels has {label!r}; write key=value, such as seed=0")
            if key in values:
                raise UserError(f"--labels has the key {key!r} twice; give it once")
            values[key] = value
        return values

    def adapter_names(self, adapters: list[str]) -> list[str]:
        """Names of the adapters, one each, for folders and rows.

        Raises:
            ValueError: as many names as adapters were expected, two are the same, or one cannot name a folder.
        """
        if self.name is not None and len(adapters) > 1:
            raise UserError(f"--name is for one adapter, but --adapters has {len(adapters)}; give --names, one each")
        if self.names is not None and len(self.names) != len(adapters):
            raise UserError(f"--names has {len(self.names)} values, but --adapters has {len(adapters)}: give one each")
        names = self.names or [BASE_NAME if a == NO_ADAPTER else Path(a).expanduser().resolve().name for a in adapters]
        for index, name in enumerate(names):
            if not is_file_name(name):
                raise UserError(
                    f"{name!r} cannot name the folder of adapter {adapters[index]}; give --names, one per adapter, of "
                    "letters, digits and . _ + = -"
                )
            if name in names[:index]:
                raise UserError(
                    f"adapters {adapters[names.index(name)]} and {adapters[index]} have the same name {name!r}; give "
                    "--names, one per adapter, all different"
                )
        return names if self.name is None else [self.name]

    def row_name(self, default: str, reason: str) -> str:
        """The name of a row that is of several adapters.

        Args:
            default: what it is called without `--name`.
            reason: the flag that puts them into one row, for messages.

        Raises:
            ValueError: names of single adapters were given.
        """
        if self.names is not None:
            raise UserError(f"--names names adapters, but {reason} puts all of them into one row; give --name instead")
        return self.name or default


ENSEMBLES = ("gac", "unite")
TOP_K = 10


@dataclass
class EnsembleArguments:
    """Models that answer together."""

    ensemble: str | None = field(
        default=None,
        metadata={
            "help": "Let all of --adapters answer together, token by token, in one row of results: gac takes the mean "
            "of their next-token distributions, unite the mean over the union of their top tokens.",
            "choices": [*ENSEMBLES],
        },
    )
    ensemble_models: list[str] | None = field(
        default=None,
        metadata={
            "help": "Base model of each of --adapters in an ensemble: local folders or Hub ids, --model_name_or_path "
            "among them; by default it is the base of all."
        },
    )
    unite_top_k: int = field(
        default=TOP_K, metadata={"help": "Number of top tokens of each model that --ensemble unite takes."}
    )

    def __post_init__(self) -> None:
        if self.ensemble is None and self.ensemble_models is not None:
            raise UserError("--ensemble_models is for ensembles; give --ensemble gac or unite, or leave it out")
        if self.unite_top_k < 1:
            raise UserError(f"--unite_top_k is {self.unite_top_k}: give an integer of at least 1, such as {TOP_K}")
        if self.ensemble != "unite" and self.unite_top_k != TOP_K:
            raise UserError(f"--unite_top_k {self.unite_top_k} is for --ensemble unite alone; leave it out")

    def bases(self, model: EvalModelArguments) -> list[str]:
        """The base models of the members, one each.

        Args:
            model: has the adapters, one for each member.

        Raises:
            ValueError: there is but one member, lists differ in length, or a flag of the base fits none of several.
        """
        count = len(model.adapters)
        if count < 2:
            raise UserError(
                f"--ensemble {self.ensemble} needs two members at least, but --adapters has {count}; name an adapter "
                f"for each, or {NO_ADAPTER}"
            )
        if self.ensemble_models is None:
            return [model.model_name_or_path] * count
        if len(self.ensemble_models) != count:
            raise UserError(
                f"--ensemble_models has {len(self.ensemble_models)} values, but --adapters has {count}: give one "
                f"base per adapter, and {NO_ADAPTER} as the adapter of a base alone"
            )
        if model.model_name_or_path not in self.ensemble_models:
            raise UserError(
                f"--model_name_or_path {model.model_name_or_path} is not among --ensemble_models "
                f"({', '.join(self.ensemble_models)}); give one of them"
            )
        if model.model_revision is not None:
            raise UserError(
                f"--model_revision {model.model_revision} cannot be of all --ensemble_models; download the revision "
                "and name its folder"
            )
        return [*self.ensemble_models]


EVAL_ARGUMENTS = (EvalModelArguments, EvalDataArguments, GenerationArguments, EvalOutputArguments, EnsembleArguments)


class EvalArguments(NamedTuple):
    """All flags of an evaluation, in the order of `EVAL_ARGUMENTS`."""

    model: EvalModelArguments
    data: EvalDataArguments
    generation: GenerationArguments
    output: EvalOutputArguments
    ensemble: EnsembleArguments
