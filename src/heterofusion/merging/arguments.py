"""Flags of the merging program: the methods, which hyper-parameters each has, and their published defaults."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from heterofusion.evaluation.arguments import EvalDataArguments, EvalModelArguments, GenerationArguments
from heterofusion.runtime.errors import UserError

# The hyper-parameters of every method with their defaults, those of its authors where they have one.
METHODS: dict[str, dict[str, float]] = {
    "average": {},
    "task_arithmetic": {"merge_lambda": 0.3},
    "ties": {"merge_lambda": 1.0, "density": 0.2},
    "dare": {"merge_lambda": 0.3, "drop_rate": 0.5},
    "dare_ties": {"merge_lambda": 1.0, "drop_rate": 0.5, "density": 0.2},
    "della": {"merge_lambda": 1.1, "drop_rate": 0.3, "epsilon": 0.07},
    "breadcrumbs": {"merge_lambda": 0.4, "density": 0.2, "gamma": 0.1},
    "emr": {},
    "knots_ties": {"merge_lambda": 1.0, "density": 0.2},
    "knots_dare": {"merge_lambda": 0.3, "drop_rate": 0.5},
}
RANDOM_METHODS = ("dare", "dare_ties", "della", "knots_dare")
HYPERPARAMETERS = ("merge_lambda", "density", "drop_rate", "epsilon", "gamma")
PER_TASK = "emr"  # the one method that gives an adapter per expert


class MergeError(UserError):
    """Experts or settings that cannot be merged: names the flag or file, what was found and what to do."""


@dataclass(frozen=True)
class MergeSettings:
    """A method with all that its arithmetic needs.

    Attributes:
        method: a key of `METHODS`.
        hyperparameters: value by name, exactly those of the method.
        weights: factor of each expert's update, in the experts' order.
        seed: of what is dropped at random; None where nothing is.
    """

    method: str
    hyperparameters: dict[str, float]
    weights: tuple[float, ...]
    seed: int | None = None

    @property
    def merge_lambda(self) -> float:
        """Factor of the whole merged update; 1 for methods without one."""
        return self.hyperparameters.get("merge_lambda", 1.0)

    def without_lambda(self) -> MergeSettings:
        """The same with a factor of 1: all merged updates are linear in it, so that it can be applied in the end."""
        if "merge_lambda" not in self.hyperparameters:
            return self
        return replace(self, hyperparameters={**self.hyperparameters, "merge_lambda": 1.0})

    def changed(self, values: Mapping[str, float]) -> MergeSettings:
        """The same with other values of hyper-parameters, checked.

        Raises:
            MergeError: a value is out of range.
        """
        settings = replace(self, hyperparameters={**self.hyperparameters, **values})
        check_hyperparameters(settings.method, settings.hyperparameters)
        return settings


def check_hyperparameters(method: str, values: Mapping[str, float]) -> None:
    """Refuse values with which a method has no meaning.

    Raises:
        MergeError: names the flag, its value and its range.
    """
    for name, value in values.items():
        if name == "merge_lambda":
            good, wanted = math.isfinite(value) and value != 0, "a number other than 0"
        elif name == "density":
            good, wanted = 0 < value <= 1, "a share above 0 and up to 1"
        else:  # drop_rate, epsilon, gamma
            good, wanted = 0 <= value < 1, "a share of at least 0 and below 1"
        if not good:
            raise MergeError(f"--{name} is {value}: give {wanted}")
    if method == "della":
        rate, epsilon = values["drop_rate"], values["epsilon"]
        if rate + epsilon >= 1 or rate - epsilon < 0:
            raise MergeError(
                f"--drop_rate {rate} and --epsilon {epsilon}: della drops entries with probabilities from "
                "drop_rate - epsilon to drop_rate + epsilon, which must lie between 0 and 1; lower --epsilon"
            )
    if method == "breadcrumbs" and values["density"] + values["gamma"] > 1 + 1e-9:
        raise MergeError(
            f"--density {values['density']} and --gamma {values['gamma']} are more than a row together; lower one"
        )


@dataclass
class MergeModelArguments:
    """The base model of the experts, and where the arithmetic and the scoring run."""

    model_name_or_path: str = field(metadata={"help": "Base model of the experts: local folder or Hub id."})
    model_revision: str | None = field(default=None, metadata={"help": "Hub revision of the base model."})
    base_dtype: str | None = field(
        default=None,
        metadata={
            "help": "Dtype of the base for scoring; by default bfloat16 on a GPU that has it, else float32.",
            "choices": ["auto", "float32", "bfloat16", "float16"],
        },
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run model code from the Hub for the base."})
    device: str = field(
        default="auto",
        metadata={
            "help": "Where experts are merged and scored; auto takes a GPU if there is one. What is dropped at random "
            "is drawn there, so CPU and GPU draw differently.",
            "choices": ["auto", "cpu", "cuda"],
        },
    )

    def eval_arguments(self, use_cpu: bool) -> EvalModelArguments:
        """The same as flags of the evaluation."""
        return EvalModelArguments(
            model_name_or_path=self.model_name_or_path,
            model_revision=self.model_revision,
            dtype=self.base_dtype,
            trust_remote_code=self.trust_remote_code,
            use_cpu=use_cpu,
        )


@dataclass
class MergeArguments:
    """Which experts are merged, and how."""

    adapters: list[str] = field(
        default_factory=list,
        metadata={
            "help": "LoRA experts on the base, two at least: local folders or Hub ids. The first one's tokenizer, if "
            "it has one, goes with the result."
        },
    )
    method: str = field(default="task_arithmetic", metadata={"help": "How they are merged.", "choices": list(METHODS)})
    weights: list[float] | None = field(
        default=None, metadata={"help": "Factor of each expert's update, one per expert; 1 by default."}
    )
    merge_lambda: float | None = field(
        default=None,
        metadata={
            "help": "Factor of the merged update; by default 0.3 of task_arithmetic, dare and knots_dare, 1.0 of "
            "ties, dare_ties and knots_ties, 1.1 of della, 0.4 of breadcrumbs."
        },
    )
    density: float | None = field(
        default=None,
        metadata={
            "help": "Share of entries that is kept: the largest of an expert (ties, dare_ties after dropping, "
            "knots_ties), the largest below gamma of a row (breadcrumbs). 0.2 by default; with 1, dare_ties is that "
            "of PEFT and mergekit."
        },
    )
    drop_rate: float | None = field(
        default=None,
        metadata={
            "help": "Share of entries that is dropped at random, the others being rescaled: 0.5 by default of dare, "
            "dare_ties and knots_dare, 0.3 of della."
        },
    )
    epsilon: float | None = field(
        default=None,
        metadata={"help": "Of della: the drop rate of an entry is this much higher or lower by its rank (0.07)."},
    )
    gamma: float | None = field(
        default=None, metadata={"help": "Of breadcrumbs: share of largest entries of a row that is set to 0 (0.1)."}
    )
    rank: int | None = field(
        default=None,
        metadata={
            "help": "Highest rank of the result; by default the sum of the experts' ranks, with which average, "
            "task_arithmetic and knots_* are exact. Less, and what other methods have beyond it, is cut by SVD."
        },
    )
    seed: int | None = field(
        default=None, metadata={"help": "Seed of what is dropped at random (dare, dare_ties, della, knots_dare); 0."}
    )

    def __post_init__(self) -> None:
        if len(self.adapters) < 2:
            raise MergeError(f"--adapters names {len(self.adapters)}: give two experts at least")
        if self.rank is not None and self.rank < 1:
            raise MergeError(f"--rank is {self.rank}: give an integer of at least 1")
        if self.seed is not None and self.method not in RANDOM_METHODS:
            raise MergeError(f"--seed {self.seed}: nothing in {self.method} is random; leave it out")
        if self.seed is not None and self.seed < 0:
            raise MergeError(f"--seed is {self.seed}: give an integer of at least 0")
        self._check_weights()
        self.settings()

    def _check_weights(self) -> None:
        if self.weights is None:
            return
        if self.method == PER_TASK:
            raise MergeError(f"--weights: {PER_TASK} has none, it scales each expert's mask by itself; leave it out")
        if len(self.weights) != len(self.adapters):
            raise MergeError(
                f"--weights has {len(self.weights)} values, but --adapters has {len(self.adapters)}: give one each"
            )
        if not all(map(math.isfinite, self.weights)) or not any(self.weights):
            raise MergeError(f"--weights is {self.weights}: give finite numbers that are not all 0")
        if self.method == "average" and abs(sum(self.weights)) < 1e-9:
            raise MergeError(f"--weights is {self.weights}: average divides by their sum, which is 0")

    def given(self) -> dict[str, float]:
        """The hyper-parameters that were given as flags."""
        values = {name: getattr(self, name) for name in HYPERPARAMETERS}
        return {name: value for name, value in values.items() if value is not None}

    def settings(self) -> MergeSettings:
        """The method with all values, those of its authors where none was given.

        Raises:
            MergeError: a hyper-parameter is not one of the method, or out of range.
        """
        own = METHODS[self.method]
        for name, value in self.given().items():
            if name not in own:
                raise MergeError(f"--{name} {value}: {self.method} has {_list(own)}; leave it out")
        values = {**own, **self.given()}
        check_hyperparameters(self.method, values)
        seed = (self.seed or 0) if self.method in RANDOM_METHODS else None
        weights = tuple(self.weights) if self.weights else (1.0,) * len(self.adapters)
        return MergeSettings(self.method, values, weights, seed)


def _list(names: Mapping[str, float]) -> str:
    return "the hyper-parameters " + ", ".join(f"--{name}" for name in names) if names else "no hyper-parameters"


@dataclass
class MergeDataArguments(EvalDataArguments):
    """Validation data on which merges are scored; none is needed."""

    dataset_name: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Validation data sets: local .json, .jsonl, .csv or .parquet files, local folders, or ids on the "
            "Hub. Every merge is scored on all of them; of emr, each expert's adapter on its own, one per expert."
        },
    )

    def __post_init__(self) -> None:
        if self.dataset_name:
            super().__post_init__()


@dataclass
class MergeScoringArguments:
    """What is scored on the validation data besides the adapter that is written."""

    search: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Hyper-parameters to choose by the mean score on the validation data, each name=start:stop:step "
            "(stop included) or name=value,value; of several, all combinations. lambda is merge_lambda."
        },
    )
    dense: bool = field(
        default=False,
        metadata={
            "help": "Score the merged update itself too, before its rank is cut; holds the changed weights twice."
        },
    )


@dataclass
class MergeOutputArguments:
    """Where the result goes."""

    output_dir: str = field(metadata={"help": "Folder for the adapter; of emr, for a folder per expert."})
    overwrite: bool = field(
        default=False,
        metadata={"help": "Write into an output_dir that is not empty; records and files of the same name go."},
    )
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Dtype of the written weights; by default that of the experts, float32 if theirs differ.",
            "choices": ["float32", "bfloat16", "float16"],
        },
    )
    names: list[str] | None = field(
        default=None,
        metadata={"help": "Of emr: names of the experts' folders, one per expert; by default the experts' own."},
    )


MERGE_ARGUMENTS = (
    MergeModelArguments,
    MergeArguments,
    MergeScoringArguments,
    MergeDataArguments,
    GenerationArguments,
    MergeOutputArguments,
)
