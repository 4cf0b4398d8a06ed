"""Hypernetworks that start from those of another fusion: the stage before, or a folder that a user names.

A group (role and rank) takes all of its parameters and its alpha where the other fusion has that group; the others
start fresh, and so do all free updates. The factors that the compact form shares come along. Sizes must agree;
adapters need not.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from heterofusion.adapters.alignment import AlignmentPlan
from heterofusion.method.hypernet import HyperNetworks
from heterofusion.method.hypernet_config import HypernetworkConfig
from heterofusion.method.model import HeteroFusionModel
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.files import file_sha256
from heterofusion.training.checkpoints import (
    HYPERNETWORKS_FILE,
    IDENTITY_FILE,
    last_complete_checkpoint,
    read_identity,
)

logger = logging.getLogger(__name__)

INITIALIZATION_FILE = "initialization.json"
_FREE = ".residual."  # of parameters that are no function of adapters: the target of a later stage has them in its B
_FLAGS = {"form": "preset"}  # fields of HypernetworkConfig that have another name as a flag


@dataclass(frozen=True)
class Initialization:
    """Where the hypernetworks of a fusion start from.

    Attributes:
        label: names the other fusion in messages and in the record.
        file: its hypernetworks.
        groups: groups that start from it.
        fresh: groups that it lacks.
    """

    label: str
    file: Path
    groups: tuple[str, ...]
    fresh: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        """Plain values for the provenance, with the hash of the file."""
        return {
            "from": self.label,
            "sha256": file_sha256(self.file),
            "groups": list(self.groups),
            "fresh_groups": list(self.fresh),
        }


def find_hypernetworks(name: str | Path) -> Path:
    """The folder of hypernetworks that a user means: a checkpoint, or the last complete one of an output_dir.

    Raises:
        ValueError: there are none.
    """
    folder = Path(name).expanduser().absolute()
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; name a checkpoint-N folder or an output_dir")
    if (folder / HYPERNETWORKS_FILE).is_file() and (folder / IDENTITY_FILE).is_file():
        return folder
    last = last_complete_checkpoint(folder)
    if last is None:
        raise UserError(
            f"{folder} holds neither {HYPERNETWORKS_FILE} with {IDENTITY_FILE} nor a complete checkpoint-N folder; "
            "name a checkpoint of a fusion"
        )
    return last


def check_sizes(label: str, found: Any, sizes: HypernetworkConfig) -> None:
    """Check that hypernetworks have the sizes of this fusion.

    Args:
        label: names the other fusion.
        found: its sizes, as `HypernetworkConfig.to_dict` gives them.
        sizes: those of this fusion.

    Raises:
        ValueError: names the field that differs.
    """
    if not isinstance(found, dict):
        raise UserError(f"{IDENTITY_FILE} of {label} is damaged (no sizes of hypernetworks); name another checkpoint")
    for name, expected in sizes.to_dict().items():
        if found.get(name) != expected:
            raise UserError(
                f"the hypernetworks of {label} have {name} {found.get(name)}, those of this fusion {expected}; give "
                f"both the same --{_FLAGS.get(name, name)}, or start fresh"
            )


def plan_initialization(
    label: str, folder: Path, plan: AlignmentPlan, sizes: HypernetworkConfig, need_common: bool = True
) -> Initialization:
    """Find out what a fusion takes from the hypernetworks in a folder. Only their header is read.

    Args:
        label: names the other fusion.
        folder: where `save_hypernetworks` wrote.
        plan: the alignment of this fusion.
        sizes: its hypernetworks' sizes.
        need_common: whether having no group in common is an error.

    Raises:
        ValueError: other sizes, nothing in common, or a damaged folder.
    """
    check_sizes(label, read_identity(folder).get("hypernetwork"), sizes)
    file = folder / HYPERNETWORKS_FILE
    try:
        with safe_open(file, "pt") as content:
            found = {name: tuple(content.get_slice(name).get_shape()) for name in content.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read ({error}); name another checkpoint") from error
    groups = [key.name for key in plan.groups]
    common = tuple(name for name in groups if any(key.startswith(_prefix(name)) for key in found))
    if need_common and not common:
        raise UserError(
            f"{file} has no group of this fusion ({', '.join(groups)}): the adapters have other roles or ranks, or "
            "--extra_rank was another; name another checkpoint, or start fresh"
        )
    for name, shape in _expected_shapes(plan, sizes).items():
        if name.startswith(tuple(map(_prefix, common))) and found.get(name) != shape:
            raise UserError(f"{file}: {name} is {found.get(name, 'missing')}, {shape} was expected; it is damaged")
    return Initialization(label, file, common, tuple(name for name in groups if name not in common))


def initialize_hypernetworks(model: HeteroFusionModel, start: Initialization) -> None:
    """Load what `plan_initialization` found into a model that no engine has wrapped yet.

    Raises:
        ValueError: the file cannot be read.
    """
    parameters = dict(model.hypernetworks.named_parameters())
    prefixes = (*map(_prefix, start.groups), "shared.") if start.groups else ()
    try:
        with safe_open(start.file, "pt") as content, torch.no_grad():
            taken = [name for name in parameters if name.startswith(prefixes) and _FREE not in name]
            found = set(content.keys())
            for name in found.intersection(taken):
                parameters[name].copy_(content.get_tensor(name))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{start.file} cannot be read ({error})") from error
    model.updates.invalidate()
    if not start.groups:
        logger.warning(
            "hypernetworks of %s: nothing is taken from them, because no role has the rank that it had there "
            "(--extra_rank adds to it in every fusion); all start fresh",
            start.label,
        )
        return
    fresh = f"; fresh: {', '.join(start.fresh)}" if start.fresh else ""
    logger.info("hypernetworks of %s: %s%s", start.label, ", ".join(start.groups), fresh)


def write_initialization(folder: Path, start: Initialization | None) -> None:
    """Leave the record beside the checkpoints, for a run that resumes from one; None removes an older one."""
    path = folder / INITIALIZATION_FILE
    if start is None:
        path.unlink(missing_ok=True)
    else:
        path.write_text(json.dumps(start.record(), indent=2) + "\n", encoding="utf-8")


def read_initialization(folder: Path) -> dict[str, Any] | None:
    """What `write_initialization` left, None if nothing.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / INITIALIZATION_FILE
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); remove it, the record will lack it") from error


def _prefix(group: str) -> str:
    return f"networks.{group}."


def _expected_shapes(plan: AlignmentPlan, sizes: HypernetworkConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        networks = HyperNetworks({key.name: key.rank for key in plan.groups}, sizes)
    return {name: tuple(parameter.shape) for name, parameter in networks.named_parameters()}
