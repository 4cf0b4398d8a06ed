"""Roles of linear layers per architecture, and how fused projections split into them.

A role is one of seven jobs that every decoder layer has, whatever its names are: q, k, v, o, gate, up, down.
A fused projection (Phi-3's `qkv_proj`, GPT-NeoX's `query_key_value`, ...) does several at once; its rows of
`lora_B` are divided among the roles while `lora_A` is common to them. Row layouts are those of the transformers
implementations of the architectures named here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from heterofusion.adapters.lora import LAYER_PATTERN, AdapterError, LoraAdapter
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.loading import load_base_config

ROLES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# (parent, leaf) of modules that do one role under another name. Two-layer MLPs have an up and a down projection.
_RENAMED = {
    ("attention", "dense"): "o_proj",  # GPT-NeoX
    ("self_attention", "dense"): "o_proj",  # Falcon
    ("mlp", "dense_h_to_4h"): "up_proj",
    ("mlp", "dense_4h_to_h"): "down_proj",
    ("attn", "c_proj"): "o_proj",  # GPT-2
    ("mlp", "c_fc"): "up_proj",
    ("mlp", "c_proj"): "down_proj",
}
_QKV = ("q_proj", "k_proj", "v_proj")
# (parent, leaf) of fused modules: their roles and the model types whose row layout is known.
_FUSED: dict[tuple[str, str], tuple[tuple[str, ...], tuple[str, ...]]] = {
    ("self_attn", "qkv_proj"): (_QKV, ("phi3",)),
    ("mlp", "gate_up_proj"): (("gate_proj", "up_proj"), ("phi3",)),
    ("attention", "query_key_value"): (_QKV, ("gpt_neox",)),
    ("self_attention", "query_key_value"): (_QKV, ("falcon",)),
    ("attn", "c_attn"): (_QKV, ("gpt2",)),
}
# Towers beside the language model: their layers are counted apart and never aligned.
_OTHER_TOWERS = ("vision", "visual", "audio", "multi_modal_projector", "image")


@dataclass(frozen=True)
class ModuleKey:
    """Where a module stands: layer index, roles it does (several: a fused projection), and path inside the layer."""

    layer: int
    roles: tuple[str, ...]
    suffix: str  # such as `self_attn.q_proj`

    @property
    def is_fused(self) -> bool:
        return len(self.roles) > 1


def module_key(path: str) -> ModuleKey | None:
    """Key of a module from its path, or None if it lies outside the language model's layers."""
    match = LAYER_PATTERN.search(path)
    if match is None or any(tower in path[: match.start()] for tower in _OTHER_TOWERS):
        return None
    suffix = path[match.end() :]
    place = _place(suffix)
    if place[1] in ROLES:
        roles: tuple[str, ...] = (place[1],)
    elif place in _RENAMED:
        roles = (_RENAMED[place],)
    elif place in _FUSED:
        roles = _FUSED[place][0]
    else:
        known = sorted({*ROLES, *(".".join(key) for key in (*_RENAMED, *_FUSED))})
        raise AdapterError(
            f"module {path} has no known role ({suffix!r}); known are {', '.join(known)}. Train the adapter on those, "
            "or extend the table in heterofusion/adapters/architectures.py"
        )
    return ModuleKey(int(match.group(1)), roles, suffix)


def module_keys(adapter: LoraAdapter) -> dict[str, ModuleKey | None]:
    """Key of every module of an adapter, by path."""
    try:
        return {path: module_key(path) for path in adapter.modules}
    except AdapterError as error:
        raise AdapterError(f"{adapter.weights_file}: {error}") from None


def base_config(
    adapter: LoraAdapter,
    what: str,
    name: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PretrainedConfig | None:
    """Config of the base of an adapter that has fused projections, whose split needs it; None for others.

    The base is the one that is given, else the `base_model_name_or_path` of the adapter.
    """
    base = name or adapter.base_model
    if not base or not any(key is not None and key.is_fused for key in module_keys(adapter).values()):
        return None
    return load_base_config(base, what, trust_remote_code, revision=revision if name else None)


def read_source_configs(names: Sequence[str] | None, sources: Sequence[LoraAdapter]) -> list[PretrainedConfig | None]:
    """Base configs of sources that have fused projections, None for others; code that comes with one is never run.

    Names are a folder, config.json or Hub id per source, or `none`, which follows `base_model_name_or_path`.
    """
    names = names or ["none"] * len(sources)
    if len(names) != len(sources):
        raise UserError(
            f"--source_configs has {len(names)} entries for {len(sources)} sources; give one per source, 'none' where "
            "a source needs none"
        )
    configs = []
    for name, source in zip(names, sources, strict=True):
        path, what = Path(name).expanduser(), f"source adapter {source.name}"
        base = str(path.parent if path.name == "config.json" else path) if path.exists() else name
        configs.append(base_config(source, what) if name.lower() == "none" else load_base_config(base, what))
    return configs


def role_rows(key: ModuleKey, out_features: int, config: PretrainedConfig | None) -> dict[str, Tensor]:
    """Rows of a fused projection's output that belong to each role, in the order of the role's own rows.

    Args:
        key: the module's key.
        out_features: rows of its `lora_B`.
        config: the base model's config.

    Returns:
        int64 row indices by role; together they cover every row once.

    Raises:
        AdapterError: there is no config, or it does not explain the rows.
    """
    if config is None:
        raise AdapterError(
            f"{key.suffix} is a fused projection ({', '.join(key.roles)}); splitting it needs the head counts in its "
            "base model's config.json, and base_model_name_or_path names none: give it with --source_configs "
            "(a source) or --model_name_or_path (the target)"
        )
    config = config.get_text_config()
    model_type = config.model_type
    known = _FUSED[_place(key.suffix)][1]
    if model_type not in known:
        raise AdapterError(
            f"{key.suffix} is a fused projection and its row layout is known for model_type {', '.join(known)} only, "
            f"not for {model_type!r}; give the config.json of its own base model"
        )
    heads, kv_heads = config.num_attention_heads, _kv_heads(config)
    if not heads or not kv_heads or heads % kv_heads:
        raise AdapterError(
            f"{key.suffix}: a {model_type} with {heads} heads and {kv_heads} key-value heads cannot be split; "
            "correct the base model's config.json"
        )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    sizes = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
    if key.suffix.endswith("gate_up_proj"):
        sizes = [config.intermediate_size] * 2
    if out_features != sum(sizes):
        raise AdapterError(
            f"{key.suffix} has {out_features} rows in lora_B, but a {model_type} with {heads} heads and {kv_heads} "
            f"key-value heads gives {sum(sizes)}; this config.json is of another base model, give the adapter's own"
        )
    rows = torch.arange(out_features)
    if model_type in ("phi3", "gpt2"):
        parts = rows.split(sizes)
    else:  # interleaved: one bundle per key-value head, its queries first
        bundles = rows.view(kv_heads, heads // kv_heads + 2, head_dim)
        parts = (bundles[:, :-2].reshape(-1), bundles[:, -2].reshape(-1), bundles[:, -1].reshape(-1))
    return dict(zip(key.roles, parts, strict=True))


def _place(suffix: str) -> tuple[str, str]:
    """(parent, leaf) of a module's path inside its layer."""
    parent, _, leaf = suffix.rpartition(".")
    return parent.rpartition(".")[2], leaf


def _kv_heads(config: Any) -> int:
    if config.model_type == "falcon":
        if config.new_decoder_architecture:
            return config.num_kv_heads
        return 1 if config.multi_query else config.num_attention_heads
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads
