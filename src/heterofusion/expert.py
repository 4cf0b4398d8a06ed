"""LoRA supervised fine-tuning of one expert: its flags, a LoRA that a fusion can read, what the run leaves behind.

Training itself is transformers' `Trainer`. What `load_adapter` would refuse (DoRA, biases, PiSSA, ...) has no flag.
"""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from huggingface_hub import ModelCard, ModelCardData
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.pytorch_utils import Conv1D

from heterofusion.adapter_config import AdapterError, read_adapter_config
from heterofusion.adapters import WEIGHTS_FILE, file_sha256
from heterofusion.architectures import module_key
from heterofusion.arguments import DataArguments, ModelArguments, OutputArguments
from heterofusion.checkpoints import last_good, mark_complete, missing_part
from heterofusion.config import avoid_reentrant, check_range, check_training, training_settings
from heterofusion.nonfinite import NonFiniteError
from heterofusion.provenance import CARD_FILE, EXPERT_FILE, display_name, library_versions

ALL_LINEAR = "all-linear"
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


@dataclass
class LoraArguments:
    """The LoRA of an expert, in the names of PEFT's `LoraConfig`."""

    r: int = field(default=16, metadata={"help": "Rank of the update."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the update, which is lora_alpha / r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout of the inputs of lora_A."})
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
    init_lora_weights: str = field(
        default="true",
        metadata={
            "help": "First lora_A: PEFT's default (true), or another that leaves the base as it is.",
            "choices": ["true", "gaussian", "orthogonal"],
        },
    )

    def __post_init__(self) -> None:
        check_range("r", self.r, 1, False)
        check_range("lora_alpha", self.lora_alpha, 1, False)
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"--lora_dropout is {self.lora_dropout}; it must be at least 0 and below 1")
        if self.target_modules and ALL_LINEAR in self.target_modules:
            if len(self.target_modules) > 1:
                raise ValueError(f"--target_modules names {ALL_LINEAR} and others; give it alone")
            if self.layers_to_transform is not None:
                raise ValueError(
                    f"--layers_to_transform cannot be used with --target_modules {ALL_LINEAR}; name the modules"
                )
        if any(index < 0 for index in self.layers_to_transform or ()):
            raise ValueError(f"--layers_to_transform is {self.layers_to_transform}; layers count from 0")


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
                raise ValueError(f"--{name} would cast the adapter before it is saved: leave it out")
        super().__post_init__()
        avoid_reentrant(self, "reentrant checkpointing gives LoRA on a frozen base no gradient")


EXPERT_ARGUMENTS = (ExpertModelArguments, LoraArguments, ExpertDataArguments, OutputArguments, ExpertConfig)


# ---- the LoRA ---------------------------------------------------------------------------------------------------


def plan_lora(skeleton: PreTrainedModel, lora: LoraArguments) -> tuple[LoraConfig, PeftModel]:
    """Choose the LoRA of an expert and try it out on a base without weights.

    Args:
        skeleton: the base on the meta device; it gets the LoRA.
        lora: the flags.

    Returns:
        PEFT's config for the real base, and the skeleton with LoRA.

    Raises:
        ValueError: the base has no such modules or layers, or the adapter could not be fused.
    """
    name = skeleton.config.name_or_path
    for saved in lora.modules_to_save or ():
        if not any(path == saved or path.endswith(f".{saved}") for path, _ in skeleton.named_modules()):
            raise ValueError(f"--modules_to_save: base model {name} has no module {saved}; name one that it has")
    init: Any = True if lora.init_lora_weights == "true" else lora.init_lora_weights
    targets = lora.target_modules or _projections(skeleton)
    layers = None if lora.layers_to_transform is None else sorted(set(lora.layers_to_transform))
    config = LoraConfig(
        task_type="CAUSAL_LM",
        bias="none",
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=ALL_LINEAR if targets == [ALL_LINEAR] else targets,
        layers_to_transform=layers,
        use_rslora=lora.use_rslora,
        modules_to_save=lora.modules_to_save,
        init_lora_weights=init,
    )
    try:
        with torch.device("meta"):
            model = get_peft_model(skeleton, config)
    except ValueError as error:
        raise ValueError(f"--target_modules {' '.join(targets)} with --r {lora.r}: PEFT refuses ({error})") from error
    layers_found = set()
    for path, module in model.get_base_model().named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if not isinstance(module.get_base_layer(), (nn.Linear, Conv1D)):
            kind = type(module.get_base_layer()).__name__
            raise ValueError(f"--target_modules: {path} is a {kind}; only LoRA of linear layers can be fused")
        try:
            key = module_key(path)
        except AdapterError as error:
            raise ValueError(f"--target_modules: an adapter of {path} could not be fused: {error}") from error
        layers_found |= set() if key is None else {key.layer}
    if not layers_found:
        raise ValueError(f"--target_modules {targets}: none lies in a decoder layer of base model {name}")
    if layers is not None and set(layers) != layers_found:
        missing = sorted(set(layers) - layers_found)
        raise ValueError(f"--layers_to_transform: base model {name} has no layers {missing} with {targets}")
    for target in targets if targets != [ALL_LINEAR] else ():
        if not any(path == target or path.endswith(f".{target}") for path in model.targeted_module_names):
            raise ValueError(f"--target_modules: base model {name} has no module {target}; name one that it has")
    return config, model


def _projections(skeleton: nn.Module) -> list[str]:
    """Names of the linear layers that do one of the seven roles, as far as a base has them."""
    names = set()
    for path, module in skeleton.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            try:
                key = module_key(path)
            except AdapterError:  # a layer of another kind, such as a router: it gets no LoRA
                continue
            if key is not None:
                names.add(path.rpartition(".")[2])
    if not names:
        raise ValueError("the base model has no linear layers of known roles; name some with --target_modules")
    return sorted(names)


def check_expert_checkpoint(folder: Path, config: LoraConfig) -> None:
    """Check that a checkpoint to resume from is complete and of the same LoRA; reads no weights.

    Raises:
        ValueError: files are missing or damaged, or a setting differs; names it.
    """
    lack = missing_part(folder)
    if lack is not None:
        raise ValueError(f"{folder} is not a complete checkpoint: {lack}; resume from another one")
    in_folders = any(path.is_dir() for path in folder.iterdir())  # where DeepSpeed and FSDP keep the optimizer
    if not (folder / "optimizer.pt").is_file() and not in_folders:
        raise ValueError(f"{folder} holds no optimizer (--save_only_model?); resume from another checkpoint")
    found, wanted = read_adapter_config(folder), config.to_dict()
    for name in ("r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "layers_to_transform",
                 "modules_to_save"):  # fmt: skip
        there, here = _plain(found.get(name)), _plain(wanted[name])
        if there != here:
            raise ValueError(
                f"{folder} was trained with another {name}: {there}, this run has {here}; resume with the same flags, "
                "or start in a new output_dir"
            )


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, (list, set)) else value


# ---- training ---------------------------------------------------------------------------------------------------


class ExpertCallback(TrainerCallback):
    """Stops at a loss that is not finite, and marks checkpoints as complete once all ranks have written theirs."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        loss = (logs or {}).get("loss", 0.0)
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"step {state.global_step}: the loss is not finite; {last_good(args.output_dir)}. Lower "
                "--learning_rate, clip with --max_grad_norm, or look at the data"
            )

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        ranks = PartialState()
        ranks.wait_for_everyone()
        if args.should_save:
            mark_complete(Path(args.output_dir) / f"checkpoint-{state.global_step}")
        ranks.wait_for_everyone()


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


# ---- the result -------------------------------------------------------------------------------------------------


def expert_record(
    base: str, lora: LoraConfig, args: TrainingArguments, steps: int, data: dict[str, Any], metrics: dict[str, Any]
) -> dict[str, Any]:
    """What `expert.json` records of a run: settings, data and metrics; local paths are cut to their names."""
    names = ("r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "layers_to_transform",
             "modules_to_save", "init_lora_weights")  # fmt: skip
    return {
        "base_model": display_name(base),
        "lora": {name: _plain(getattr(lora, name)) for name in names},
        "training": {**training_settings(args), "steps": steps, "processes": args.world_size, "data": data},
        "metrics": metrics,
        "versions": library_versions(),
    }


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write model card and `expert.json` beside a saved adapter; where the latter stands, the adapter is complete."""
    (folder / CARD_FILE).write_text(str(_card(record)), encoding="utf-8")
    record = {**record, "weights_sha256": file_sha256(folder / WEIGHTS_FILE)}
    text = json.dumps(record, indent=2, ensure_ascii=False, sort_keys=True) + "\n"
    (folder / EXPERT_FILE).write_text(text, encoding="utf-8")


def _card(record: dict[str, Any]) -> ModelCard:
    """A model card without what only the owner knows, such as a licence. It replaces PEFT's, which has local paths."""
    base, lora = record["base_model"], record["lora"]
    data = ModelCardData(
        base_model=base or None,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["lora", f"base_model:adapter:{base}"],
    )
    sets: Sequence[dict[str, Any]] = record["training"]["data"]["datasets"]
    rows = "\n".join(f"| {entry['name']} | {entry['kept']} |" for entry in sets)
    body = f"""
# LoRA expert

A LoRA adapter of rank {lora["r"]} for `{base}`, trained with the loss on the answers only.

| data set | examples |
|---|---|
{rows}

`{EXPERT_FILE}` holds all settings, seeds, metrics and library versions. No licence is stated here: it follows from
those of the base model and the data.
"""
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{body}")
