"""The end of a fusion: one ordinary PEFT adapter with its provenance and model card."""

import contextlib
import importlib.metadata
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from heterofusion.adapters import CONFIG_FILE, WEIGHTS_FILE, LoraAdapter, file_sha256
from heterofusion.engines import whole_tensors
from heterofusion.modeling import HeteroFusionModel

logger = logging.getLogger(__name__)

PROVENANCE_FILE = "fusion.json"
EXPERT_FILE = "expert.json"  # the same of an expert that recipes/expert.py trained
CARD_FILE = "README.md"
_STAGING = ".export-"
_SPEEDS = ("_runtime", "_per_second", "epoch")  # figures of the run, not of the adapter


class ExportError(ValueError):
    """A fused adapter that must not be written."""


def export_adapter(
    model: HeteroFusionModel,
    output_dir: str | Path,
    *,
    tokenizer: Any = None,
    training: dict[str, Any] | None = None,
    metrics: dict[str, Any] | None = None,
    write: bool = True,
) -> Path:
    """Write the fused adapter as a plain PEFT folder with `fusion.json` and a model card. All ranks together.

    Everything is validated first and written beside its final place, then moved; what killed exports left there goes.

    Args:
        model: the trained model; it stays usable.
        output_dir: the folder; files of the same names are replaced.
        tokenizer: saved along if given.
        training: plain values recorded in the provenance (steps, seeds, replay, ...).
        metrics: plain values for the card's table and the provenance.
        write: whether this rank writes; where parameters are sharded, the others are needed to gather them.

    Returns:
        The folder.

    Raises:
        ExportError: a weight is not finite, or the key set or a shape is not the target's.
        OSError: the folder cannot be written; what it held before is kept, unless files could not be moved.
    """
    state = model.fused_state_dict()
    validate_fused(state, model.plan.target)
    folder = Path(output_dir)
    alphas = whole_tensors(model.hypernetworks.alphas.items())
    if not write:
        return folder
    record = provenance(model, training, metrics)
    record["alpha"] = {name: alpha.item() for name, alpha in alphas.items()}
    with contextlib.ExitStack() as stack:
        with _told(f"the adapter could not be written to {folder.absolute()}", "what it held before is kept"):
            staging = stack.enter_context(_staging(folder))
            weights = {key: tensor.cpu().contiguous() for key, tensor in state.items()}
            save_file(weights, staging / WEIGHTS_FILE, {"format": "pt"})
            _write_json(staging / CONFIG_FILE, fused_config(model))
            if tokenizer is not None:
                _save_tokenizer(tokenizer, staging)
            (staging / CARD_FILE).write_text(str(model_card(record)), encoding="utf-8")
            record["weights_sha256"] = file_sha256(staging / WEIGHTS_FILE)
            _write_json(staging / PROVENANCE_FILE, record)
            shutil.copymode(staging / CONFIG_FILE, staging / WEIGHTS_FILE)  # safetensors writes for the owner alone
        with _told(f"the adapter could not be moved into {folder.absolute()}", "it is incomplete; export again"):
            _move_files(staging, folder)
    return folder


@contextlib.contextmanager
def _told(what: str, outcome: str) -> Iterator[None]:
    """Say of a failed write what it was for and what is left; safetensors has an error of its own for it."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(f"{what} ({error}); {outcome}") from error


@contextlib.contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """An empty folder in a folder, gone afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f"{_STAGING}*"):  # of a run that was killed
        shutil.rmtree(left)
    staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=folder))
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    try:
        tokenizer.save_pretrained(str(folder))
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise OSError(str(error)) from error  # a failed write of the tokenizers library has no type of its own


def _move_files(staging: Path, folder: Path) -> None:
    """Move an export into place. The provenance goes last: where it stands, the adapter beside it is complete."""
    (folder / PROVENANCE_FILE).unlink(missing_ok=True)
    names = sorted(path.relative_to(staging) for path in staging.rglob("*") if path.is_file())
    for name in sorted(names, key=lambda name: name == Path(PROVENANCE_FILE)):
        (folder / name).parent.mkdir(exist_ok=True)  # a tokenizer may have a folder of chat templates
        os.replace(staging / name, folder / name)


def validate_fused(state: dict[str, Tensor], target: LoraAdapter) -> None:
    """Check a fused state against its target: same keys, shapes and dtypes, all finite.

    Raises:
        ExportError: names the tensor.
    """
    expected = target.state_dict()
    if state.keys() != expected.keys():
        raise ExportError(
            f"fused adapter has other tensors than its target: {sorted(state.keys() ^ expected.keys())[:3]}"
        )
    for key, tensor in state.items():
        if tensor.shape != expected[key].shape or tensor.dtype != expected[key].dtype:
            raise ExportError(f"fused tensor {key} is {tensor.dtype} {tuple(tensor.shape)}, unlike the target's")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ExportError(
                f"fused tensor {key} is not finite (NaN, Inf, or out of range for {tensor.dtype}); nothing was "
                "written; lower --learning_rate, or take an earlier checkpoint"
            )


def fused_config(model: HeteroFusionModel) -> dict[str, Any]:
    """`adapter_config.json` of the fused adapter: the target's, for inference, with a base model named."""
    config = dict(model.plan.target.config)
    config["inference_mode"] = True
    if not config.get("base_model_name_or_path"):
        config["base_model_name_or_path"] = getattr(model.get_base_model().config, "name_or_path", None) or None
    return config


def provenance(
    model: HeteroFusionModel, training: dict[str, Any] | None = None, metrics: dict[str, Any] | None = None
) -> dict[str, Any]:
    """What `fusion.json` records: where every number of the adapter comes from. Local paths are cut to their names."""
    plan = model.plan
    return {
        "base_model": display_name(fused_config(model)["base_model_name_or_path"] or ""),
        "target": _adapter_record(plan.target),
        "sources": [_adapter_record(source) for source in plan.sources],
        "plan": {
            "layer_alignment": plan.layer_alignment,
            "transfer_ratio": str(plan.transfer_ratio),
            "aligned_modules": {key.name: len(members) for key, members in plan.groups.items()},
            "untouched_modules": len(plan.untouched),
            "layer_maps": [{str(i): j for i, j in pairs.items()} for pairs in plan.layer_maps],
        },
        "method": {**model.method.method_dict(), "seed": model.updates.seed},
        "hypernetwork": {
            **model.hypernetworks.config.to_dict(),
            "parameters": sum(p.numel() for p in model.hypernetworks.parameters()),
        },
        "training": training or {},
        "metrics": metrics or {},
        "versions": library_versions(),
    }


def library_versions() -> dict[str, str]:
    """Installed versions of the packages that a fused adapter depends on."""
    names = ("heterofusion", "torch", "transformers", "peft", "accelerate", "datasets", "safetensors")
    return {name: importlib.metadata.version(name) for name in names}


def display_name(name: str) -> str:
    """A Hub id as it is; of anything else (local paths, a stranger's text) the last part, in harmless characters."""
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not os.path.exists(name):  # unlike Path.exists, takes long names
        return name
    return re.sub(r"[^\w.-]", "_", PureWindowsPath(name).name)  # which knows both kinds of slashes


def _adapter_record(adapter: LoraAdapter) -> dict[str, Any]:
    return {
        "name": display_name(adapter.name),
        "base_model": display_name(adapter.base_model or ""),
        "sha256": adapter.sha256,
    }


def model_card(record: dict[str, Any]) -> ModelCard:
    """A model card from a provenance record. The licence is left to the owner of the adapters."""
    base = record["base_model"]
    data = ModelCardData(
        base_model=base or None,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["heterofusion", "lora", "adapter-fusion", f"base_model:adapter:{base}"]
        if base
        else ["heterofusion", "lora"],
    )
    sources = "\n".join(
        f"| source {index} | {source['name']} | {source['base_model'] or 'not named'} | `{source['sha256'][:12]}` |"
        for index, source in enumerate(record["sources"], start=1)
    )
    target = record["target"]
    aligned = sum(record["plan"]["aligned_modules"].values())
    body = f"""
# Fused LoRA adapter

LoRA experts of {len(record["sources"])} source adapter(s) fused into one LoRA adapter of
`{base or "the target model"}` with [HeteroFusion](https://arxiv.org/abs/2604.01674). It is an ordinary PEFT adapter:
`lora_A` is the target adapter's, `lora_B` of {aligned} aligned modules was updated,
{record["plan"]["untouched_modules"]} modules are the target's own.

| part | adapter | base model | sha256 of its weights |
|---|---|---|---|
| target | {target["name"]} | {target["base_model"] or "not named"} | `{target["sha256"][:12]}` |
{sources}

## Use

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{base or "<base model>"}")
model = PeftModel.from_pretrained(model, "<this adapter>")
```
{_metrics_table(record["metrics"])}
## Provenance

`{PROVENANCE_FILE}` holds the hashes of all adapters, the alignment, all settings, seeds and library versions.
No licence is stated here: it follows from those of the base model, the adapters and the replay data.
"""
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{body}")


def _metrics_table(metrics: dict[str, Any]) -> str:
    shown = {name: value for name, value in metrics.items() if not name.endswith(_SPEEDS)}
    if not shown:
        return ""
    rows = "\n".join(
        f"| {name} | {value:.4f} |" if isinstance(value, float) else f"| {name} | {value} |"
        for name, value in shown.items()
    )
    return f"\n## Metrics\n\n| metric | value |\n|---|---|\n{rows}\n"


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
