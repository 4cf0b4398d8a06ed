"""What an `adapter_config.json` may say: an allowlist over PEFT's LoRA fields.

Adapter files come from strangers, and a LoRA variant read as plain LoRA is silently wrong. So every field is
known here as harmless, as refused, or as unknown, and an unknown field with a value is refused by name.
"""

import json
import logging
import re
from pathlib import Path
from typing import Any

from peft.utils.other import get_pattern_key

logger = logging.getLogger(__name__)

CONFIG_FILE = "adapter_config.json"


class AdapterError(ValueError):
    """An adapter that cannot be read as a plain LoRA adapter: names the file, what was found and what to do."""


# Fields whose value changes nothing in how stored A and B act on the base.
_NEUTRAL = {
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "eva_config",  # EVA only chooses the first A and the ranks; the ranks stand in rank_pattern
    "exclude_modules",
    "fan_in_fan_out",  # PEFT stores A as (r, in) and B as (out, r) for Conv1D too
    "inference_mode",
    "layers_pattern",
    "lora_dropout",  # off during fusion
    "megatron_core",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "qalora_group_size",  # read by use_qalora only, which is refused
    "revision",
    "target_modules",
    "task_type",
}
# Fields that are read and checked below.
_READ = {
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
    "bias",
    "init_lora_weights",
}
# Fields that, when set, make the adapter something else than W + scaling * B A. The text completes "<field> is set: ...".
_REFUSED = {
    "use_dora": "DoRA rescales the merged weight by a magnitude vector",
    "lora_bias": "a bias in lora_B is not part of the low-rank update",
    "target_parameters": "updates of bare parameters have no module to align",
    "layer_replication": "replicated layers break the layer map",
    "trainable_token_indices": "trained tokens are not a low-rank update of a linear layer",
    "alora_invocation_tokens": "aLoRA acts on part of the tokens only",
    "use_qalora": "QALoRA pools the inputs of A",
    "use_bdlora": "BD-LoRA has block-diagonal factors",
    "arrow_config": "Arrow routes between adapters at run time",
    "kasa_config": "KaSA changes the base weights",
    "corda_config": "CorDA changes the base weights",
    "lora_ga_config": "LoRA-GA changes the base weights",
    "loftq_config": "LoftQ changes the base weights",
    "monteclora_config": "MonteCLoRA samples its weights",
    "velora_config": "VeLoRA replaces the projection of A",
    "megatron_config": "Megatron layers are sharded",
}
# Initializations that leave the base model as it was; the others subtract the first B A from it.
_BASE_PRESERVING_INITS = {"gaussian", "eva", "orthogonal", "mica"}


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds one object.

    Raises:
        AdapterError: the file is missing, unreadable, not JSON, or not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError(f"{path} is missing; a PEFT adapter folder holds it beside its weights") from None
    except json.JSONDecodeError as error:
        raise AdapterError(
            f"{path} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}; download the file again"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise AdapterError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise AdapterError(f"{path} holds {type(content).__name__}, a JSON object was expected")
    return content


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Read and validate `adapter_config.json` of a PEFT LoRA adapter.

    Args:
        folder: the adapter's folder.

    Returns:
        The config as written, with `r`, `lora_alpha`, `use_rslora`, `rank_pattern` and `alpha_pattern` present.

    Raises:
        AdapterError: a field is missing, of the wrong type, or says that this is not a plain LoRA adapter.
    """
    path = folder / CONFIG_FILE
    config = read_json_object(path)
    peft_type = config.get("peft_type")
    if peft_type != "LORA":
        raise AdapterError(f"{path}: peft_type is {peft_type!r}; only 'LORA' adapters can be fused")
    for key, reason in _REFUSED.items():
        if config.get(key):
            raise AdapterError(
                f"{path}: {key} is set ({_short(config[key])}): {reason}; only plain LoRA is supported, "
                "re-train or convert the adapter without it"
            )
    _check_unknown_keys(path, config)
    if config.get("bias", "none") != "none":
        raise AdapterError(
            f"{path}: bias is {config['bias']!r}: trained biases cannot be fused; train the adapter with bias='none'"
        )
    _check_init(path, config.get("init_lora_weights", True))
    _check_numbers(path, config)
    return config


def rank_and_scaling(config: dict[str, Any], module: str) -> tuple[int, float]:
    """Rank and scaling that the config gives one module (PEFT's pattern rules).

    Args:
        config: a config from `read_adapter_config`.
        module: path of the module in the base model, such as `model.layers.3.self_attn.q_proj`.

    Returns:
        `(r, lora_alpha / r)`, or `(r, lora_alpha / sqrt(r))` with rsLoRA (arXiv 2312.03732).
    """
    rank = config["rank_pattern"].get(get_pattern_key(list(config["rank_pattern"]), module), config["r"])
    alpha = config["alpha_pattern"].get(get_pattern_key(list(config["alpha_pattern"]), module), config["lora_alpha"])
    return rank, alpha / (rank**0.5 if config["use_rslora"] else rank)


def _check_unknown_keys(path: Path, config: dict[str, Any]) -> None:
    for key in sorted(set(config) - _NEUTRAL - _READ - set(_REFUSED)):
        if config[key]:
            raise AdapterError(
                f"{path}: unknown field {key!r} = {_short(config[key])} "
                f"(written by peft {config.get('peft_version', 'of unknown version')}); it may change what the weights "
                "mean, so the adapter is refused; remove the field only if you know that it does not"
            )
        logger.warning("%s: unknown field %r = %s is empty and ignored", path, key, _short(config[key]))


def _check_init(path: Path, init: Any) -> None:
    if not isinstance(init, bool) and init not in _BASE_PRESERVING_INITS:
        raise AdapterError(
            f"{path}: init_lora_weights is {_short(init)}: it changes the base weights, so the stored B A is not the "
            "whole update; convert the adapter to plain LoRA (PEFT: path_initial_model_for_weight_conversion)"
        )


def _check_numbers(path: Path, config: dict[str, Any]) -> None:
    for key, default in (("use_rslora", False), ("rank_pattern", {}), ("alpha_pattern", {})):
        if config.get(key) is None:
            config[key] = default
    for key in ("r", "lora_alpha"):
        _check_positive(path, key, config.get(key), integer=key == "r")
    if not isinstance(config["use_rslora"], bool):
        raise AdapterError(f"{path}: use_rslora is {_short(config['use_rslora'])}, true or false was expected")
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config[key], dict):
            raise AdapterError(f"{path}: {key} is {_short(config[key])}, an object was expected")
        for pattern, value in config[key].items():
            _check_positive(path, f"{key}[{pattern!r}]", value, integer=key == "rank_pattern")
            try:
                re.compile(pattern)
            except re.error as error:
                raise AdapterError(f"{path}: {key} has an invalid pattern {pattern!r}: {error}") from None
    layers = config.get("layers_to_transform")
    if layers is not None and not isinstance(layers, int):
        if not isinstance(layers, list) or not all(isinstance(layer, int) for layer in layers):
            raise AdapterError(
                f"{path}: layers_to_transform is {_short(layers)}, a list of layer indices was expected"
            )


def _check_positive(path: Path, key: str, value: Any, integer: bool) -> None:
    kinds: tuple[type, ...] = (int,) if integer else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < float("inf"):
        raise AdapterError(
            f"{path}: {key} is {_short(value)}, a positive {'integer' if integer else 'number'} was expected"
        )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
