"""Flags of a fusion as dataclasses, in TRL's manner: `HeteroFusionConfig` belongs to `HeteroFusionTrainer`."""

import json
import math
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
    optim: str = field(default="adamw_torch", metadata={"help": "Optimizer."})
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
