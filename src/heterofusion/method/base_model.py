"""What a fusion needs of the base model: no dropout, no reentrant checkpointing, frozen weights in its dtype."""

import logging
from typing import Any

import torch
from torch import nn

from heterofusion.runtime.errors import UserError

logger = logging.getLogger(__name__)


def refuse_reentrant_checkpointing(model: nn.Module) -> None:
    """Refuse reentrant activation checkpointing, which would give the hypernetworks no gradient."""
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if getattr(module, "gradient_checkpointing", False) and getattr(function, "keywords", {}).get("use_reentrant"):
            raise UserError(
                "the base model has reentrant activation checkpointing enabled, which gives the hypernetworks no "
                "gradient; enable it with use_reentrant=False"
            )


def disable_dropout_config(model: nn.Module) -> list[tuple[Any, str, float]]:
    """Set the dropout rates to 0 that code reads from the config; gives (config, name, rate) of each."""
    changed = []
    config = getattr(model, "config", None)
    for part in filter(None, (config, getattr(config, "text_config", None))):
        for name, value in list(vars(part).items()):
            if ("dropout" in name or "pdrop" in name) and isinstance(value, float) and value > 0:
                logger.info("dropout: %s = %s is off during fusion", name, value)
                changed.append((part, name, value))
                setattr(part, name, 0.0)
    return changed


def cast_base(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the frozen weights of a base model; LoRA weights and what is trained keep their dtype.

    What ZeRO-3 has partitioned already keeps it too: it was loaded in the dtype that it is held in.
    """
    for name, parameter in model.named_parameters():
        frozen = not parameter.requires_grad and "lora_" not in name and not hasattr(parameter, "ds_id")
        if frozen and parameter.dtype == torch.float32:
            parameter.data = parameter.data.to(dtype)
