"""A LoRA adapter on disk or on the Hub becomes a validated in-memory `LoraAdapter`.

Only the adapter's own two files are read: `adapter_config.json` and the weights. Whatever is not a plain, finite,
complete LoRA adapter is refused with an `AdapterError` that names the file, the tensor and the remedy.
"""

import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from heterofusion.adapters.config import CONFIG_FILE, AdapterError, as_list, rank_and_scaling, read_adapter_config
from heterofusion.runtime.files import file_sha256

logger = logging.getLogger(__name__)

WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
# By their full names: whatever else lies beside an adapter is neither loaded, replaced nor published.
TOKENIZER_FILES = (
    "tokenizer_config.json", "tokenizer.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "additional_chat_templates/*.jinja", "vocab.json", "vocab.txt", "merges.txt",
    "spiece.model", "spm.model", "sentencepiece.model", "sentencepiece.bpe.model", "tekken.json",
)  # fmt: skip
PREFIX = "base_model.model."
_FACTOR = re.compile(rf"{re.escape(PREFIX)}(.+)\.(lora_[AB])\.weight")
LAYER_PATTERN = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.([0-9]{1,9})\.")
# What PEFT saves beside LoRA pairs without being told: embeddings and heads that were resized or targeted.
_EMBEDDINGS = re.compile(r"(?:^|\.)(?:embed_tokens|embed_in|embed_out|lm_head|wte|word_embeddings|score|classifier)\b")
_MAX_LAYERS = 10_000  # a larger index is damage or malice: layer maps are as long as the deepest model
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class LoraModule:
    """One LoRA-adapted linear layer; tensors are in the file's dtype."""

    path: str  # in the base model, such as `model.layers.3.self_attn.q_proj`
    lora_A: Tensor  # (rank, in_features)
    lora_B: Tensor  # (out_features, rank)
    scaling: float  # factor of B A in the update of the weight

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]

    @property
    def in_features(self) -> int:
        return self.lora_A.shape[1]

    @property
    def out_features(self) -> int:
        return self.lora_B.shape[0]


@dataclass(frozen=True)
class LoraAdapter:
    """A validated LoRA adapter."""

    name: str  # what the user called it: a path or a Hub id
    folder: Path  # the local folder it was read from
    config: dict[str, Any]  # `adapter_config.json` as read
    modules: dict[str, LoraModule]  # by path, in layer order
    extra_tensors: dict[str, Tensor] = field(default_factory=dict)  # what else the file holds (`modules_to_save`)
    weights_file: Path = Path()  # the file the tensors came from
    sha256: str = ""  # hex digest of that file
    control: str | None = None  # what replaced the file's tensors, if anything, such as `noise, seed 42`

    @property
    def base_model(self) -> str | None:
        """`base_model_name_or_path` of the config."""
        return self.config.get("base_model_name_or_path") or None

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors under their file keys."""
        tensors = dict(self.extra_tensors)
        for module in self.modules.values():
            tensors[f"{PREFIX}{module.path}.lora_A.weight"] = module.lora_A
            tensors[f"{PREFIX}{module.path}.lora_B.weight"] = module.lora_B
        return tensors


def layer_index(path: str) -> int | None:
    """Index of the decoder layer a module path lies in, or None outside the layers."""
    match = LAYER_PATTERN.search(path)
    return int(match.group(1)) if match else None


def load_adapter(
    name_or_path: str | os.PathLike,
    *,
    revision: str | None = None,
    token: str | None = None,
    allow_pickle: bool = False,
) -> LoraAdapter:
    """Read a PEFT LoRA adapter and validate it.

    Args:
        name_or_path: a folder that holds `adapter_config.json` and `adapter_model.safetensors`, or a Hub id.
        revision: Hub revision.
        token: Hub token; the one of `hf auth login` by default.
        allow_pickle: also read `adapter_model.bin`, with `weights_only=True`.

    Raises:
        AdapterError: the adapter is missing, damaged, or not a plain LoRA adapter.
    """
    folder = adapter_folder(str(name_or_path), revision, [PICKLE_FILE] if allow_pickle else [], token)
    config = read_adapter_config(folder)
    tensors, file = _read_tensors(folder, allow_pickle)
    modules, extra = _sort_tensors(tensors, config, file)
    _check_layers(modules, config, file)
    ordered = dict(sorted(modules.items(), key=lambda item: (layer_index(item[0]) or 0, item[0])))
    return LoraAdapter(str(name_or_path), folder, config, ordered, extra, file, file_sha256(file))


def adapter_folder(
    name: str, revision: str | None = None, more_files: Sequence[str] = (), token: str | None = None
) -> Path:
    """The folder of an adapter: a local one, or what the Hub has of its config, weights and tokenizer."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if folder.exists():
        raise AdapterError(f"adapter {folder.resolve()} is a file; name the adapter's folder instead")
    patterns = [CONFIG_FILE, WEIGHTS_FILE, *TOKENIZER_FILES, *more_files]
    try:
        return Path(snapshot_download(name, revision=revision, token=token, allow_patterns=patterns))
    except HFValidationError:
        raise AdapterError(
            f"adapter folder {folder.absolute()} does not exist; name a folder that holds {CONFIG_FILE}, or a Hub id"
        ) from None
    except Exception as error:  # the Hub client raises its own, its transport's and the system's types
        raise AdapterError(
            f"adapter {name!r} is neither a local folder ({folder.absolute()} does not exist) nor reachable on the "
            f"Hub ({type(error).__name__}); check the name and the network, or download it first"
        ) from error


def _read_tensors(folder: Path, allow_pickle: bool) -> tuple[dict[str, Tensor], Path]:
    path, pickle = folder / WEIGHTS_FILE, folder / PICKLE_FILE
    if path.is_file():
        try:
            return load_file(path), path
        except (SafetensorError, OSError, ValueError) as error:
            raise AdapterError(f"{path} is damaged or truncated ({error}); download or save it again") from None
    if not pickle.is_file():
        raise AdapterError(f"{path} is missing; save the adapter with save_pretrained()")
    if not allow_pickle:
        raise AdapterError(
            f"{folder} holds only {PICKLE_FILE}, a pickle that could run code; convert it to safetensors, "
            "or pass --allow_pickle true to read it with weights_only=True"
        )
    try:
        tensors = torch.load(pickle, map_location="cpu", weights_only=True)
        if not all(isinstance(key, str) and value.layout is torch.strided for key, value in tensors.items()):
            raise TypeError("other things than names and dense tensors")
        # a pickle may hold parameters and views that share memory; a safetensors file cannot
        return {key: value.detach().contiguous().clone() for key, value in tensors.items()}, pickle
    except Exception as error:  # torch.load raises many types on hostile input; all mean the same here
        # its message is not passed on: it recommends weights_only=False
        raise AdapterError(
            f"{pickle} is no dictionary of names and dense tensors that weights_only=True can read "
            f"({type(error).__name__}): it is damaged, or holds code; ask for a safetensors file"
        ) from None


def _sort_tensors(
    tensors: Mapping[str, Tensor], config: dict[str, Any], file: Path
) -> tuple[dict[str, LoraModule], dict[str, Tensor]]:
    factors: dict[str, dict[str, Tensor]] = {}
    extra: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if tensor.numel() == 0:
            raise AdapterError(
                f"{file}: tensor {key} is empty, shape {tuple(tensor.shape)}; adapters saved under ZeRO-3 without "
                "gathering look like this: save it again"
            )
        if tensor.dtype in _DTYPES and not torch.isfinite(tensor).all():
            raise AdapterError(
                f"{file}: tensor {key} holds NaN or Inf; the training that made it diverged: use an earlier checkpoint"
            )
        match = _FACTOR.fullmatch(key)
        if match:
            factors.setdefault(match[1], {})[match[2]] = tensor
        elif _is_extra(key, config.get("modules_to_save") or []):
            extra[key] = tensor
        else:
            raise AdapterError(
                f"{file}: unexpected tensor {key} {tuple(tensor.shape)}; a PEFT LoRA file holds "
                f"{PREFIX}<module>.lora_A.weight and .lora_B.weight only"
            )
    if not factors:
        raise AdapterError(f"{file} holds no lora_A / lora_B pair; save the adapter again with save_pretrained()")
    return {path: _build_module(path, pair, config, file) for path, pair in factors.items()}, extra


def _is_extra(key: str, saved: list[str]) -> bool:
    if ".lora_" in key:
        return re.search(r"\.lora_embedding_[AB]$", key) is not None
    return any(f".{name}." in f".{key}" for name in saved) or _EMBEDDINGS.search(key) is not None


def _build_module(path: str, pair: dict[str, Tensor], config: dict[str, Any], file: Path) -> LoraModule:
    for name, partner in (("lora_A", "lora_B"), ("lora_B", "lora_A")):
        if name not in pair:
            raise AdapterError(
                f"{file}: {path} has {partner} but no {name}; the file is incomplete: download or save it again"
            )
        tensor = pair[name]
        if tensor.dim() != 2 or tensor.dtype not in _DTYPES:
            raise AdapterError(
                f"{file}: {path}.{name} is {tensor.dtype} of shape {tuple(tensor.shape)}; a matrix of float32, "
                "bfloat16 or float16 was expected: adapters of convolutions and quantized adapters cannot be fused"
            )
    A, B = pair["lora_A"], pair["lora_B"]
    rank, scaling = rank_and_scaling(config, path)
    if A.shape[0] != rank or B.shape[1] != rank:
        raise AdapterError(
            f"{file}: {path} has lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)}, but {CONFIG_FILE} gives rank "
            f"{rank}; the two files do not belong together"
        )
    return LoraModule(path, A, B, scaling)


def _check_layers(modules: dict[str, LoraModule], config: dict[str, Any], file: Path) -> None:
    held = {index for path in modules if (index := layer_index(path)) is not None}
    if not held:
        raise AdapterError(
            f"{file}: no tensor name has a layer index such as 'layers.0.' (first: {next(iter(modules))}); "
            "modules cannot be aligned by layer"
        )
    if max(held) >= _MAX_LAYERS:
        raise AdapterError(f"{file}: layer index {max(held)} is beyond any model; the file is damaged, save it again")
    wanted, patterns = set(as_list(config.get("layers_to_transform"))), as_list(config.get("layers_pattern"))
    if not wanted:  # PEFT reads an empty list as all layers
        return
    if not held <= wanted:
        raise AdapterError(
            f"{file}: holds layers {sorted(held)}, but layers_to_transform in {CONFIG_FILE} is {sorted(wanted)}; "
            "the two files do not belong together"
        )
    if wanted - held:
        logger.warning("%s: layers_to_transform names layers that it does not hold: %s", file, sorted(wanted - held))
    names = [re.compile(rf"(?:^|.*?\.)(?:{pattern})\.\d+\.") for pattern in patterns]
    if names and not any(name.match(path) for name in names for path in modules):
        raise AdapterError(
            f"{file}: layers_pattern {patterns} of {CONFIG_FILE} matches no tensor (first: {next(iter(modules))}); "
            "the two files do not belong together"
        )


def check_base_fits(model: nn.Module, adapter: LoraAdapter) -> None:
    """Check that every LoRA module of an adapter exists in a base model with the right shape (meta device will do)."""
    name = getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__
    remedy = f"give the base it was trained on ({adapter.base_model or 'not named in its config'})"
    for path, module in adapter.modules.items():
        try:
            layer = model.get_submodule(path)
        except AttributeError:
            raise AdapterError(
                f"base model {name} has no module {path}, which adapter {adapter.folder} changes; {remedy}"
            ) from None
        if isinstance(layer, Conv1D):
            found = (layer.nx, layer.nf)
        elif isinstance(layer, nn.Linear):
            found = (layer.in_features, layer.out_features)
        else:
            continue  # PEFT says what it cannot adapt
        if found != (module.in_features, module.out_features):
            raise AdapterError(
                f"base model {name}: {path} maps {found[0]} to {found[1]} features, but adapter "
                f"{adapter.folder} has {module.in_features} to {module.out_features}; {remedy}"
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
        if parameter.shape != tensor.shape:
            raise AdapterError(
                f"base model {name}: {path} is {tuple(parameter.shape)}, but adapter {adapter.folder} holds "
                f"{tuple(tensor.shape)}; tokens were added when it was trained: give a base that was resized alike "
                "(resize_token_embeddings, then save_pretrained)"
            )
