"""Flags of trainings as dataclasses, in TRL's manner: `HeteroFusionConfig` belongs to `HeteroFusionTrainer`.

Every range that can be checked without a file is checked here.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_utils import IntervalStrategy

from heterofusion.adapters.alignment import AdapterArguments
from heterofusion.data.labels import SourceLabelArguments
from heterofusion.data.replay import DataArguments
from heterofusion.method.config import BasisArguments, MethodConfig, preset_field
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.flags import describe_range, flag, in_range
from heterofusion.runtime.loading import ModelArguments
from heterofusion.runtime.ranks import set_zero_init_dtype


@dataclass
class OutputArguments:
    """What a training run does with an output_dir that is there."""

    overwrite: bool = flag(
        False, help="Write into an output_dir that is not empty; checkpoints and files of the same name go."
    )


@dataclass
class RunArguments(OutputArguments):
    """What a fusion run does besides training."""

    dry_run: bool = flag(False, help="Print the alignment plan and stop.")
    init_hypernetwork_from: str | None = flag(
        None,
        help="Start from another fusion's hypernetworks of the same sizes: a checkpoint-N folder, or an output_dir. "
        "Groups (role and rank) that it lacks start fresh.",
    )


# Ranges that `TrainingArguments` leaves open; a value outside would train nothing, or fail late.
_RANGES = {
    "learning_rate": "(0, inf)", "weight_decay": "[0, inf)", "max_grad_norm": "[0, inf)", "adam_epsilon": "[0, inf)",
    "adam_beta1": "[0, 1)", "adam_beta2": "[0, 1)", "per_device_train_batch_size": "[1, inf)",
    "per_device_eval_batch_size": "[1, inf)", "gradient_accumulation_steps": "[1, inf)",
    "dataloader_num_workers": "[0, inf)", "logging_steps": "[0, inf)", "save_steps": "[0, inf)",
    "eval_steps": "[0, inf)", "seed": "[0, 4294967295]", "data_seed": "[0, 4294967295]",
}  # fmt: skip


ALL_LINEAR, LORA_B = "all-linear", "lora_B"


@dataclass
class TrainingConfig(TrainingArguments):
    """Settings of training: AdamW, cosine, batch 8, on top of transformers' `TrainingArguments`."""

    lr_scheduler_type: str = flag("cosine", help="Learning rate schedule.")
    per_device_train_batch_size: int = flag(1, help="Examples per device and micro-batch.")
    gradient_accumulation_steps: int = flag(8, help="Micro-batches per optimizer step.")
    num_train_epochs: float = flag(
        3.0, help="Passes over the training data; with --source_labels an epoch has every example at least once."
    )
    logging_steps: float = flag(10, help="Optimizer steps between two log lines.")
    optim: str = flag("adamw_torch_fused", help="Optimizer.")
    ddp_find_unused_parameters: bool | None = flag(
        False, help="Let DDP look for parameters without gradient; here all are used."
    )
    logging_nan_inf_filter: bool = flag(False, help="Hide losses that are not finite; a run stops at one instead.")
    report_to: None | str | list[str] = field(  # noqa: RUF036  # the order HfArgumentParser understands
        default="none", metadata={"help": "Integrations to report to, such as tensorboard."}
    )

    def __post_init__(self) -> None:
        ranges = _RANGES | ({} if self.max_steps > 0 else {"num_train_epochs": "(0, inf)"})
        for name, interval in ranges.items():
            value = getattr(self, name)
            if value is not None and not in_range(value, interval):
                raise UserError(f"--{name} is {value}; it must be {describe_range(interval)}")
        for name in self._VALID_DICT_FIELDS:
            value = getattr(self, name)
            if isinstance(value, str) and value.startswith("{"):
                try:
                    json.loads(value)
                except ValueError as error:
                    raise UserError(f"--{name} is {value}, which is not JSON: {error}") from None
        for name in ("bf16_full_eval", "fp16_full_eval"):
            if getattr(self, name):
                raise UserError(f"--{name} would cast what is trained, which must stay float32: leave it out")
        super().__post_init__()
        if self.activation_checkpointing:
            kwargs = cast("dict[str, Any]", self.activation_checkpointing_kwargs or {})  # parsed by now
            if kwargs.get("use_reentrant"):
                raise UserError(
                    "activation_checkpointing_kwargs has use_reentrant=True, which gives what is trained behind a "
                    "frozen base no gradient; set it to false"
                )
            self.activation_checkpointing_kwargs = {**kwargs, "use_reentrant": False}

    def training_dict(self) -> dict[str, Any]:
        """The settings of training that its result depends on, as plain values."""
        names = (
            "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "seed",
            "data_seed", "max_steps", "num_train_epochs", "per_device_train_batch_size",
            "gradient_accumulation_steps", "bf16", "optim",
        )  # fmt: skip
        settings = self.to_dict()  # enums as plain values
        return {name: settings[name] for name in names}


@dataclass
class HeteroFusionConfig(MethodConfig, TrainingConfig):
    """`TrainingArguments` with the method's settings; the defaults are the paper's training recipe.

    AdamW (weight decay 0.01 on all parameters), learning rate 5e-5, cosine to 0 after `int(0.05 * steps)` warm-up
    steps, no gradient clipping, 3 epochs of batch 1 with accumulation 8. Presets differ in the first four.
    """

    learning_rate: float = preset_field("learning_rate", "Peak learning rate")
    warmup_steps: float = preset_field("warmup_steps", "Warm-up steps; below 1, the share of all steps, rounded down")
    weight_decay: float = preset_field("weight_decay", "Weight decay of all parameters, norms, biases and alphas too")
    max_grad_norm: float = preset_field("max_grad_norm", "Gradient norm to clip at; 0 does not clip")
    ddp_reduce: str = flag(
        "updates",
        help="What DDP ranks exchange: the gradient of the predicted updates, as large as the adapter (every "
        "rank then runs the hypernetworks' backward), or that of the hypernetworks' parameters.",
        choices=["updates", "parameters"],
    )

    def __post_init__(self) -> None:
        MethodConfig.__post_init__(self)
        if self.neftune_noise_alpha is not None:
            raise UserError("--neftune_noise_alpha is set, but the base stays in eval mode in a fusion: leave it out")
        if self.torch_compile or self.torch_compile_backend or self.torch_compile_mode:
            raise UserError("--torch_compile compiles a wrapper that most micro-batches pass by: leave it out")
        with self._mixed_precision_taken_over():
            TrainingConfig.__post_init__(self)
        if self.base_in_bf16:
            set_zero_init_dtype(torch.bfloat16)

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
            raise UserError("float16 mixed precision is not supported with DeepSpeed and FSDP; use --bf16 true")
        self.base_in_bf16 = bool(self.bf16) or precision == "bf16"
        self.bf16 = False
        os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
        try:
            yield
        finally:
            os.environ["ACCELERATE_MIXED_PRECISION"] = precision

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Warm-up steps: a share of the steps is rounded down, as in the published recipe (Trainer rounds up)."""
        return int(self.warmup_steps * (1 if self.warmup_steps >= 1 else num_training_steps))

    def training_dict(self) -> dict[str, Any]:
        """The settings of training that a fused adapter depends on, as plain values."""
        return super().training_dict() | {"bf16": self.bf16 or self.base_in_bf16}


FUSION_ARGUMENTS = (
    ModelArguments, AdapterArguments, DataArguments, SourceLabelArguments, RunArguments, HeteroFusionConfig
)  # fmt: skip


# ---- experts ----------------------------------------------------------------------------------------------------


@dataclass
class ExpertModelArguments(ModelArguments):
    """The base model of an expert and how it is loaded."""

    model_name_or_path: str = flag(help="Base model of the expert: local folder or Hub id.")
    trust_remote_code: bool = flag(False, help="Run model code from the Hub for the base.")


@dataclass
class ExpertDataArguments(DataArguments):
    """Flags for the training data, as those of the replay; but everything is used by default."""

    dataset_name: list[str] = flag(
        default_factory=list, help="Training data: local .json, .jsonl, .csv or .parquet files, folders, or Hub ids."
    )
    max_examples: list[int] = flag(
        default_factory=lambda: [0], help="Examples sampled from each training data set at most; 0 takes all."
    )
    eval_max_examples: list[int] = flag(
        default_factory=lambda: [0], help="Examples sampled from each evaluation data set at most; 0 takes all."
    )


_BESIDE_INIT = ("init_adapter", "init_revision", "train_only", "lora_dropout", "extra_rank", "extra_basis")


@dataclass
class LoraArguments(BasisArguments):
    """The LoRA of an expert, in the names of PEFT's `LoraConfig`."""

    r: int = flag(16, help="Rank of the update.", range="[1, inf)")
    lora_alpha: int = flag(32, help="Scale of the update, which is lora_alpha / r.", range="[1, inf)")
    lora_dropout: float | None = flag(
        None, help="Dropout of the inputs of lora_A; 0.05 by default, or that of --init_adapter.", range="[0, 1)"
    )
    target_modules: list[str] | None = flag(
        None, help="Modules that get LoRA, or all-linear; by default the base's attention and MLP projections."
    )
    layers_to_transform: list[int] | None = flag(
        None, help="Indices of the layers that get LoRA; all by default.", range="[0, inf)"
    )
    use_rslora: bool = flag(False, help="Scale by lora_alpha / sqrt(r) instead.")
    modules_to_save: list[str] | None = flag(
        None, help="Modules that are trained whole and saved with the adapter; a fusion keeps the target's."
    )
    init_adapter: str | None = flag(
        None, help="Adapter that is trained on, in place of a new one; it brings its rank, scaling and modules."
    )
    init_revision: str | None = flag(None, help="Hub revision of --init_adapter.")
    train_only: str | None = flag(
        None,
        help="Train these weights alone, as a fusion does: lora_A and modules_to_save stay as they are.",
        choices=[LORA_B],
    )
    init_lora_weights: str = flag(
        "true",
        help="First lora_A: PEFT's default (true), or another that leaves the base as it is.",
        choices=["true", "gaussian", "orthogonal"],
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        alone = self.target_modules == [ALL_LINEAR] and self.layers_to_transform is None
        if ALL_LINEAR in (self.target_modules or ()) and not alone:
            raise UserError(f"--target_modules {ALL_LINEAR} goes with no other name and no --layers_to_transform")
        if self.init_adapter is None:
            if self.init_revision is not None:
                raise UserError("--init_revision is of --init_adapter, which is not given")
            if self.extra_rank:
                raise UserError(f"--extra_rank is {self.extra_rank}, but no --init_adapter is given: use --r")
            return
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name not in _BESIDE_INIT and value != item.default:
                raise UserError(
                    f"--{item.name} is {value}, but --init_adapter brings its own: leave one of the two out"
                )


@dataclass
class ExpertConfig(TrainingConfig):
    """`TrainingArguments` with defaults for LoRA: AdamW without decay, learning rate 2e-4, cosine, batch 8."""

    learning_rate: float = flag(2e-4, help="Peak learning rate of the LoRA weights.")
    warmup_steps: float = flag(0.03, help="Warm-up steps; below 1, the share of all steps.")


EXPERT_ARGUMENTS = (
    ExpertModelArguments, LoraArguments, ExpertDataArguments, SourceLabelArguments, OutputArguments, ExpertConfig
)  # fmt: skip


def check_run_flags(args: TrainingArguments, data: DataArguments) -> None:
    """Refuse flags that would fail once the base model is loaded, or at the end of the run."""
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
