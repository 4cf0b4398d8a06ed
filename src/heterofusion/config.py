"""Flags of a fusion as dataclasses, in TRL's manner: `HeteroFusionConfig` belongs to `HeteroFusionTrainer`.

Every range that can be checked without a file is checked here.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from transformers import TrainingArguments

DEFAULT_PRESET = "paper"


def check_range(flag: str, value: float | None, low: float, strict: bool) -> None:
    """Check that a number is finite and at least `low`, or above it if `strict`; None passes.

    Raises:
        ValueError: names the flag, its value and the range.
    """
    if value is not None and not (low < value < math.inf if strict else low <= value < math.inf):
        raise ValueError(f"--{flag} is {value}; it must be {'above' if strict else 'at least'} {low:g} and finite")


@dataclass
class MethodConfig:
    """Settings of the method itself, without those of training.

    A size that is not given comes from the preset, fitted to the width of the target model.
    """

    preset: str = field(
        default=DEFAULT_PRESET,
        metadata={"help": "Form and sizes of the hypernetwork.", "choices": ["paper", "compact"]},
    )
    block_size: int | None = field(
        default=None, metadata={"help": "Rows per block of A^T and B; 4096 for a 4096-wide model, fitted below that."}
    )
    embed_dim: int | None = field(
        default=None, metadata={"help": "Embedding width of the hypernetwork; 1024 in `paper` on a 4096-wide model."}
    )
    num_heads: int | None = field(default=None, metadata={"help": "Attention heads of the hypernetwork (8)."})
    max_position_embeddings: int | None = field(
        default=None, metadata={"help": "Longest sequence of blocks, sources concatenated (4096; 1024 in `compact`)."}
    )
    alpha_init: float = field(default=0.3, metadata={"help": "First value of every alpha, the scale of an update."})
    mu_gate: float = field(default=0.1, metadata={"help": "Shift of the gate before it is clamped to [0, 1]."})
    rdm_weight: float = field(
        default=0.005, metadata={"help": "Weight (lambda) of rectified distribution matching in the loss."}
    )
    rdm_mu: float = field(default=0.0, metadata={"help": "Mean of RDM's Gaussian before rectification."})
    rdm_sigma: float = field(default=1.0, metadata={"help": "Standard deviation of RDM's Gaussian."})
    rdm_projections: int = field(default=2048, metadata={"help": "Random projections of RDM."})
    layer_alignment: str = field(
        default="tail",
        metadata={
            "help": "Map between models of different depth: the last layers meet, or depth is scaled.",
            "choices": ["tail", "proportional"],
        },
    )
    transfer_ratio: str = field(
        default="1", metadata={"help": "Share of each source's layer pairs that is used, from the last: 0.5 or 1/2."}
    )
    canonicalize: bool = field(
        default=False, metadata={"help": "Read every (A, B) in its canonical form sqrt(S) V^T, U sqrt(S)."}
    )

    def check_method(self) -> None:
        """Check the ranges of the settings.

        Raises:
            ValueError: names the flag, its value and the range.
        """
        for name, low, strict in (
            ("rdm_weight", 0.0, False),
            ("rdm_sigma", 0.0, False),
            ("rdm_projections", 0, True),
            ("block_size", 0, True),
            ("embed_dim", 0, True),
            ("num_heads", 0, True),
            ("max_position_embeddings", 0, True),
        ):
            check_range(name, getattr(self, name), low, strict)
        for name in ("alpha_init", "mu_gate", "rdm_mu"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"--{name} is {getattr(self, name)}; it must be finite")
        if self.alpha_init == 0:
            raise ValueError("--alpha_init is 0; the hypernetwork would never get a gradient")

    def hypernetwork_overrides(self) -> dict[str, Any]:
        """Arguments of `HypernetworkConfig.from_preset` that these settings give."""
        names = ("block_size", "embed_dim", "num_heads", "max_position_embeddings", "mu_gate")
        return {name: getattr(self, name) for name in names}

    def method_dict(self) -> dict[str, Any]:
        """The method's settings as plain values, without those of training."""
        return {name: getattr(self, name) for name in MethodConfig.__dataclass_fields__}


@dataclass
class HeteroFusionConfig(MethodConfig, TrainingArguments):
    """`TrainingArguments` with the method's settings; the defaults are the paper's training recipe.

    AdamW (weight decay 0.01 on all parameters), learning rate 5e-5, cosine to 0 after `int(0.05 * steps)` warm-up
    steps, no gradient clipping, 3 epochs of batch 1 with accumulation 8.
    """

    learning_rate: float = field(default=5e-5, metadata={"help": "Peak learning rate of the hypernetworks."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    warmup_steps: float = field(
        default=0.05,
        metadata={"help": "Warm-up steps; below 1, the share of all steps, rounded down."},
    )
    weight_decay: float = field(
        default=0.01, metadata={"help": "Weight decay of all parameters, norms, biases and alphas too."}
    )
    max_grad_norm: float = field(default=0.0, metadata={"help": "Gradient norm to clip at; 0 does not clip."})
    per_device_train_batch_size: int = field(default=1, metadata={"help": "Examples per device and micro-batch."})
    gradient_accumulation_steps: int = field(default=8, metadata={"help": "Micro-batches per optimizer step."})
    num_train_epochs: float = field(default=3.0, metadata={"help": "Passes over the replay."})
    logging_steps: float = field(default=10, metadata={"help": "Optimizer steps between two log lines."})
    optim: str = field(default="adamw_torch_fused", metadata={"help": "Optimizer."})
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Let DDP look for parameters without gradient; a fusion uses them all."}
    )
    report_to: None | str | list[str] = field(  # noqa: RUF036  # the order HfArgumentParser understands
        default="none", metadata={"help": "Integrations to report to, such as tensorboard."}
    )

    def __post_init__(self) -> None:
        self.check_method()
        self._check_training()
        super().__post_init__()
        kwargs = cast("dict[str, Any] | None", self.activation_checkpointing_kwargs)  # parsed by TrainingArguments
        if self.activation_checkpointing:
            if kwargs and kwargs.get("use_reentrant"):
                raise ValueError(
                    "activation_checkpointing_kwargs has use_reentrant=True: reentrant checkpointing gives the "
                    "hypernetworks no gradient; set use_reentrant to false"
                )
            self.activation_checkpointing_kwargs = {**(kwargs or {}), "use_reentrant": False}

    def _check_training(self) -> None:
        """Ranges that `TrainingArguments` leaves unchecked; a value outside would train nothing, or fail late."""
        for name, low, strict in (
            ("learning_rate", 0.0, True),
            ("weight_decay", 0.0, False),
            ("max_grad_norm", 0.0, False),
            ("adam_epsilon", 0.0, False),
            ("per_device_train_batch_size", 1, False),
            ("per_device_eval_batch_size", 1, False),
            ("gradient_accumulation_steps", 1, False),
            ("dataloader_num_workers", 0, False),
            ("logging_steps", 0, False),
            ("save_steps", 0, False),
            ("eval_steps", 0, False),
        ):
            check_range(name, getattr(self, name), low, strict)
        if self.neftune_noise_alpha is not None:
            raise ValueError("--neftune_noise_alpha is set, but the base stays in eval mode in a fusion: leave it out")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}; it must be at least 0 and below 1")
        if self.max_steps <= 0:
            check_range("num_train_epochs", self.num_train_epochs, 0, True)
        for name in ("seed", "data_seed"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 2**32:
                raise ValueError(f"--{name} is {value}; it must be at least 0 and below 2^32")
        for name in self._VALID_DICT_FIELDS:
            value = getattr(self, name)
            if isinstance(value, str) and value.startswith("{"):
                try:
                    json.loads(value)
                except ValueError as error:
                    raise ValueError(f"--{name} is {value}, which is not JSON: {error}") from None

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Warm-up steps: a share of the steps is rounded down, as in the published recipe (Trainer rounds up)."""
        if self.warmup_steps >= 1:
            return int(self.warmup_steps)
        return int(num_training_steps * self.warmup_steps)


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
class RunArguments:
    """What a training run does besides training."""

    overwrite: bool = field(
        default=False, metadata={"help": "Write into an output_dir that is not empty; files of the same name go."}
    )
    dry_run: bool = field(default=False, metadata={"help": "Print the alignment plan and stop."})


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
                raise ValueError(f"--{flag} is {values!r}: give one or more values")
            for value in values:
                _check_value(flag, value, kind)
            base = "eval_dataset_name" if flag.startswith("eval") else "dataset_name"
            names = getattr(self, base) or []
            if flag != base and names and len(values) not in (1, len(names)):
                raise ValueError(
                    f"--{flag} has {len(values)} values, but --{base} has {len(names)}: give one value for all data "
                    "sets, or one per data set"
                )
        for flag, lowest in (("dataset_seed", 0), ("max_length", 2)):
            value = getattr(self, flag)
            if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
                raise ValueError(f"--{flag} is {value!r}: give an integer of at least {lowest}")

    def replay_sets(self) -> list[DatasetSpec]:
        """The data sets of the training mixture, with one-valued flags repeated."""
        names = self.dataset_name
        return _specs(names, self.dataset_config, self.dataset_split, self.max_examples, self.dataset_ratio)

    def eval_sets(self) -> list[DatasetSpec]:
        """The data sets of the evaluation loss; empty when there are none."""
        return _specs(self.eval_dataset_name or [], self.eval_config, self.eval_split, self.eval_max_examples, [1.0])


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
        raise ValueError(f"--{flag} has the value {value!r}: give {wanted}")


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
