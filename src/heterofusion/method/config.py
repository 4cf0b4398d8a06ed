"""Settings of the method: flags, the presets that fill them, and the sizes that they give hypernetworks."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from heterofusion.runtime.errors import UserError
from heterofusion.runtime.flags import check_ranges, flag

FORMS = ("paper", "compact")
DEFAULT_PRESET = "paper"
_PAPER = {
    "form": "paper", "extra_rank": 0, "extra_basis": "random", "residual_scale": 0.0, "rdm_weight": 0.005,
    "learning_rate": 5e-5, "warmup_steps": 0.05, "weight_decay": 0.01, "max_grad_norm": 0.0,
}  # fmt: skip
_RECOMMENDED = {
    "form": "compact", "extra_rank": 40, "extra_basis": "activations", "residual_scale": 1.0, "rdm_weight": 0.0,
    "learning_rate": 2e-4, "warmup_steps": 0.1, "weight_decay": 0.0, "max_grad_norm": 1.0,
}  # fmt: skip
# The form of the hypernetworks, and the values of flags that are not given.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": _PAPER,
    "compact": _PAPER | {"form": "compact"},
    "recommended": _RECOMMENDED,
}

_EXTRA_RANK_HELP = "Rows that every lora_A gets beside its own, with columns of lora_B that start at 0"
_EXTRA_BASIS_HELP = (
    "Where these rows lie: at random, or along the principal directions of the module's inputs on training data"
)
_EXTRA_RANK = {"range": "[0, inf)"}
_EXTRA_BASIS = {"choices": ["random", "activations"]}
_SIZE = {"range": "[1, inf)"}
_FINITE = {"range": "(-inf, inf)"}


def preset_field(name: str, help: str, **metadata: Any) -> Any:
    """A field that has its preset's value where it is not given: None until then, never afterwards."""
    values = {preset: each[name] for preset, each in PRESETS.items()}
    default = values[DEFAULT_PRESET]
    told = [str(default), *(f"{value} in `{preset}`" for preset, value in values.items() if value != default)]
    return field(default=None, metadata={"help": f"{help} ({'; '.join(told)}).", **metadata})


@dataclass
class BasisArguments:
    """Rows that are added to every lora_A of an adapter before it is trained: see `method.expansion`."""

    extra_rank: int = flag(0, help=f"{_EXTRA_RANK_HELP}.", **_EXTRA_RANK)
    extra_basis: str = flag("random", help=f"{_EXTRA_BASIS_HELP}.", **_EXTRA_BASIS)

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.extra_basis != "random" and self.extra_rank == 0:
            raise UserError(
                f"--extra_basis is {self.extra_basis}, but --extra_rank is 0, so no rows are added; give a rank"
            )


@dataclass
class MethodConfig(BasisArguments):
    """Settings of the method without training: from the preset, sizes fitted to the target, where not given."""

    preset: str = flag(
        DEFAULT_PRESET,
        help="Defaults of what is not given: the published method, the same with a compact hypernetwork, or "
        "compact with extra rank and a free update, made for source labels.",
        choices=list(PRESETS),
    )
    extra_rank: int = preset_field("extra_rank", _EXTRA_RANK_HELP, **_EXTRA_RANK)
    extra_basis: str = preset_field("extra_basis", _EXTRA_BASIS_HELP, **_EXTRA_BASIS)
    residual_scale: float = preset_field(
        "residual_scale",
        "Scale of a free update trained beside the predicted one, which Adam moves by the rate times this scale",
        range="[0, inf)",
    )
    block_size: int | None = flag(
        None, help="Rows per block of A^T and B; 4096 for a 4096-wide model, fitted below that.", **_SIZE
    )
    embed_dim: int | None = flag(
        None, help="Embedding width of the hypernetwork; 1024 in `paper` on a 4096-wide model.", **_SIZE
    )
    num_heads: int | None = flag(None, help="Attention heads of the hypernetwork (8).", **_SIZE)
    max_position_embeddings: int | None = flag(
        None, help="Longest sequence of blocks, sources concatenated (4096; 1024 in `compact`).", **_SIZE
    )
    alpha_init: float = flag(0.3, help="First value of every alpha, the scale of an update.", **_FINITE)
    mu_gate: float = flag(0.1, help="Shift of the gate before it is clamped to [0, 1].", **_FINITE)
    rdm_weight: float = preset_field(
        "rdm_weight", "Weight (lambda) of rectified distribution matching in the loss", range="[0, inf)"
    )
    rdm_mu: float = flag(0.0, help="Mean of RDM's Gaussian before rectification.", **_FINITE)
    rdm_sigma: float = flag(1.0, help="Standard deviation of RDM's Gaussian.", range="[0, inf)")
    rdm_projections: int = flag(2048, help="Random projections of RDM.", **_SIZE)
    layer_alignment: str = flag(
        "tail",
        help="Map between models of different depth: the last layers meet, or depth is scaled.",
        choices=["tail", "proportional"],
    )
    transfer_ratio: str = flag("1", help="Share of each source's layer pairs that is used, from the last: 0.5 or 1/2.")
    canonicalize: bool = flag(False, help="Read every (A, B) in its canonical form sqrt(S) V^T, U sqrt(S).")

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.extra_rank == 0 and self.extra_basis is None:
            self.extra_basis = "random"  # there are no rows to lie anywhere
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name, value) is None:
                setattr(self, name, value)
        super().__post_init__()
        if self.alpha_init == 0:
            raise UserError("--alpha_init is 0; the hypernetwork would never get a gradient")

    @property
    def form(self) -> str:
        """The form of the hypernetworks."""
        return PRESETS[self.preset]["form"]

    def check_same(self, other: "MethodConfig") -> None:
        """Refuse other settings of the method than these, which a model was built with."""
        wanted = other.method_dict()
        for name, value in self.method_dict().items():
            if value != wanted[name]:
                raise UserError(f"{name} is {value} in the model and {wanted[name]} in args; build it with the same")

    def method_dict(self) -> dict[str, Any]:
        """The method's settings as plain values, without those of training."""
        return {name: getattr(self, name) for name in MethodConfig.__dataclass_fields__}


@dataclass(frozen=True)
class HypernetworkConfig:
    """Sizes of the hypernetworks; the forms are told apart in `method.hypernet`."""

    form: str = field(default="paper", metadata={"choices": FORMS})
    block_size: int = 4096  # b
    embed_dim: int = 1024  # e
    num_heads: int = 8  # divides e
    max_position_embeddings: int = 4096  # the longest sequence of blocks
    mu_gate: float = 0.1
    row_features: int = 512  # k of the compact form
    column_features: int = 8  # m of the compact form
    residual_scale: float = 0.0  # of the free update beside the predicted one; 0 for none

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.embed_dim % self.num_heads or self.embed_dim < 4:
            raise UserError(
                f"embed_dim {self.embed_dim} must be at least 4 and a multiple of num_heads {self.num_heads}"
            )

    @classmethod
    def fitted(cls, form: str, width: int, method: MethodConfig | None = None) -> "HypernetworkConfig":
        """Sizes of a form for a target of some hidden size; what `method` gives stands.

        The paper's sizes belong to 4096-wide models. Others get the nearest power of two as block size (64 to 4096)
        and an embedding of a quarter of it (128 to 1024): a tiny model carries no 0.7 B hypernetwork.
        """
        names = ("block_size", "embed_dim", "num_heads", "max_position_embeddings", "mu_gate", "residual_scale")
        given = {name: value for name in names if (value := getattr(method, name, None)) is not None}
        block_size = given.get("block_size", min(4096, max(64, 1 << round(math.log2(width)))))
        if form == "compact":
            values = {"embed_dim": min(512, max(128, block_size // 8)), "max_position_embeddings": 1024}
        else:
            values = {"embed_dim": min(1024, max(128, block_size // 4)), "max_position_embeddings": 4096}
        values |= {"block_size": block_size, **given}
        return cls(form=form, row_features=max(1, min(block_size // 2, values["embed_dim"])), **values)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
