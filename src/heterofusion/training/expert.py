"""LoRA supervised fine-tuning of one expert: its flags, and what watches over its training.

Training itself is transformers' `Trainer`. What `load_adapter` would refuse (DoRA, biases, PiSSA, ...) has no flag.
"""

import json
import math
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainingArguments

from heterofusion.data.labels import SourceLabelArguments
from heterofusion.data.replay import DataArguments
from heterofusion.method.config import BasisArguments, check_range
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.loading import ModelArguments
from heterofusion.training.checkpoints import last_good
from heterofusion.training.config import OutputArguments, avoid_reentrant, check_training
from heterofusion.training.nonfinite import NonFiniteError

ALL_LINEAR = "all-linear"
LORA_B = "lora_B"
_ALL = sys.maxsize


# ---- flags ------------------------------------------------------------------------------------------------------


@dataclass
class ExpertModelArguments(ModelArguments):
    """The base model of an expert and how it is loaded."""

    model_name_or_path: str = field(metadata={"help": "Base model of the expert: local folder or Hub id."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run model code from the Hub for the base."})


@dataclass
class ExpertDataArguments(DataArguments):
    """Flags for the training data, as those of the replay; but everything is used by default."""

    dataset_name: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Training data sets: local .json, .jsonl, .csv or .parquet files, local folders, or Hub ids."
        },
    )
    max_examples: list[int] = field(
        default_factory=lambda: [0],
        metadata={"help": "Number of examples that are sampled from each training data set at most; 0 takes all."},
    )
    eval_max_examples: list[int] = field(
        default_factory=lambda: [0],
        metadata={"help": "Number of examples that are sampled from each evaluation data set at most; 0 takes all."},
    )

    def __post_init__(self) -> None:
        for flag in ("max_examples", "eval_max_examples"):
            values = getattr(self, flag)
            values = values if isinstance(values, list) else [values]
            setattr(self, flag, [_ALL if value == 0 else value for value in values])
        super().__post_init__()


_BESIDE_INIT = ("init_adapter", "init_revision", "train_only", "lora_dropout", "extra_rank", "extra_basis")


@dataclass
class LoraArguments(BasisArguments):
    """The LoRA of an expert, in the names of PEFT's `LoraConfig`."""

    r: int = field(default=16, metadata={"help": "Rank of the update."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the update, which is lora_alpha / r."})
    lora_dropout: float | None = field(
        default=None, metadata={"help": "Dropout of the inputs of lora_A; 0.05 by default, or that of --init_adapter."}
    )
    target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names of the modules that get LoRA, or all-linear; by default the attention and MLP projections, "
            "by whatever names the base has them."
        },
    )
    layers_to_transform: list[int] | None = field(
        default=None, metadata={"help": "Indices of the layers that get LoRA; all by default."}
    )
    use_rslora: bool = field(default=False, metadata={"help": "Scale by lora_alpha / sqrt(r) instead."})
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "Modules that are trained whole and saved with the adapter; a fusion keeps the target's."},
    )
    init_adapter: str | None = field(
        default=None,
        metadata={
            "help": "Adapter that is trained on (local folder or Hub id) in place of a new one; it brings its rank, "
            "scaling and modules."
        },
    )
    init_revision: str | None = field(default=None, metadata={"help": "Hub revision of --init_adapter."})
    train_only: str | None = field(
        default=None,
        metadata={
            "help": "Train these weights alone, as a fusion does: lora_A and modules_to_save stay as they are.",
            "choices": [LORA_B],
        },
    )
    init_lora_weights: str = field(
        default="true",
        metadata={
            "help": "First lora_A: PEFT's default (true), or another that leaves the base as it is.",
            "choices": ["true", "gaussian", "orthogonal"],
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("r", self.r, 1, False)
        check_range("lora_alpha", self.lora_alpha, 1, False)
        if self.lora_dropout is not None and not 0 <= self.lora_dropout < 1:
            raise UserError(f"--lora_dropout is {self.lora_dropout}; it must be at least 0 and below 1")
        if self.target_modules and ALL_LINEAR in self.target_modules:
            if len(self.target_modules) > 1:
                raise UserError(f"--target_modules names {ALL_LINEAR} and others; give it alone")
            if self.layers_to_transform is not None:
                raise UserError(
                    f"--layers_to_transform cannot be used with --target_modules {ALL_LINEAR}; name the modules"
                )
        if any(index < 0 for index in self.layers_to_transform or ()):
            raise UserError(f"--layers_to_transform is {self.layers_to_transform}; layers count from 0")
        if self.train_only not in (None, LORA_B):
            raise UserError(f"--train_only is {self.train_only!r}; it can be {LORA_B}, or left out")
        if self.init_adapter is None:
            if self.init_revision is not None:
                raise UserError("--init_revision is of --init_adapter, which is not given")
            if self.extra_rank:
                raise UserError(
                    f"--extra_rank is {self.extra_rank}: it adds to the rank of --init_adapter, which is not given; "
                    "give a new LoRA its rank with --r"
                )
            return
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name not in _BESIDE_INIT and value != item.default:
                raise UserError(
                    f"--{item.name} is {value}, but --init_adapter brings its own: leave one of the two out"
                )


@dataclass
class ExpertConfig(TrainingArguments):
    """`TrainingArguments` with defaults for LoRA: AdamW without decay, learning rate 2e-4, cosine, batch 8."""

    learning_rate: float = field(default=2e-4, metadata={"help": "Peak learning rate of the LoRA weights."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    warmup_steps: float = field(default=0.03, metadata={"help": "Warm-up steps; below 1, the share of all steps."})
    per_device_train_batch_size: int = field(default=1, metadata={"help": "Examples per device and micro-batch."})
    gradient_accumulation_steps: int = field(default=8, metadata={"help": "Micro-batches per optimizer step."})
    num_train_epochs: float = field(default=3.0, metadata={"help": "Passes over the data."})
    logging_steps: float = field(default=10, metadata={"help": "Optimizer steps between two log lines."})
    optim: str = field(default="adamw_torch_fused", metadata={"help": "Optimizer."})
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Let DDP look for parameters without gradient; LoRA uses them all."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Hide losses that are not finite; a run stops at one instead."}
    )
    report_to: None | str | list[str] = field(  # noqa: RUF036  # the order HfArgumentParser understands
        default="none", metadata={"help": "Integrations to report to, such as tensorboard."}
    )

    def __post_init__(self) -> None:
        check_training(self)
        for name in ("bf16_full_eval", "fp16_full_eval"):
            if getattr(self, name):
                raise UserError(f"--{name} would cast the adapter before it is saved: leave it out")
        super().__post_init__()
        avoid_reentrant(self, "reentrant checkpointing gives LoRA on a frozen base no gradient")


EXPERT_ARGUMENTS = (
    ExpertModelArguments, LoraArguments, ExpertDataArguments, SourceLabelArguments, OutputArguments, ExpertConfig
)  # fmt: skip


# ---- training ---------------------------------------------------------------------------------------------------


class StopAtNonFiniteLoss(TrainerCallback):
    """Ends a training whose logged loss is not finite."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        loss = (logs or {}).get("loss", 0.0)
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"step {state.global_step}: the loss is not finite; {last_good(args.output_dir)}. Lower "
                "--learning_rate, clip with --max_grad_norm, or look at the data"
            )


def is_at_end(checkpoint: Path, args: TrainingArguments) -> bool:
    """Whether a checkpoint is of a run's last step: Trainer would make one step more."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    if args.max_steps > 0:
        return state["global_step"] >= args.max_steps
    return state["epoch"] >= args.num_train_epochs


def check_finite(model: nn.Module) -> None:
    """Refuse to save a diverged adapter, which `load_adapter` would refuse.

    Raises:
        NonFiniteError: names the first weight.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not parameter.isfinite().all():
            raise NonFiniteError(f"{name} is not finite, so no adapter is written; lower --learning_rate")
