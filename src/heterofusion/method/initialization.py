"""Hypernetworks that start from those of another fusion.

A group (role and rank) takes all of its parameters and its alpha where the other fusion has that group; the others
start fresh, and so do all free updates. The factors that the compact form shares come along. Sizes must agree;
adapters need not.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from heterofusion.adapters.alignment import AlignmentPlan
from heterofusion.method.config import HypernetworkConfig
from heterofusion.method.hypernet import HyperNetworks
from heterofusion.method.model import HeteroFusionModel
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.files import file_sha256

logger = logging.getLogger(__name__)

_FREE = ".residual."  # of parameters that are no function of adapters: they belong to one target


@dataclass(frozen=True)
class Initialization:
    """Where hypernetworks start from: a file, how messages call it, the groups that it has, and those it lacks."""

    label: str
    file: Path
    groups: tuple[str, ...]
    fresh: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        """Plain values for the provenance, with the hash of the file."""
        groups = {"groups": list(self.groups), "fresh_groups": list(self.fresh)}
        return {"from": self.label, "sha256": file_sha256(self.file), **groups}


def plan_initialization(
    label: str, file: Path, found_sizes: Mapping[str, Any] | None, plan: AlignmentPlan, sizes: HypernetworkConfig
) -> Initialization:
    """What a fusion takes from a file of hypernetworks of some sizes; reads its header alone."""
    for name, expected in sizes.to_dict().items():
        there = (found_sizes or {}).get(name)
        if there != expected:
            raise UserError(
                f"the hypernetworks of {label} have {name} {there}, those of this fusion {expected}; give both the "
                f"same --{'preset' if name == 'form' else name}, or start fresh"
            )
    try:
        with safe_open(file, "pt") as content:
            found = {name: tuple(content.get_slice(name).get_shape()) for name in content.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read ({error}); name another checkpoint") from error
    groups = [key.name for key in plan.groups]
    common = tuple(name for name in groups if any(key.startswith(_prefix(name)) for key in found))
    if not common:
        raise UserError(
            f"{file} has no group of this fusion ({', '.join(groups)}): the adapters have other roles or ranks, or "
            "--extra_rank was another; name another checkpoint, or start fresh"
        )
    with torch.device("meta"):
        wanted = HyperNetworks({key.name: key.rank for key in plan.groups}, sizes)
    for name, parameter in wanted.named_parameters():
        shape = tuple(parameter.shape)
        if name.startswith(tuple(map(_prefix, common))) and found.get(name) != shape:
            raise UserError(f"{file}: {name} is {found.get(name, 'missing')}, {shape} was expected; it is damaged")
    return Initialization(label, file, common, tuple(name for name in groups if name not in common))


@torch.no_grad()
def initialize_hypernetworks(model: HeteroFusionModel, start: Initialization) -> None:
    """Load what `plan_initialization` found into a model that no engine has wrapped yet."""
    prefixes = (*map(_prefix, start.groups), "shared.")
    with safe_open(start.file, "pt") as content:
        found = set(content.keys())
        for name, parameter in model.hypernetworks.named_parameters():
            if name in found and name.startswith(prefixes) and _FREE not in name:
                parameter.copy_(content.get_tensor(name))
    model.updates.invalidate()
    fresh = f"; fresh: {', '.join(start.fresh)}" if start.fresh else ""
    logger.info("hypernetworks of %s: %s%s", start.label, ", ".join(start.groups), fresh)


def _prefix(group: str) -> str:
    return f"networks.{group}."
