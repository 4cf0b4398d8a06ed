"""Flags of recipes/label.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from heterofusion.data.labels import ANCHOR, LABEL_CONTROLS
from heterofusion.evaluation.arguments import (
    BASE_NAME,
    EvalDataArguments,
    is_file_name,
)
from heterofusion.experts.expert import NO_ADAPTER, BaseArguments
from heterofusion.experts.generation import GenerationArguments
from heterofusion.method.config import check_range
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.loading import ModelArguments

REPLAY = "replay"  # as a value of --prompts: the replay's own
TEMPERATURE, TOP_P = 1.0, 0.95
MAX_PROMPTS = 300
ANCHOR_MIN_SCORE = 0.5


@dataclass
class LabelModelArguments(ModelArguments):
    """The source experts, and the anchor that they have to beat."""

    model_name_or_path: str = field(
        default="", metadata={"help": "Base model of --target_adapter: local folder or Hub id."}
    )
    target_adapter: str | None = field(
        default=None,
        metadata={
            "help": "The fusion's target adapter (the anchor), which is scored beside the sources and may label; it "
            "may be left out where --routing names all tasks and gives none of them to it."
        },
    )
    target_revision: str | None = field(default=None, metadata={"help": "Hub revision of the target adapter."})
    source_models: list[str] = field(
        default_factory=list,
        metadata={"help": "Base models of the sources, of any family: one for each adapter, or one for all."},
    )
    source_adapters: list[str] = field(
        default_factory=list,
        metadata={
            "help": f"The source experts: local folders or Hub ids of adapters; the word {NO_ADAPTER} is a base alone."
        },
    )
    source_names: list[str] | None = field(
        default=None,
        metadata={"help": "One name per source, for tables, labels and --routing; by default the adapter's own."},
    )
    merge_adapters: bool = field(
        default=False,
        metadata={
            "help": "Merge each adapter into its base before it answers, which is faster on a GPU; in bfloat16 the "
            "weights are rounded once more, so answers may differ."
        },
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run model code from the Hub for the bases."})
    use_cpu: bool = field(default=False, metadata={"help": "Stay on the CPU where there is a GPU."})

    def __post_init__(self) -> None:
        for flag in ("source_models", "source_adapters"):
            if not getattr(self, flag) or not all(getattr(self, flag)):
                raise UserError(f"--{flag} is missing or has an empty name: name at least one")
        if len(self.source_models) not in (1, len(self.source_adapters)):
            raise UserError(
                f"--source_models has {len(self.source_models)} values, but --source_adapters has "
                f"{len(self.source_adapters)}: give one base per adapter, or one for all"
            )
        if self.target_adapter is not None and not self.model_name_or_path:
            raise UserError(f"--target_adapter {self.target_adapter} needs its base: give --model_name_or_path")
        self.names()
        if self.merge_adapters and (self.load_in_4bit or self.load_in_8bit):
            raise UserError("--merge_adapters would round an adapter to the bits of a quantized base: leave it out")

    def bases(self) -> list[str]:
        """The sources' bases, one each."""
        count = len(self.source_adapters)
        return [*self.source_models] * count if len(self.source_models) == 1 else [*self.source_models]

    def names(self) -> list[str]:
        """The sources' names, one each.

        Raises:
            ValueError: as many names as sources were expected, two are the same, or one cannot name a folder.
        """
        count = len(self.source_adapters)
        if self.source_names is not None and len(self.source_names) != count:
            raise UserError(
                f"--source_names has {len(self.source_names)} values, but --source_adapters has {count}: give one each"
            )
        names = self.source_names or [
            BASE_NAME if adapter == NO_ADAPTER else Path(adapter).expanduser().resolve().name
            for adapter in self.source_adapters
        ]
        for index, name in enumerate(names):
            if not is_file_name(name) or name in (ANCHOR, NO_ADAPTER):
                raise UserError(
                    f"{name!r} cannot be the name of source {self.source_adapters[index]}; give --source_names, one "
                    f"per source, of letters, digits and . _ + = -, none of them {ANCHOR} or {NO_ADAPTER}"
                )
            if name in names[:index]:
                raise UserError(
                    f"sources {self.source_adapters[names.index(name)]} and {self.source_adapters[index]} have the "
                    f"same name {name!r}; give --source_names, one per source, all different"
                )
        return names

    def how(self, base: str, revision: str | None = None) -> BaseArguments:
        """A base and how it is loaded."""
        return BaseArguments(
            model_name_or_path=base,
            model_revision=revision,
            dtype=self.dtype,
            attn_implementation=self.attn_implementation,
            load_in_8bit=self.load_in_8bit,
            load_in_4bit=self.load_in_4bit,
            trust_remote_code=self.trust_remote_code,
            use_cpu=self.use_cpu,
        )


@dataclass
class LabelDataArguments(EvalDataArguments):
    """The tasks: replay data that tells how each is asked and scored, and prompts without answers."""

    dataset_name: list[str] = field(
        default_factory=list,
        metadata={
            "help": "The replay's data sets with the right answers, one per task: local .json, .jsonl, .csv or "
            ".parquet files, local folders, or ids on the Hub. Without them --routing and --prompts have to be given."
        },
    )
    dataset_split: list[str] = field(
        default_factory=lambda: ["train"],
        metadata={"help": "Split of each replay data set; a local file has no splits and is read whole."},
    )
    dataset_label: list[str] | None = field(
        default=None,
        metadata={
            "help": "Name of each task, for files, tables and --routing; by default that of its replay file, or of "
            "its prompt file where there is no replay."
        },
    )
    max_examples: list[int] = field(
        default_factory=lambda: [300],
        metadata={"help": "Number of replay examples per task that the routing is measured on at most; 0 takes all."},
    )
    prompts: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Prompts to label, one file per task in the order of --dataset_name: column `prompt`, or the "
            f"replay's columns, whose answers are not looked at. The word {REPLAY} takes the replay's own prompts. "
            "Folders and Hub data sets are read from their split train."
        },
    )
    self_prompt: int = field(
        default=0,
        metadata={
            "help": "In place of --prompts: number of times that the sources of a task continue its prompt template, "
            "to invent inputs; what is repeated, or leaves the template, is dropped."
        },
    )
    self_prompt_model: str = field(
        default=BASE_NAME,
        metadata={
            "help": "What continues the template: the source's base, or the expert itself, which may rather answer "
            "than write on where it was trained on answers alone.",
            "choices": [BASE_NAME, "expert"],
        },
    )
    max_prompts: int = field(
        default=MAX_PROMPTS,
        metadata={"help": "Number of prompts that are sampled for each task at most; 0 takes all."},
    )
    temperature: float = field(default=TEMPERATURE, metadata={"help": "Temperature of --self_prompt."})
    top_p: float = field(
        default=TOP_P, metadata={"help": "Probability mass that --self_prompt draws tokens from, above 0 up to 1."}
    )
    seed: int = field(
        default=42, metadata={"help": "Seed of the sample of prompts, of --self_prompt, and of --control shuffle."}
    )

    def __post_init__(self) -> None:
        for flag in ("self_prompt", "max_prompts", "seed"):
            check_range(flag, getattr(self, flag), 0, False)
        check_range("temperature", self.temperature, 0, True)
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top_p is {self.top_p}; it must be above 0 and at most 1")
        if bool(self.prompts) == bool(self.self_prompt):
            raise UserError(
                "give either --prompts (files, or the word replay) or --self_prompt (a number of inputs to invent)"
                + (", not both" if self.prompts else "")
            )
        if self.self_prompt and self.max_prompts != MAX_PROMPTS:
            raise UserError(
                f"--max_prompts {self.max_prompts} is for --prompts; --self_prompt is itself the number of inputs"
            )
        for flag, default in (("self_prompt_model", BASE_NAME), ("temperature", TEMPERATURE), ("top_p", TOP_P)):
            if not self.self_prompt and getattr(self, flag) != default:
                raise UserError(f"--{flag} {getattr(self, flag)} is for --self_prompt alone; leave it out")
        if not self.dataset_name:
            self._check_without_replay()
        elif self.prompts and not self.own_prompts and len(self.prompts) != len(self.dataset_name):
            raise UserError(
                f"--prompts has {len(self.prompts)} values, but --dataset_name has {len(self.dataset_name)}: give "
                f"one file per task, in the same order, or the word {REPLAY}"
            )
        if self.dataset_name:
            super().__post_init__()

    def _check_without_replay(self) -> None:
        if self.self_prompt or self.own_prompts:
            what = "--self_prompt" if self.self_prompt else f"--prompts {REPLAY}"
            raise UserError(f"{what} needs the replay's prompts: give --dataset_name, one file per task")
        try:
            self._named_by_prompts()
        except ValueError as error:  # the prompts' files stand for the replay's
            raise UserError(str(error).replace("--dataset_name", "--prompts")) from error

    def _named_by_prompts(self) -> EvalDataArguments:
        return EvalDataArguments(dataset_name=self.prompts, dataset_label=self.dataset_label, metric=self.metric)

    @property
    def own_prompts(self) -> bool:
        """Whether the replay's own prompts are labelled."""
        return self.prompts == [REPLAY]

    def labels(self) -> list[str]:
        """The names of the tasks.

        Raises:
            ValueError: two are the same, or one cannot be the name of a file.
        """
        return super().labels() if self.dataset_name else self._named_by_prompts().labels()

    def metrics(self) -> list[str]:
        """The metrics, one per task."""
        return super().metrics() if self.dataset_name else self._named_by_prompts().metrics()


@dataclass
class RoutingArguments:
    """Which source labels which task."""

    routing: str | None = field(
        default=None,
        metadata={
            "help": "YAML file that says so instead of the scores: a mapping of tasks to a source, a list of sources, "
            f"or none; the word {ANCHOR} stands for the anchor itself. Tasks that it leaves out are measured."
        },
    )
    routing_margin: float = field(
        default=0.1,
        metadata={"help": "How much better than the anchor's a source's score has to be for it to label a task."},
    )
    routing_share: float = field(
        default=0.5,
        metadata={
            "help": "Share of the best source's gain over the anchor that a source has to reach for it to label "
            "a task beside that one (0: all that beat the anchor by the margin do)."
        },
    )
    anchor_labels: bool = field(
        default=False,
        metadata={
            "help": "Let the anchor itself label measured tasks that no source serves, which keeps what it can do: "
            "those where its own score is at least --anchor_min_score."
        },
    )
    anchor_min_score: float = field(
        default=ANCHOR_MIN_SCORE,
        metadata={"help": "The anchor's score from which it labels a task, with --anchor_labels."},
    )
    control: str | None = field(
        default=None,
        metadata={
            "help": "Let somebody who does not know answer in place of the sources that were chosen, to see what "
            "their labels contribute: bases (the sources' bases without adapters), shuffle (sources that were chosen "
            "for other tasks; --seed draws) or anchor (the anchor itself). What trains on such labels is a control.",
            "choices": [*LABEL_CONTROLS],
        },
    )

    def __post_init__(self) -> None:
        for flag in ("routing_margin", "routing_share", "anchor_min_score"):
            value = getattr(self, flag)
            if not 0 <= value <= 1:
                raise UserError(f"--{flag} is {value}; it must be between 0 and 1")
        if not self.anchor_labels and self.anchor_min_score != ANCHOR_MIN_SCORE:
            raise UserError(
                f"--anchor_min_score {self.anchor_min_score} is for --anchor_labels true alone; leave it out"
            )

    @property
    def anchor_from(self) -> float | None:
        """The anchor's score from which it labels a task that no source serves; None if it does not."""
        return self.anchor_min_score if self.anchor_labels else None


@dataclass
class LabelOutputArguments:
    """Where labels go, and what is kept of them."""

    output_dir: str = field(metadata={"help": "Folder for the labels (one .jsonl file per task) and labels.json."})
    resume: bool = field(
        default=False,
        metadata={
            "help": "Go on in an output_dir that is not empty: answers that are there, by the same models to the same "
            "whole set of prompts of a task with the same settings, are not generated again."
        },
    )
    overwrite: bool = field(
        default=False,
        metadata={"help": "Write into an output_dir that is not empty; what an earlier run wrote there goes."},
    )
    top_k_logits: int = field(
        default=0,
        metadata={
            "help": "Also store the most probable tokens of the source at every position of its labels: how many of "
            "them, such as 10; 0 stores none. One process does it."
        },
    )
    teacher_batch_size: int = field(
        default=8, metadata={"help": "Labels per batch when --top_k_logits runs a source over them."}
    )

    def __post_init__(self) -> None:
        if self.resume and self.overwrite:
            raise UserError("--resume and --overwrite exclude each other; choose one")
        check_range("top_k_logits", self.top_k_logits, 0, False)
        check_range("teacher_batch_size", self.teacher_batch_size, 1, False)


LABEL_ARGUMENTS = (
    LabelModelArguments,
    LabelDataArguments,
    RoutingArguments,
    GenerationArguments,
    LabelOutputArguments,
)


class LabelArguments(NamedTuple):
    """All flags of a labelling, in the order of `LABEL_ARGUMENTS`."""

    model: LabelModelArguments
    data: LabelDataArguments
    routing: RoutingArguments
    generation: GenerationArguments
    output: LabelOutputArguments
