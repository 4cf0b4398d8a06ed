"""TODO: say what this is."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any

from heterofusion.runtime.errors import UserError

FORMS = ("paper", "compact")


@dataclass(frozen=True)
class HypernetworkConfig:
    """Sizes of the hypernetworks.

    Attributes:
        form: `paper` or `compact`.
        block_size: rows per block, b.
        embed_dim: embedding width, e.
        num_heads: attention heads, h; divides e.
        max_position_embeddings: rows of the position table, the longest sequence of blocks.
        mu_gate: shift of the gate before clamping.
        row_features: k of the compact form.
        column_features: m of the compact form.
        residual_scale: factor of the free update that is trained beside the predicted one; 0 for none.
    """

    form: str = "paper"
    block_size: int = 4096
    embed_dim: int = 1024
    num_heads: int = 8
    max_position_embeddings: int = 4096
    mu_gate: float = 0.1
    row_features: int = 512
    column_features: int = 8
    residual_scale: float = 0.0

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise UserError(f"the form is {self.form!r}; choose one of {', '.join(FORMS)}")
        for name in ("block_size", "embed_dim", "num_heads", "max_position_embeddings"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.embed_dim % self.num_heads or self.embed_dim < 4:
            raise UserError(
                f"embed_dim {self.embed_dim} must be at least 4 and a multiple of num_heads {self.num_heads}"
            )
        if not math.isfinite(self.mu_gate):
            raise UserError(f"mu_gate is {self.mu_gate}; it must be finite")
        if not 0 <= self.residual_scale < math.inf:
            raise UserError(f"residual_scale is {self.residual_scale}; it must be at least 0 and finite")

    @classmethod
    def fitted(cls, form: str, width: int, **overrides: Any) -> "HypernetworkConfig":
        """Sizes of a form, fitted to a model.

        The paper's sizes belong to 4096-wide models and are what such a model gets. Others get the nearest power of
        two as block size (64 to 4096) and an embedding of a quarter of it (128 to 1024), so that a tiny model does
        not carry a 0.7 B hypernetwork.

        Args:
            form: `paper` or `compact`.
            width: hidden size of the target model.
            overrides: values that replace the form's; None keeps it.

        Raises:
            ValueError: unknown form, or values that do not go together.
        """
        given = {name: value for name, value in overrides.items() if value is not None}
        block_size = given.get("block_size", min(4096, max(64, 1 << round(math.log2(max(width, 1))))))
        if form == "compact":
            values = {"embed_dim": min(512, max(128, block_size // 8)), "max_position_embeddings": 1024}
        else:
            values = {"embed_dim": min(1024, max(128, block_size // 4)), "max_position_embeddings": 4096}
        values |= {"block_size": block_size, **given}
        values["row_features"] = max(1, min(block_size // 2, values["embed_dim"]))
        return cls(form=form, **values)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)


_PAPER = {
    "extra_rank": 0,
    "extra_basis": "random",
    "residual_scale": 0.0,
    "rdm_weight": 0.005,
    "learning_rate": 5e-5,
    "warmup_steps": 0.05,
    "weight_decay": 0.01,
    "max_grad_norm": 0.0,
}


@dataclass(frozen=True)
class Preset:
    """A preset.

    Attributes:
        form: of the hypernetworks, see `heterofusion.method.hypernet`.
        values: defaults of flags by name.
    """

    form: str
    values: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType(_PAPER))


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "paper": Preset("paper"),
        "compact": Preset("compact"),
        "recommended": Preset(
            "compact",
            MappingProxyType(
                {
                    "extra_rank": 40,
                    "extra_basis": "activations",
                    "residual_scale": 1.0,
                    "rdm_weight": 0.0,
                    "learning_rate": 2e-4,
                    "warmup_steps": 0.1,
                    "weight_decay": 0.0,
                    "max_grad_norm": 1.0,
                }
            ),
        ),
    }
)


DEFAULT_PRESET = "paper"


EXTRA_BASES = ("random", "activations")


EXTRA_RANK_HELP = (
    "Rank that every module gets beside the adapter's own: rows orthogonal to those of its lora_A, whose columns of "
    "lora_B start at 0. In a sequence every stage adds its own; 0 is the published method"
)


EXTRA_BASIS_HELP = (
    "Where the rows of --extra_rank lie: at random, or along the principal directions of the inputs that the module "
    "sees on the training data"
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


def check_range(flag: str, value: float | None, low: float, strict: bool) -> None:
    """Check that a number is finite and at least `low`, or above it if `strict`; None passes.

    Raises:
        ValueError: names the flag, its value and the range.
    """
    if value is not None and not (low < value < math.inf if strict else low <= value < math.inf):
        raise UserError(f"--{flag} is {value}; it must be {'above' if strict else 'at least'} {low:g} and finite")


def preset_of(name: str) -> Preset:
    """The preset of a name.

    Raises:
        ValueError: there is none; lists those that there are.
    """
    if name not in PRESETS:
        raise UserError(f"--preset is {name!r}; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
