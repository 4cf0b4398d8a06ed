"""Whether adapters can be merged at all: experts of one base, different from each other, and nothing but LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PureWindowsPath

import torch
from torch import nn

from heterofusion.adapters.lora import AdapterError, LoraAdapter, check_base_fits
from heterofusion.evaluation.arguments import is_file_name
from heterofusion.merging.arguments import PER_TASK, MergeError
from heterofusion.runtime.files import display_name

_FUSE = "merging needs experts of one base model; recipes/train.py fuses experts of different ones"
_WIDE = (torch.float32, torch.bfloat16, torch.float16)


def check_experts(experts: Sequence[LoraAdapter]) -> None:
    """Refuse adapters that are not several LoRA experts of one base.

    Args:
        experts: as `load_adapter` gives them.

    Raises:
        MergeError: names the adapters, what differs, and the remedy.
    """
    for index, expert in enumerate(experts):
        if expert.extra_tensors:
            raise MergeError(
                f"adapter {expert.name} holds {min(expert.extra_tensors)} besides LoRA (modules_to_save, embeddings), "
                "which no method here merges; train it without, or remove those tensors and modules_to_save"
            )
        for other in experts[:index]:
            if other.sha256 == expert.sha256:
                raise MergeError(
                    f"adapters {other.name} and {expert.name} have the same weights (sha256 {expert.sha256[:12]}); "
                    "give each once, and --weights to count it more"
                )
            if expert.base_model and other.base_model and _last(expert.base_model) != _last(other.base_model):
                raise MergeError(
                    f"adapter {other.name} was trained on {other.base_model}, {expert.name} on {expert.base_model}: "
                    f"{_FUSE}. If both are the same model, give both the same base_model_name_or_path in their "
                    "adapter_config.json"
                )
            for path in expert.modules.keys() & other.modules.keys():
                here, there = expert.modules[path], other.modules[path]
                if (here.out_features, here.in_features) != (there.out_features, there.in_features):
                    raise MergeError(
                        f"{path} maps {there.in_features} to {there.out_features} features in adapter {other.name}, "
                        f"but {here.in_features} to {here.out_features} in {expert.name}: {_FUSE}"
                    )


def check_experts_fit(base: nn.Module, experts: Sequence[LoraAdapter]) -> None:
    """Refuse experts that are not of the given base (on the meta device).

    Raises:
        MergeError: names the first module that does not fit.
    """
    for expert in experts:
        try:
            check_base_fits(base, expert)
        except AdapterError as error:
            raise MergeError(f"--adapters {expert.name}: {error}; {_FUSE}") from error


def expert_names(experts: Sequence[LoraAdapter], names: Sequence[str] | None, method: str) -> list[str]:
    """Names of the experts' folders, for the method that writes one per expert.

    Raises:
        MergeError: too many or too few, two are the same, one cannot name a folder, or the method writes one folder.
    """
    if method != PER_TASK and names is not None:
        raise MergeError(f"--names: {method} writes one adapter, into --output_dir; leave it out")
    if names is not None and len(names) != len(experts):
        raise MergeError(f"--names has {len(names)} values, but --adapters has {len(experts)}: give one each")
    found = list(names or (display_name(expert.name.rstrip("/")).rpartition("/")[2] for expert in experts))
    if method != PER_TASK:
        return found
    for index, name in enumerate(found):
        if not is_file_name(name):
            raise MergeError(
                f"{name!r} cannot name the folder of adapter {experts[index].name}; give --names, one per expert, of "
                "letters, digits and . _ + = -"
            )
        if name in found[:index]:
            raise MergeError(
                f"adapters {experts[found.index(name)].name} and {experts[index].name} have the same name {name!r}; "
                "give --names, one per expert, all different"
            )
    return found


def export_dtype(experts: Sequence[LoraAdapter], wanted: str | None) -> torch.dtype:
    """Dtype of the written weights: as asked for, else the experts' own, float32 where they differ."""
    if wanted is not None:
        return getattr(torch, wanted)
    found = {tensor.dtype for expert in experts for m in expert.modules.values() for tensor in (m.lora_A, m.lora_B)}
    (dtype,) = found if len(found) == 1 else {torch.float32}
    return dtype if dtype in _WIDE else torch.float32


def check_not_an_expert(output: Path, experts: Sequence[LoraAdapter]) -> None:
    """Refuse to write over one of the adapters that are merged.

    Raises:
        MergeError: names it.
    """
    for expert in experts:
        if output.resolve() == expert.folder.resolve():
            raise MergeError(f"--output_dir {output} is the folder of adapter {expert.name}; name another")


def _last(base: str) -> str:
    """The model's own name: the same one may be known by its Hub id and by a folder."""
    return PureWindowsPath(base.rstrip("/\\")).name.lower()
