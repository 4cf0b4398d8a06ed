"""Presets: named sets of defaults for the flags of a fusion. A flag that is given stands."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from heterofusion.runtime.errors import UserError

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


def preset_of(name: str) -> Preset:
    """The preset of a name.

    Raises:
        ValueError: there is none; lists those that there are.
    """
    if name not in PRESETS:
        raise UserError(f"--preset is {name!r}; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
