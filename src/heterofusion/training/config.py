"""Flags of a fusion as dataclasses, in TRL's manner: `HeteroFusionConfig` belongs to `HeteroFusionTrainer`.

Every range that can be checked without a file is checked here.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import (
    TrainingArguments,
)
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_utils import IntervalStrategy

from heterofusion.data.replay import DataArguments
from heterofusion.method.config import MethodConfig, check_range, preset_field
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.ranks import set_zero_init_dtype


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


def check_training(args: TrainingArguments) -> None:
    """Check ranges that `TrainingArguments` leaves open; a value outside would train nothing, or fail late.

    Raises:
        ValueError: names the flag, its value and the range.
    """
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
        check_range(name, getattr(args, name), low, strict)
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(args, name) < 1:
            raise UserError(f"--{name} is {getattr(args, name)}; it must be at least 0 and below 1")
    if args.max_steps <= 0:
        check_range("num_train_epochs", args.num_train_epochs, 0, True)
    for name in ("seed", "data_seed"):
        value = getattr(args, name)
        if value is not None and not 0 <= value < 2**32:
            raise UserError(f"--{name} is {value}; it must be at least 0 and below 2^32")
    for name in args._VALID_DICT_FIELDS:
        value = getattr(args, name)
        if isinstance(value, str) and value.startswith("{"):
            try:
                json.loads(value)
            except ValueError as error:
                raise UserError(f"--{name} is {value}, which is not JSON: {error}") from None


def avoid_reentrant(args: TrainingArguments, consequence: str) -> None:
    """Have activation checkpointing, if it is on, without reentrance: frozen inputs end the gradient with it.

    Raises:
        ValueError: reentrance is asked for; the message ends with the consequence.
    """
    kwargs = cast("dict[str, Any] | None", args.activation_checkpointing_kwargs)  # parsed by TrainingArguments
    if args.activation_checkpointing:
        if kwargs and kwargs.get("use_reentrant"):
            raise UserError(
                f"activation_checkpointing_kwargs has use_reentrant=True: {consequence}; set use_reentrant to false"
            )
        args.activation_checkpointing_kwargs = {**(kwargs or {}), "use_reentrant": False}


def training_settings(args: TrainingArguments) -> dict[str, Any]:
    """The settings of training that its result depends on, as plain values."""
    names = (
        "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "seed", "data_seed",
        "max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "bf16",
        "optim",
    )  # fmt: skip
    settings = args.to_dict()  # enums as plain values
    return {name: settings[name] for name in names}


@dataclass
class HeteroFusionConfig(MethodConfig, TrainingArguments):
    """`TrainingArguments` with the method's settings; the defaults are the paper's training recipe.

    AdamW (weight decay 0.01 on all parameters), learning rate 5e-5, cosine to 0 after `int(0.05 * steps)` warm-up
    steps, no gradient clipping, 3 epochs of batch 1 with accumulation 8. Presets differ in the first four.
    """

    learning_rate: float = preset_field("learning_rate", "Peak learning rate")
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    warmup_steps: float = preset_field("warmup_steps", "Warm-up steps; below 1, the share of all steps, rounded down")
    weight_decay: float = preset_field("weight_decay", "Weight decay of all parameters, norms, biases and alphas too")
    max_grad_norm: float = preset_field("max_grad_norm", "Gradient norm to clip at; 0 does not clip")
    per_device_train_batch_size: int = field(default=1, metadata={"help": "Examples per device and micro-batch."})
    gradient_accumulation_steps: int = field(default=8, metadata={"help": "Micro-batches per optimizer step."})
    num_train_epochs: float = field(
        default=3.0,
        metadata={
            "help": "Passes over the training data; with --source_labels an epoch has every example at least once."
        },
    )
    logging_steps: float = field(default=10, metadata={"help": "Optimizer steps between two log lines."})
    optim: str = field(default="adamw_torch_fused", metadata={"help": "Optimizer."})
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Let DDP look for parameters without gradient; a fusion uses them all."}
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={"help": "Let Trainer look at every micro-batch's loss; a fusion stops at one that is not finite."},
    )
    ddp_reduce: str = field(
        default="updates",
        metadata={
            "help": "What DDP ranks exchange: the gradient of the predicted updates, as large as the adapter (every "
            "rank then runs the hypernetworks' backward), or that of the hypernetworks' parameters.",
            "choices": ["updates", "parameters"],
        },
    )
    skip_nonfinite_steps: int = field(
        default=0,
        metadata={
            "help": "Optimizer steps to skip, at most, whose loss or gradient is not finite; one more ends the run. "
            "Above 0 every step waits for the device once."
        },
    )
    report_to: None | str | list[str] = field(  # noqa: RUF036  # the order HfArgumentParser understands
        default="none", metadata={"help": "Integrations to report to, such as tensorboard."}
    )

    def __post_init__(self) -> None:
        MethodConfig.__post_init__(self)
        self._check_training()
        with self._mixed_precision_taken_over():
            TrainingArguments.__post_init__(self)
        if self.base_in_bf16:
            set_zero_init_dtype(torch.bfloat16)
        avoid_reentrant(self, "reentrant checkpointing gives the hypernetworks no gradient")

    @contextlib.contextmanager
    def _mixed_precision_taken_over(self) -> Iterator[None]:
        """Keep bf16 from DeepSpeed and FSDP, which cast every parameter; the hypernetworks must stay float32.

        `base_in_bf16` says that the base is to be cast instead.
        """
        launched = any(os.environ.get(f"ACCELERATE_USE_{engine}") == "true" for engine in ("DEEPSPEED", "FSDP"))
        precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        self.base_in_bf16 = False
        if not (self.deepspeed or self.fsdp or launched):
            yield
            return
        if self.fp16 or precision == "fp16":
            raise UserError(
                "float16 mixed precision is not supported with DeepSpeed and FSDP; use --bf16 true, or "
                "--dtype float16 for the frozen base alone"
            )
        self.base_in_bf16 = bool(self.bf16) or precision == "bf16"
        self.bf16 = False
        os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
        try:
            yield
        finally:
            os.environ["ACCELERATE_MIXED_PRECISION"] = precision

    def _check_training(self) -> None:
        check_training(self)
        check_range("skip_nonfinite_steps", self.skip_nonfinite_steps, 0, False)
        for name in ("bf16_full_eval", "fp16_full_eval"):
            if getattr(self, name):
                raise UserError(f"--{name} would cast the hypernetworks, which must stay float32: leave it out")
        if self.neftune_noise_alpha is not None:
            raise UserError("--neftune_noise_alpha is set, but the base stays in eval mode in a fusion: leave it out")
        if self.torch_compile or self.torch_compile_backend or self.torch_compile_mode:
            raise UserError(
                "--torch_compile compiles the wrapper that all micro-batches of an accumulation window but the last "
                "pass by, so little would be gained for minutes of compiling: leave it out"
            )

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Warm-up steps: a share of the steps is rounded down, as in the published recipe (Trainer rounds up)."""
        if self.warmup_steps >= 1:
            return int(self.warmup_steps)
        return int(num_training_steps * self.warmup_steps)

    def training_dict(self) -> dict[str, Any]:
        """The settings of training that a fused adapter depends on, as plain values."""
        return training_settings(self) | {"bf16": self.bf16 or self.base_in_bf16}


def check_run_flags(args: TrainingArguments, data: DataArguments) -> None:
    """Refuse flags that would fail once the base model is loaded, or at the end of the run.

    Raises:
        ValueError: evaluation without data, an integration that is not there, or a name that the Hub cannot have.
    """
    if args.eval_strategy != "no" and not data.eval_dataset_name:
        strategy = IntervalStrategy(args.eval_strategy).value
        raise UserError(f"--eval_strategy is {strategy}, but --eval_dataset_name is not given; name one")
    try:  # Trainer would do so once the base is loaded
        for callback in get_reporting_integration_callbacks(args.report_to):
            callback()
    except (ValueError, RuntimeError) as error:
        names = ", ".join(cast("list[str]", args.report_to))  # a list once it is parsed
        raise UserError(f"--report_to is {names}: {error}") from error
    if args.push_to_hub:  # a name that the Hub cannot have would be refused once the adapter is trained
        try:
            validate_repo_id(args.hub_model_id or Path(str(args.output_dir)).resolve().name)
        except HFValidationError as error:
            raise UserError(str(error)) from error
