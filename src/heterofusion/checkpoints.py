"""Hypernetworks and alphas on disk, tied to the adapters they were trained for.

A checkpoint never holds a fused adapter: loaded as the target it would add the update twice.
"""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from heterofusion.config import MethodConfig
from heterofusion.hypernet import HypernetworkConfig
from heterofusion.modeling import HeteroFusionModel
from heterofusion.topology import AlignmentPlan

HYPERNETWORKS_FILE = "hypernetworks.safetensors"
IDENTITY_FILE = "fusion_state.json"


def fusion_identity(plan: AlignmentPlan, sizes: HypernetworkConfig, method: MethodConfig) -> dict[str, Any]:
    """What must agree for hypernetworks to fit: hashes of all adapters, sizes, and the alignment."""
    return {
        "target_sha256": plan.target.sha256,
        "source_sha256": [source.sha256 for source in plan.sources],
        "hypernetwork": sizes.to_dict(),
        "canonicalize": method.canonicalize,
        "layer_alignment": plan.layer_alignment,
        "transfer_ratio": str(plan.transfer_ratio),
        "groups": {key.name: [item.target.module.path for item in members] for key, members in plan.groups.items()},
    }


def save_hypernetworks(model: HeteroFusionModel, folder: str | Path) -> None:
    """Write hypernetworks, alphas and the identity of the fusion into a folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.hypernetworks.state_dict().items()}
    identity = fusion_identity(model.plan, model.hypernetworks.config, model.method)
    partial = folder / f"{HYPERNETWORKS_FILE}.partial"
    save_file(state, partial, metadata={"format": "pt"})
    (folder / IDENTITY_FILE).write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")
    partial.replace(folder / HYPERNETWORKS_FILE)


def check_checkpoint(folder: str | Path, plan: AlignmentPlan, sizes: HypernetworkConfig, method: MethodConfig) -> None:
    """Check that a checkpoint is complete and of this fusion; no weights are read.

    Raises:
        ValueError: files are missing or damaged, or belong to another fusion; names the field that differs.
    """
    folder = Path(folder).absolute()
    identity_file = folder / IDENTITY_FILE
    for path in (identity_file, folder / HYPERNETWORKS_FILE):
        if not path.is_file():
            raise ValueError(
                f"{path} is missing; {folder} is not a complete HeteroFusion checkpoint, name a checkpoint-N folder"
            )
    try:
        found = json.loads(identity_file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{identity_file} is damaged ({error}); resume from another checkpoint") from error
    if not isinstance(found, dict):
        raise ValueError(f"{identity_file} is damaged (no JSON object); resume from another checkpoint")
    for name, expected in fusion_identity(plan, sizes, method).items():
        if found.get(name) != expected:
            raise ValueError(
                f"{folder} was trained with another {name}: {_short(found.get(name))}, this run has "
                f"{_short(expected)}; resume with the same adapters and settings, or start in a new output_dir"
            )


def load_hypernetworks(model: HeteroFusionModel, folder: str | Path) -> None:
    """Load what `save_hypernetworks` wrote.

    Raises:
        ValueError: as `check_checkpoint`, or the weights do not load.
    """
    check_checkpoint(folder, model.plan, model.hypernetworks.config, model.method)
    weights_file = Path(folder) / HYPERNETWORKS_FILE
    try:
        model.hypernetworks.load_state_dict(load_file(weights_file))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{weights_file} cannot be loaded: {error}") from error


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."
