"""Sizes of the hypernetworks; the forms are told apart in `heterofusion.method.hypernet`."""

import math
from dataclasses import asdict, dataclass
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
