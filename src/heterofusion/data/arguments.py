"""Flags of the recipes as dataclasses, beside those of the method and its training in `config.py`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from heterofusion.runtime.errors import UserError


@dataclass
class AdapterArguments:
    """Which adapters are fused."""

    target_adapter: str = field(metadata={"help": "Target adapter (the anchor): local folder or Hub id."})
    source_adapters: list[str] = field(
        metadata={"help": "Source adapters of any family, in order: local folders or Hub ids."}
    )
    source_configs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Base model (folder, config.json or Hub id) of each source, 'none' where not needed; only fused "
            "projections need it, and base_model_name_or_path is followed by default."
        },
    )
    target_revision: str | None = field(default=None, metadata={"help": "Hub revision of the target adapter."})
    source_control: str | None = field(
        default=None,
        metadata={
            "help": "Replace the sources' tensors, to see what the sources contribute: noise (random directions of "
            "the same norms and spectra), shuffle (the right tensors in the wrong modules) or zero; --seed draws. The "
            "result is a control, no fusion of the sources.",
            "choices": ["noise", "shuffle", "zero"],
        },
    )
    allow_pickle: bool = field(
        default=False, metadata={"help": "Also read adapter_model.bin, with weights_only=True."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run model code from the Hub for the target's base; sources never need it."}
    )


@dataclass
class ModelArguments:
    """The target's base model and how it is loaded."""

    model_name_or_path: str = field(metadata={"help": "Base model of the target adapter: local folder or Hub id."})
    model_revision: str | None = field(default=None, metadata={"help": "Hub revision of the base model."})
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Dtype of the frozen base; by default bfloat16 on a GPU that has it, else float32.",
            "choices": ["auto", "float32", "bfloat16", "float16"],
        },
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention of the base model: sdpa, flash_attention_2, eager, ..."}
    )
    load_in_8bit: bool = field(default=False, metadata={"help": "Load the base in 8 bit with bitsandbytes."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Load the base in 4 bit (nf4) with bitsandbytes."})


@dataclass
class OutputArguments:
    """What a training run does with an output_dir that is there."""

    overwrite: bool = field(
        default=False,
        metadata={"help": "Write into an output_dir that is not empty; checkpoints and files of the same name go."},
    )


@dataclass
class RunArguments(OutputArguments):
    """What a fusion run does besides training."""

    dry_run: bool = field(default=False, metadata={"help": "Print the alignment plan and stop."})
    init_hypernetwork_from: str | None = field(
        default=None,
        metadata={
            "help": "Start from hypernetworks of another fusion, of the same sizes: a checkpoint-N folder, or an "
            "output_dir for its last one. Groups (role and rank) that it lacks start fresh."
        },
    )
    carry_hypernetworks: bool = field(
        default=False,
        metadata={"help": "With `stages:` in the YAML file: start from the hypernetworks of the stage before."},
    )


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


@dataclass
class SourceLabelArguments:
    """Answers of the source experts to unlabelled prompts, which join the replay."""

    source_labels: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Files of prompts that the source experts answered, in any format of the replay, or folders that "
            "recipes/label.py wrote; they join the replay, which may then be empty."
        },
    )
    source_labels_max_examples: list[int] | None = field(
        default=None,
        metadata={
            "help": "Number of labels that are sampled from each file at most, one value for all or one per name of "
            "--source_labels; all of them by default."
        },
    )
    min_log_probability: float | None = field(
        default=None,
        metadata={
            "help": "Drop labels that their source was less sure of: mean log-probability of the answer's tokens, at "
            "most 0 (-0.1 is a probability of 0.9 per token)."
        },
    )
    keep_malformed: bool = field(
        default=False, metadata={"help": "Keep labels that are not in the output format of their task."}
    )
    replay_fraction: float | None = field(
        default=None,
        metadata={
            "help": "Share of replay among the examples of every run of neighbours, the rest are source labels. By "
            "default all examples, replay and labels, come equally often."
        },
    )
    label_loss: str = field(
        default="hard",
        metadata={
            "help": "What source labels are trained on: hard (the answers alone) or soft (also what their source "
            "thought of other tokens; recipes/label.py --top_k_logits stores it beside the files).",
            "choices": ["hard", "soft"],
        },
    )
    soft_weight: float = field(
        default=0.5,
        metadata={
            "help": "With --label_loss soft, the weight of KL(source || model) at tokens that both see alike, 0 to 1; "
            "the answer's cross-entropy has the rest there, and all of it elsewhere."
        },
    )
    logits_cache: str | None = field(
        default=None,
        metadata={
            "help": "With --label_loss soft, folder where soft labels in the target's tokens and the maps of "
            "vocabularies are kept for further runs; heterofusion/soft_labels in HF_HOME (~/.cache/huggingface) by "
            "default."
        },
    )

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Check every value; a single value where a list is meant becomes a list of one.

        Raises:
            ValueError: A value is out of range or of the wrong type, lists of different lengths, or a flag that does
                nothing without `source_labels` or soft labels.
        """
        for flag, kind in (("source_labels", str), ("source_labels_max_examples", int)):
            values = getattr(self, flag)
            values = [values] if isinstance(values, (str, int)) else values
            setattr(self, flag, values)
            for value in values or []:
                _check_value(flag, value, kind)
        counts = self.source_labels_max_examples
        if not self.source_labels:
            for item in fields(self)[1:]:
                if getattr(self, item.name) != item.default:
                    raise UserError(
                        f"--{item.name} is {getattr(self, item.name)}, but --source_labels is not given: name the "
                        "files of labels, or leave it out"
                    )
        elif counts is not None and len(counts) not in (1, len(self.source_labels)):
            raise UserError(
                f"--source_labels_max_examples has {len(counts)} values, but --source_labels has "
                f"{len(self.source_labels)}: give one value for all files, or one per file"
            )
        lowest = self.min_log_probability
        if lowest is not None and not -math.inf < lowest <= 0:
            raise UserError(f"--min_log_probability is {lowest}: give a log-probability, finite and at most 0")
        if self.label_loss not in ("hard", "soft"):  # of YAML or a program
            raise UserError(f"--label_loss is {self.label_loss!r}: give hard or soft")
        if not 0 <= self.soft_weight <= 1:
            raise UserError(f"--soft_weight is {self.soft_weight}: give a weight from 0 to 1")
        for flag, default in (("soft_weight", 0.5), ("logits_cache", None)):
            if self.label_loss == "hard" and getattr(self, flag) != default:
                raise UserError(
                    f"--{flag} is {getattr(self, flag)}, but --label_loss is hard: add --label_loss soft, or leave it "
                    "out"
                )

    def max_examples_of(self, index: int) -> int | None:
        """What `source_labels_max_examples` says of the file with this index."""
        counts = self.source_labels_max_examples
        return None if counts is None else counts[0] if len(counts) == 1 else counts[index]


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
