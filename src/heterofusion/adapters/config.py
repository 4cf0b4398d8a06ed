"""What an `adapter_config.json` may say: an allowlist over PEFT's LoRA fields.

Adapter files come from strangers, and a LoRA variant read as plain LoRA is silently wrong. So every field is
known here as harmless, as refused, or as unknown, and an unknown field with a value is refused by name.
"""

import json
import logging
import re
import sys
from pathlib import Path
from typing import Any

from peft.utils.other import get_pattern_key

from heterofusion.runtime.errors import UserError
from heterofusion.runtime.files import read_json_object

logger = logging.getLogger(__name__)

CONFIG_FILE = "adapter_config.json"


class AdapterError(UserError):
    """An adapter that cannot be read as a plain LoRA adapter: names the file, what was found and what to do."""


# Fields whose value changes nothing in how stored A and B act on the base.
_NEUTRAL = {
    "auto_mapping", "ensure_weight_tying", "exclude_modules", "inference_mode", "megatron_core", "peft_type",
    "peft_version", "revision", "target_modules", "task_type",
    "eva_config",  # EVA only chooses the first A and the ranks; the ranks stand in rank_pattern
    "fan_in_fan_out",  # PEFT stores A as (r, in) and B as (out, r) for Conv1D too
    "lora_dropout",  # off during fusion
    "qalora_group_size",  # read by use_qalora only, which is refused
    "runtime_config",  # where PEFT computes; it is not even saved
}  # fmt: skip
# Fields that are read and checked below.
_READ = {
    "alpha_pattern", "base_model_name_or_path", "bias", "init_lora_weights", "layers_pattern", "layers_to_transform",
    "lora_alpha", "modules_to_save", "r", "rank_pattern", "use_rslora",
}  # fmt: skip
# Fields that, when set, make the adapter something else than W + scaling * B A; the text says how.
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
    "corda_config": "CorDA changes the base weights (null says that it was converted to plain LoRA)",
    "lora_ga_config": "LoRA-GA changes the base weights (null says that it was converted to plain LoRA)",
    "loftq_config": "LoftQ changes the base weights",
    "monteclora_config": "MonteCLoRA samples its weights",
    "velora_config": "VeLoRA replaces the projection of A",
    "megatron_config": "Megatron layers are sharded",
}
# PEFT reads an empty object in these as the variant with its defaults.
_ON_WHEN_EMPTY = {"use_bdlora", "arrow_config", "kasa_config", "monteclora_config", "velora_config"}
# Initializations that leave the base model as it was; the others subtract the first B A from it.
_BASE_PRESERVING_INITS = {"gaussian", "eva", "orthogonal", "mica"}


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The `adapter_config.json` of a plain LoRA adapter, as written, with `use_rslora` and both patterns present."""
    path = folder / CONFIG_FILE
    try:
        config = read_json_object(path)
    except UserError as error:
        raise AdapterError(str(error)) from None
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{path}: peft_type is {config.get('peft_type')!r}; only 'LORA' adapters can be fused")
    for key, reason in _REFUSED.items():
        if not _is_empty(config.get(key)) or (config.get(key) == {} and key in _ON_WHEN_EMPTY):
            raise AdapterError(
                f"{path}: {key} is set ({_short(config[key])}): {reason}; only plain LoRA is supported, "
                "re-train or convert the adapter without it"
            )
    for key in sorted(set(config) - _NEUTRAL - _READ - set(_REFUSED)):
        if not _is_empty(config[key]):
            raise AdapterError(
                f"{path}: unknown field {key!r} = {_short(config[key])} "
                f"(written by peft {config.get('peft_version', 'of unknown version')}); it may change what the "
                "weights mean, so the adapter is refused; remove the field only if you know that it does not"
            )
        logger.warning("%s: unknown field %r = %s is empty and ignored", path, key, _short(config[key]))
    if config.get("bias") not in (None, "none"):
        raise AdapterError(
            f"{path}: bias is {config['bias']!r}: trained biases cannot be fused; train the adapter with bias='none'"
        )
    if not keeps_base(config.get("init_lora_weights")):
        raise AdapterError(
            f"{path}: init_lora_weights is {_short(config['init_lora_weights'])}: it changes the base weights, so the "
            "stored B A is not the whole update; convert the adapter to plain LoRA (PEFT: "
            "path_initial_model_for_weight_conversion)"
        )
    for key, default in (("use_rslora", False), ("rank_pattern", {}), ("alpha_pattern", {})):
        if config.get(key) is None:
            config[key] = default
    _check_values(path, config)
    return config


def keeps_base(init: Any) -> bool:
    """Whether an `init_lora_weights` leaves the base model as it was."""
    return init is None or isinstance(init, bool) or (isinstance(init, str) and init.lower() in _BASE_PRESERVING_INITS)


def rank_and_scaling(config: dict[str, Any], module: str) -> tuple[int, float]:
    """Rank and scaling that a config gives the module of a path, by PEFT's pattern rules.

    The scaling is `lora_alpha / r`, or `lora_alpha / sqrt(r)` with rsLoRA (arXiv 2312.03732).
    """
    rank = config["rank_pattern"].get(get_pattern_key(list(config["rank_pattern"]), module), config["r"])
    alpha = config["alpha_pattern"].get(get_pattern_key(list(config["alpha_pattern"]), module), config["lora_alpha"])
    return rank, alpha / (rank**0.5 if config["use_rslora"] else rank)


def as_list(value: Any) -> list[Any]:
    """What PEFT takes one or several of: nothing is an empty list."""
    return value if isinstance(value, list) else [] if value is None else [value]


def _check_values(path: Path, config: dict[str, Any]) -> None:
    def expect(key: str, value: Any, good: bool, what: str) -> None:
        if not good:
            raise AdapterError(f"{path}: {key} is {_short(value)}, {what} was expected")

    def check_pattern(key: str, pattern: str) -> None:
        try:
            re.compile(rf"(.*\.)?({pattern})$")  # the form in which PEFT matches it
        except (re.error, OverflowError, RecursionError) as error:
            raise AdapterError(f"{path}: {key} has an invalid pattern {_short(pattern)}: {error}") from None

    for key, patterns, number in (("r", "rank_pattern", "integer"), ("lora_alpha", "alpha_pattern", "number")):
        kinds, what = (int,) if number == "integer" else (int, float), f"a positive {number}"
        expect(key, config.get(key), _is_positive(config.get(key), kinds), what)
        expect(patterns, config[patterns], isinstance(config[patterns], dict), "an object")
        for pattern, value in config[patterns].items():
            expect(f"{patterns}[{pattern!r}]", value, _is_positive(value, kinds), what)
            check_pattern(patterns, pattern)
    expect("use_rslora", config["use_rslora"], isinstance(config["use_rslora"], bool), "true or false")
    layers, names, saved = (config.get(key) for key in ("layers_to_transform", "layers_pattern", "modules_to_save"))
    good = all(isinstance(index, int) and not isinstance(index, bool) and index >= 0 for index in as_list(layers))
    expect("layers_to_transform", layers, good, "a layer index or a list of them")
    expect("layers_pattern", names, all(isinstance(name, str) for name in as_list(names)), "a name or a list of them")
    for name in as_list(names):
        check_pattern("layers_pattern", name)
    base = config.get("base_model_name_or_path")
    expect("base_model_name_or_path", base, base is None or isinstance(base, str), "a name or null")
    good = not isinstance(saved, str) and all(isinstance(name, str) for name in as_list(saved))
    expect("modules_to_save", saved, good, "a list of module names")


def _is_positive(value: Any, kinds: tuple[type, ...]) -> bool:
    number = isinstance(value, kinds) and not isinstance(value, bool)
    return number and 0 < value <= sys.float_info.max


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def _is_empty(value: Any) -> bool:
    """Null, false, or nothing; a number says something, 0 too."""
    return value is None or value is False or (isinstance(value, (str, list, dict)) and not value)
