"""What the target's base model must be for a fusion: it fits the adapter, drops nothing out, can be checkpointed."""

import logging
from typing import Any

import torch
from torch import nn
from transformers import (
    PretrainedConfig,
)

from heterofusion.adapters.lora import PREFIX, AdapterError, LoraAdapter
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.loading import ModelArguments, base_skeleton

logger = logging.getLogger(__name__)


def check_base_fits(model: nn.Module, adapter: LoraAdapter) -> None:
    """Check that every LoRA module of an adapter exists in a base model with the right shape (meta device will do).

    Raises:
        AdapterError: names the first module that does not fit.
    """
    name = getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__
    for path, module in adapter.modules.items():
        try:
            layer = model.get_submodule(path)
        except AttributeError:
            raise AdapterError(
                f"base model {name} has no module {path}, which adapter {adapter.folder} changes; "
                f"give the base it was trained on ({adapter.base_model or 'not named in its config'})"
            ) from None
        shape = _layer_shape(layer)
        if shape is not None and shape != (module.in_features, module.out_features):
            raise AdapterError(
                f"base model {name}: {path} maps {shape[0]} to {shape[1]} features, but adapter "
                f"{adapter.folder} has {module.in_features} to {module.out_features}; "
                f"give the base it was trained on ({adapter.base_model or 'not named in its config'})"
            )
    for key, tensor in adapter.extra_tensors.items():
        path = key.removeprefix(PREFIX)
        try:
            parameter = model.get_parameter(path)
        except AttributeError:
            continue  # PEFT says what it cannot place
        if hasattr(parameter, "ds_id"):
            raise AdapterError(
                f"adapter {adapter.folder} holds {path}, which cannot be loaded into a base that ZeRO-3 has "
                "partitioned; use FSDP2, ZeRO-2 or DDP"
            )
        expected = parameter.shape
        if expected != tensor.shape:
            raise AdapterError(
                f"base model {name}: {path} is {tuple(expected)}, but adapter {adapter.folder} holds "
                f"{tuple(tensor.shape)}; tokens were added when it was trained: give a base that was resized alike "
                "(resize_token_embeddings, then save_pretrained)"
            )


def _layer_shape(layer: nn.Module) -> tuple[int, int] | None:
    nx, nf = getattr(layer, "nx", None), getattr(layer, "nf", None)  # Conv1D of GPT-2
    if isinstance(nx, int) and isinstance(nf, int):
        return nx, nf
    inputs, outputs = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
    return (inputs, outputs) if isinstance(inputs, int) and isinstance(outputs, int) else None


def refuse_reentrant_checkpointing(model: nn.Module) -> None:
    """Refuse a model whose reentrant activation checkpointing would give the hypernetworks no gradient.

    Raises:
        ValueError: it is enabled on some layer.
    """
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if getattr(module, "gradient_checkpointing", False) and getattr(function, "keywords", {}).get("use_reentrant"):
            raise UserError(
                "the base model has reentrant activation checkpointing enabled, which gives the hypernetworks no "
                "gradient; enable it with use_reentrant=False"
            )


def disable_dropout_config(model: nn.Module) -> list[tuple[Any, str, float]]:
    """Set the dropout rates to 0 that a model's code reads from its config (Falcon's residuals, say).

    Returns:
        (config, name, rate) of each, to set them back.
    """
    changed = []
    config = getattr(model, "config", None)
    for part in (config, getattr(config, "text_config", None)):
        for name, value in list(vars(part).items()) if part is not None else ():
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


def check_base(model: ModelArguments, target: LoraAdapter, trust_remote_code: bool = False) -> PretrainedConfig:
    """Check on the meta device, before any weight is loaded, that the base model has the adapter's modules.

    Returns:
        The base model's config.

    Raises:
        AdapterError: the config cannot be read or a module does not fit.
        ValueError: the config is of no causal language model, or quantization is not possible.
    """
    skeleton = base_skeleton(model, trust_remote_code)
    check_base_fits(skeleton, target)
    return skeleton.config
