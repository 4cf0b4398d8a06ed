"""Flags of a fusion as dataclasses, in TRL's manner: `HeteroFusionConfig` belongs to `HeteroFusionTrainer`.

Every range that can be checked without a file is checked here.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from transformers import TrainingArguments

from heterofusion.method.presets import PRESETS, preset_of
from heterofusion.runtime.errors import UserError
from heterofusion.training.engines import set_zero_init_dtype

DEFAULT_PRESET = "paper"
EXTRA_BASES = ("random", "activations")


def check_range(flag: str, value: float | None, low: float, strict: bool) -> None:
    """Check that a number is finite and at least `low`, or above it if `strict`; None passes.

    Raises:
        ValueError: names the flag, its value and the range.
    """
    if value is not None and not (low < value < math.inf if strict else low <= value < math.inf):
        raise UserError(f"--{flag} is {value}; it must be {'above' if strict else 'at least'} {low:g} and finite")


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


EXTRA_RANK_HELP = (
    "Rank that every module gets beside the adapter's own: rows orthogonal to those of its lora_A, whose columns of "
    "lora_B start at 0. In a sequence every stage adds its own; 0 is the published method"
)
EXTRA_BASIS_HELP = (
    "Where the rows of --extra_rank lie: at random, or along the principal directions of the inputs that the module "
    "sees on the training data"
)


@dataclass
class BasisArguments:
    """Rows that `basis.py` adds to every lora_A of an adapter before it is trained."""

    extra_rank: int = field(default=0, metadata={"help": f"{EXTRA_RANK_HELP}."})
    extra_basis: str = field(default="random", metadata={"help": f"{EXTRA_BASIS_HELP}.", "choices": list(EXTRA_BASES)})

    def check_basis(self) -> None:
        """Check the settings.

        Raises:
            ValueError: names the flag, its value and the remedy.
        """
        if isinstance(self.extra_rank, bool) or not isinstance(self.extra_rank, int) or self.extra_rank < 0:
            raise UserError(f"--extra_rank is {self.extra_rank}; it must be an integer of at least 0")
        if self.extra_basis not in EXTRA_BASES:
            raise UserError(f"--extra_basis is {self.extra_basis!r}; choose one of {', '.join(EXTRA_BASES)}")
        if self.extra_basis != EXTRA_BASES[0] and self.extra_rank == 0:
            raise UserError(
                f"--extra_basis is {self.extra_basis}, but --extra_rank is 0, so no rows are added; give a rank, or "
                "leave --extra_basis out"
            )


def _of_preset(name: str, help: str, **metadata: Any) -> Any:
    """A field that has the preset's value where it is not given: None until then, never afterwards.

    Args:
        name: of the field.
        help: of the flag; what the presets say is added.
        **metadata: of the field.
    """
    values = {preset: each.values[name] for preset, each in PRESETS.items()}
    default = values[DEFAULT_PRESET]
    told = [str(default), *(f"{value} in `{preset}`" for preset, value in values.items() if value != default)]
    return field(default=None, metadata={"help": f"{help} ({'; '.join(told)}).", **metadata})


@dataclass
class MethodConfig(BasisArguments):
    """Settings of the method itself, without those of training.

    What is not given comes from the preset; sizes are fitted to the width of the target model.
    """

    preset: str = field(
        default=DEFAULT_PRESET,
        metadata={
            "help": "Defaults of the flags that are not given: the published method, the same with a compact "
            "hypernetwork, or recommended: compact, with extra rank and a free update, made for source labels.",
            "choices": list(PRESETS),
        },
    )
    extra_rank: int = _of_preset("extra_rank", EXTRA_RANK_HELP)
    extra_basis: str = _of_preset("extra_basis", EXTRA_BASIS_HELP, choices=list(EXTRA_BASES))
    residual_scale: float = _of_preset(
        "residual_scale",
        "Scale of a free update that is trained beside the predicted one. Under Adam it moves by the learning rate "
        "times this scale; 0 leaves it out",
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
    rdm_weight: float = _of_preset("rdm_weight", "Weight (lambda) of rectified distribution matching in the loss")
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

    def __post_init__(self) -> None:
        self.fill_preset()

    @property
    def form(self) -> str:
        """The form of the hypernetworks."""
        return preset_of(self.preset).form

    def fill_preset(self) -> None:
        """Give everything that was not given its preset's value.

        Raises:
            ValueError: there is no such preset.
        """
        if self.extra_rank == 0 and self.extra_basis is None:
            self.extra_basis = EXTRA_BASES[0]  # there are no rows to lie anywhere
        for name, value in preset_of(self.preset).values.items():
            if getattr(self, name, value) is None:
                setattr(self, name, value)

    def check_method(self) -> None:
        """Check the ranges of the settings.

        Raises:
            ValueError: names the flag, its value and the range.
        """
        for name, low, strict in (
            ("rdm_weight", 0.0, False),
            ("residual_scale", 0.0, False),
            ("rdm_sigma", 0.0, False),
            ("rdm_projections", 0, True),
            ("block_size", 0, True),
            ("embed_dim", 0, True),
            ("num_heads", 0, True),
            ("max_position_embeddings", 0, True),
        ):
            check_range(name, getattr(self, name), low, strict)
        self.check_basis()
        for name in ("alpha_init", "mu_gate", "rdm_mu"):
            if not math.isfinite(getattr(self, name)):
                raise UserError(f"--{name} is {getattr(self, name)}; it must be finite")
        if self.alpha_init == 0:
            raise UserError("--alpha_init is 0; the hypernetwork would never get a gradient")

    def check_same(self, other: "MethodConfig") -> None:
        """Refuse other settings of the method than these, which a model was built with.

        Raises:
            ValueError: names the first one that differs.
        """
        wanted = other.method_dict()
        for name, value in self.method_dict().items():
            if value != wanted[name]:
                raise UserError(
                    f"{name} is {value} in the model and {wanted[name]} in args; build the model with the same "
                    "HeteroFusionConfig"
                )

    def hypernetwork_overrides(self) -> dict[str, Any]:
        """Arguments of `HypernetworkConfig.fitted` that these settings give."""
        names = ("block_size", "embed_dim", "num_heads", "max_position_embeddings", "mu_gate", "residual_scale")
        return {name: getattr(self, name) for name in names}

    def method_dict(self) -> dict[str, Any]:
        """The method's settings as plain values, without those of training."""
        return {name: getattr(self, name) for name in MethodConfig.__dataclass_fields__}


@dataclass
class HeteroFusionConfig(MethodConfig, TrainingArguments):
    """`TrainingArguments` with the method's settings; the defaults are the paper's training recipe.

    AdamW (weight decay 0.01 on all parameters), learning rate 5e-5, cosine to 0 after `int(0.05 * steps)` warm-up
    steps, no gradient clipping, 3 epochs of batch 1 with accumulation 8. Presets differ in the first four.
    """

    learning_rate: float = _of_preset("learning_rate", "Peak learning rate")
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    warmup_steps: float = _of_preset("warmup_steps", "Warm-up steps; below 1, the share of all steps, rounded down")
    weight_decay: float = _of_preset("weight_decay", "Weight decay of all parameters, norms, biases and alphas too")
    max_grad_norm: float = _of_preset("max_grad_norm", "Gradient norm to clip at; 0 does not clip")
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
        self.fill_preset()
        self.check_method()
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
