"""The end of a fusion: one ordinary PEFT adapter with its provenance and model card."""

import contextlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from heterofusion.adapters.lora import CONFIG_FILE, WEIGHTS_FILE, LoraAdapter
from heterofusion.method.diagnostics import DIAGNOSTICS_FILE, adapter_diagnostics
from heterofusion.method.model import HeteroFusionModel
from heterofusion.publish.record import CARD_FILE, PROVENANCE_FILE, fused_config, model_card, provenance
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.files import file_sha256, staging_folder, told_writes
from heterofusion.runtime.sharding import whole_tensors

logger = logging.getLogger(__name__)

_STAGING = ".export-"


class ExportError(UserError):
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
    """Write the fused adapter as a plain PEFT folder with `fusion.json`, a model card and `diagnostics.json`.

    All ranks together.

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
    diagnostics = adapter_diagnostics(model)
    for entry, source in zip(diagnostics["sources"], model.plan.sources, strict=True):
        if source.control is not None:  # pictures must not show it as the source
            entry["control"] = source.control["kind"]
    if not write:
        return folder
    record = provenance(model, training, metrics)
    record["alpha"] = {name: alpha.item() for name, alpha in alphas.items()}
    with contextlib.ExitStack() as stack:
        with told_writes(f"the adapter could not be written to {folder.absolute()}", "what it held before is kept"):
            staging = stack.enter_context(staging_folder(folder, _STAGING))
            weights = {key: tensor.cpu().contiguous() for key, tensor in state.items()}
            save_file(weights, staging / WEIGHTS_FILE, {"format": "pt"})
            _write_json(staging / CONFIG_FILE, fused_config(model))
            if tokenizer is not None:
                tokenizer.save_pretrained(str(staging))
            (staging / CARD_FILE).write_text(str(model_card(record)), encoding="utf-8")
            _write_json(staging / DIAGNOSTICS_FILE, diagnostics)
            record["weights_sha256"] = file_sha256(staging / WEIGHTS_FILE)
            _write_json(staging / PROVENANCE_FILE, record)
            shutil.copymode(staging / CONFIG_FILE, staging / WEIGHTS_FILE)  # safetensors writes for the owner alone
        with told_writes(f"the adapter could not be moved into {folder.absolute()}", "it is incomplete; export again"):
            _move_files(staging, folder)
    return folder


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


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
