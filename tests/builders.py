"""Small adapters and models for the tests: PEFT folders written by hand, tiny random models of every family.

Importing it takes the network away, so that no test reaches for the Hub by accident.
"""

import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from heterofusion import AdapterError, load_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
VOCABULARY = 128
LLAMA_ROLES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

_GROUPED = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_FEWER = {key: value for key, value in _GROUPED.items() if key not in ("intermediate_size", "num_key_value_heads")}
# Sizes of one tiny model per family; every name is a transformers `model_type`.
FAMILIES: dict[str, dict] = {
    "llama": _GROUPED,
    "qwen2": _GROUPED,
    "qwen3": {**_GROUPED, "head_dim": 16},
    "mistral": _GROUPED,
    "gemma2": {**_GROUPED, "head_dim": 16},
    "gemma3_text": {**_GROUPED, "head_dim": 16},
    "phi3": _GROUPED,
    "olmo2": _GROUPED,
    "gpt_neox": {key: value for key, value in _GROUPED.items() if key != "num_key_value_heads"},
    "gpt2": _FEWER,
    "falcon": _FEWER,
}


def tiny_config(model_type: str, **overrides) -> PretrainedConfig:
    """Config of a tiny model of a family in `FAMILIES`."""
    return AutoConfig.for_model(model_type, **{**FAMILIES[model_type], **overrides})


def tiny_model(model_type: str, seed: int = 0, **overrides) -> PreTrainedModel:
    """A tiny random float32 causal LM on the CPU, in eval mode; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(tiny_config(model_type, **overrides)).eval()


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every Linear and Conv1D of a model by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}


def input_ids(*shape: int, seed: int = 0) -> Tensor:
    """Random token ids above the special ones."""
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def llama_modules(
    layers: int = 2, hidden: int = 32, intermediate: int = 48, kv: int = 16, roles=LLAMA_ROLES
) -> dict[str, tuple[int, int]]:
    """Paths and (in, out) sizes of a Llama-like model's linear layers, for `write_adapter`."""
    sizes = {
        "q_proj": (hidden, hidden),
        "k_proj": (hidden, kv),
        "v_proj": (hidden, kv),
        "o_proj": (hidden, hidden),
        "gate_proj": (hidden, intermediate),
        "up_proj": (hidden, intermediate),
        "down_proj": (intermediate, hidden),
    }
    return {
        f"model.layers.{layer}.{'self_attn' if role[0] in 'qkvo' else 'mlp'}.{role}": sizes[role]
        for layer in range(layers)
        for role in roles
    }


def write_adapter(
    folder: str | os.PathLike,
    modules: dict[str, tuple[int, int]] | None = None,
    *,
    r: int = 4,
    lora_alpha: float = 8,
    ranks: dict[str, int] | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    std: float = 0.05,
    tensors: dict[str, Tensor] | None = None,
    **config,
) -> Path:
    """Write an adapter folder as PEFT writes it, without a model: A and B are normal with deviation `std`.

    `modules` has the (in, out) sizes by path, `ranks` what is not `r`, `tensors` further tensors or replacements by
    file key; `config` are fields of `adapter_config.json`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    modules = llama_modules() if modules is None else modules
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for path, (in_features, out_features) in modules.items():
        rank = (ranks or {}).get(path, r)
        for name, shape in (("lora_A", (rank, in_features)), ("lora_B", (out_features, rank))):
            state[f"base_model.model.{path}.{name}.weight"] = (torch.randn(shape, generator=generator) * std).to(dtype)
    save_file({**state, **(tensors or {})}, folder / WEIGHTS, {"format": "pt"})
    targets = sorted({path.rpartition(".")[2] for path in modules})
    given = {"r": r, "lora_alpha": lora_alpha, "target_modules": targets, **config}
    content = {**LoraConfig(task_type="CAUSAL_LM", inference_mode=True).to_dict(), **given}
    (folder / CONFIG).write_text(json.dumps(content), encoding="utf-8")
    return folder


def lora_folder(
    model: PreTrainedModel,
    folder: str | os.PathLike,
    target_modules: list[str] | str,
    r: int = 4,
    *,
    lora_alpha: float = 8,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    std: float = 0.05,
    base: str | None = None,
    **config,
) -> Path:
    """Save a real PEFT adapter with random A and B of a model, which is left without it; `base` is its base's name."""
    settings = LoraConfig(
        task_type="CAUSAL_LM", target_modules=target_modules, r=r, lora_alpha=lora_alpha, lora_dropout=0.0, **config
    )
    peft_model: PeftModel = get_peft_model(model, settings, autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in peft_model.named_parameters():
        if ".lora_" in name:
            parameter.data = (torch.randn(parameter.shape, generator=generator) * std).to(dtype or parameter.dtype)
    if base is not None:
        peft_model.peft_config["default"].base_model_name_or_path = base
    peft_model.save_pretrained(str(folder))
    peft_model.unload()
    model.__dict__.pop("peft_config", None)
    return Path(folder)


def edit_config(folder: Path, **fields) -> None:
    """Change fields of an `adapter_config.json` as a careless hand would: nothing is checked."""
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}), encoding="utf-8")


def refusal(folder: str | os.PathLike, **kwargs) -> str:
    """The message with which `load_adapter` refuses a folder."""
    with pytest.raises(AdapterError) as caught:
        load_adapter(folder, **kwargs)
    return str(caught.value)


def assert_names(message: str, path: Path, *parts: str) -> None:
    """Assert that a message names the full path and every other part."""
    for part in (str(path.resolve()), *parts):
        assert part in message, message
