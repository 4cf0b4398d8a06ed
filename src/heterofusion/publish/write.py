"""The one writer of adapters: an ordinary PEFT folder with card and record, there as a whole or not at all."""

import contextlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from safetensors.torch import save_file
from torch import Tensor

from heterofusion.adapters.controls import control_kind
from heterofusion.adapters.lora import CONFIG_FILE, PICKLE_FILE, TOKENIZER_FILES, WEIGHTS_FILE, load_adapter
from heterofusion.method.diagnostics import DIAGNOSTICS_FILE, adapter_diagnostics
from heterofusion.method.model import HeteroFusionModel
from heterofusion.publish.card import CARD_FILE, model_card
from heterofusion.publish.record import FILE_OF_KIND, about_fusion, fused_config, fusion_record
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.files import file_sha256, staging_folder, told_writes, write_json
from heterofusion.runtime.sharding import whole_tensors

_REMEDY = "lower --learning_rate, or take an earlier checkpoint"


class ExportError(UserError):
    """An adapter that must not be written or pushed."""


def write_adapter(
    folder: str | Path,
    weights: Mapping[str, Tensor],
    config: PeftConfig | Mapping[str, Any],
    record: Mapping[str, Any],
    *,
    about: str = "",
    remedy: str = _REMEDY,
    tokenizer: Any = None,
    diagnostics: Mapping[str, Any] | None = None,
) -> Path:
    """Write an adapter: validated, written beside its place, then moved, the record last; what it held before goes.

    `record` is of `make_record`, `about` see `model_card`.
    """
    check_finite(weights, remedy)
    folder = Path(folder)
    record_file = FILE_OF_KIND[record["made_by"]["kind"]]
    with contextlib.ExitStack() as stack:
        with told_writes(f"the adapter could not be written to {folder.absolute()}", "what it held before is kept"):
            staging = stack.enter_context(staging_folder(folder, ".export-"))
            whole = {key: tensor.detach().cpu().contiguous() for key, tensor in weights.items()}
            save_file(whole, staging / WEIGHTS_FILE, {"format": "pt"})
            if isinstance(config, PeftConfig):
                config.save_pretrained(str(staging))
            else:
                write_json(staging / CONFIG_FILE, config)
            shutil.copymode(staging / CONFIG_FILE, staging / WEIGHTS_FILE)  # safetensors writes for the owner alone
            if tokenizer is not None:
                tokenizer.save_pretrained(str(staging))
            (staging / CARD_FILE).write_text(str(model_card(record, about)), encoding="utf-8")
            if diagnostics is not None:
                write_json(staging / DIAGNOSTICS_FILE, diagnostics)
            load_adapter(staging)  # what cannot be read is not kept
            write_json(staging / record_file, {**record, "weights_sha256": file_sha256(staging / WEIGHTS_FILE)})
        with told_writes(f"the adapter could not be moved into {folder.absolute()}", "it is incomplete; export again"):
            _move_files(staging, folder, record_file, tokenizer is not None)
    return folder


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

    Args:
        model: the trained model; it stays usable.
        output_dir: the folder; see `write_adapter`.
        tokenizer: saved along if given.
        training: plain values recorded in the provenance (steps, seeds, replay, ...).
        metrics: plain values for the card's table and the provenance.
        write: whether this rank writes; all have to call it, since parameters may be sharded.

    Returns:
        The folder.

    Raises:
        ExportError: a weight is not finite, or keys, shapes or dtypes are not the target's.
        OSError: the folder cannot be written; what it held before is kept, unless files could not be moved.
    """
    state, expected = model.fused_state_dict(), model.plan.target.state_dict()
    if {key: (t.shape, t.dtype) for key, t in state.items()} != {k: (t.shape, t.dtype) for k, t in expected.items()}:
        raise ExportError("the fused adapter has other tensors, shapes or dtypes than its target; nothing was written")
    check_finite(state)
    alphas = whole_tensors(model.hypernetworks.alphas.items())
    diagnostics = adapter_diagnostics(model)
    for entry, source in zip(diagnostics["sources"], model.plan.sources, strict=True):
        if source.control is not None:  # pictures must not show it as the source
            entry["control"] = control_kind(source.control)
    if not write:
        return Path(output_dir)
    record = fusion_record(model, training, metrics)
    record["alpha"] = {name: alpha.item() for name, alpha in alphas.items()}
    about, config = about_fusion(record), fused_config(model)
    return write_adapter(output_dir, state, config, record, about=about, tokenizer=tokenizer, diagnostics=diagnostics)


def check_finite(weights: Mapping[str, Tensor], remedy: str = _REMEDY) -> None:
    """Refuse weights of which one is not finite."""
    for key, tensor in weights.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            told = f"tensor {key} is not finite (NaN, Inf, or out of range for {tensor.dtype})"
            raise ExportError(f"{told}; nothing was written; {remedy}")


def _move_files(staging: Path, folder: Path, record_file: str, with_tokenizer: bool) -> None:
    """Move an adapter into place. The record goes last: where it stands, the adapter beside it is complete."""
    stale = [folder / name for name in (*FILE_OF_KIND.values(), DIAGNOSTICS_FILE, PICKLE_FILE)]
    for pattern in TOKENIZER_FILES if with_tokenizer else ():
        stale += [path for path in folder.glob(pattern) if path.is_file()]
    for path in stale:
        path.unlink(missing_ok=True)
    files = sorted(path.relative_to(staging) for path in staging.rglob("*") if path.is_file())
    for file in sorted(files, key=lambda file: file == Path(record_file)):
        (folder / file).parent.mkdir(exist_ok=True)  # a tokenizer may have a folder of chat templates
        os.replace(staging / file, folder / file)
