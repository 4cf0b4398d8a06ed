"""Basis expansion: a target adapter of rank r gets k more rows of lora_A, so that training can leave its subspace.

A fusion changes lora_B alone, so what it learns lies in the row space of the anchor's lora_A. `--extra_rank k` adds k
rows to every lora_A, orthogonal to the anchor's and to each other, whose columns of lora_B are zero: the expanded
adapter computes what the anchor computes, the first r rows keep their bits and their scaling, and it is still a plain
LoRA adapter. k = 0 is the published method. How large the rows are, and where those of `--extra_basis activations`
lie, is measured on the inputs that the modules see on training data: see `method.basis`.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from heterofusion.adapters.alignment import AlignmentPlan, GroupKey
from heterofusion.adapters.config import AdapterError, rank_and_scaling
from heterofusion.adapters.lora import LoraAdapter
from heterofusion.method.config import BasisArguments
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.ranks import is_main_process

ANCHOR_NORM, INPUTS = "norm of the anchor's rows", "inputs"
BASIS_FILE = "extra_rows.safetensors"  # in a checkpoint: a resumed run has the rows of the run that it goes on with
_DEFAULT_NORM = 3**-0.5  # mean norm of a row of PEFT's first lora_A: uniform up to 1 / sqrt(in_features)


@dataclass(frozen=True)
class Expansion:
    """What was added to every module of an adapter, and on how many examples and tokens it was fitted."""

    extra_rank: int
    extra_basis: str
    seed: int
    scaled_by: str = ANCHOR_NORM
    examples: int = 0
    tokens: int = 0
    unreached: int = 0  # rows that no input reached; they have the anchor's norm

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class ExpandedAdapter(LoraAdapter):
    """An adapter with extra rows; name, folder, file and `sha256` are those of the anchor, as it was read."""

    anchor: LoraAdapter
    expansion: Expansion

    def expanded_sha256(self) -> str:
        """Hex SHA-256 over the paths and bytes of every lora_A, in layer order."""
        digest = hashlib.sha256()
        for path, module in self.modules.items():
            digest.update(path.encode())
            digest.update(module.lora_A.contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def extra_rows(self) -> dict[str, Tensor]:
        """The added rows by module path, each (k, in_features), in the file's dtype."""
        count = self.expansion.extra_rank
        return {path: module.lora_A[-count:].clone() for path, module in self.modules.items()}


def extra_rank(adapter: LoraAdapter) -> int:
    """Rows that were added to an adapter since it was read; 0 for one that was not expanded."""
    return adapter.expansion.extra_rank if isinstance(adapter, ExpandedAdapter) else 0


def expand_adapter(anchor: LoraAdapter, settings: BasisArguments, seed: int) -> ExpandedAdapter:
    """Add rows to every lora_A and zero columns to every lora_B of an adapter.

    The rows are random (Haar) in the orthogonal complement of the anchor's, the same for the same seed and path, and
    each has the mean norm of the anchor's rows. `fit_basis` gives them the size, and with `activations` the place,
    that belongs to real inputs. Scaling and dtypes stay; the config gets `lora_alpha` and patterns to go with the new
    ranks.
    """
    count = settings.extra_rank
    # More rows than out_features are no waste while lora_A is frozen: they are what an update can react to.
    path, least = min(anchor.modules.items(), key=lambda item: item[1].in_features - item[1].rank)
    room = max(0, least.in_features - least.rank)
    if count > room:
        raise AdapterError(
            f"--extra_rank is {count}, but {path} of {anchor.name} has {least.in_features} input features and rank "
            f"{least.rank} already, so no more than {room} rows are orthogonal to its own; give at most {room}"
        )
    # Silent for the first seconds, and on all ranks but the first.
    bar = tqdm(anchor.modules.items(), desc="Extra rank", delay=3, leave=False, disable=not is_main_process())
    rows = {
        path: random_directions(module.lora_A, count, seed, path) * anchor_norm(module.lora_A) for path, module in bar
    }
    return _expanded(anchor, rows, Expansion(count, settings.extra_basis, seed))


def with_rows(adapter: ExpandedAdapter, rows: Mapping[str, Tensor], expansion: Expansion) -> ExpandedAdapter:
    """An expanded adapter with other extra rows, (k, in_features) by module path."""
    return _expanded(adapter.anchor, rows, expansion)


def _expanded(anchor: LoraAdapter, rows: Mapping[str, Tensor], expansion: Expansion) -> ExpandedAdapter:
    config = expanded_config(anchor, expansion.extra_rank)
    modules = {
        path: replace(
            module,
            lora_A=torch.cat([module.lora_A, rows[path].to(module.lora_A)]),
            lora_B=torch.cat([module.lora_B, module.lora_B.new_zeros(module.out_features, len(rows[path]))], dim=1),
            scaling=rank_and_scaling(config, path)[1],
        )
        for path, module in anchor.modules.items()
    }
    own = {item.name: getattr(anchor, item.name) for item in fields(LoraAdapter)}
    return ExpandedAdapter(**own | {"config": config, "modules": modules}, anchor=anchor, expansion=expansion)


# ---- plans ------------------------------------------------------------------------------------------------------


def expand_plan(plan: AlignmentPlan, settings: BasisArguments, seed: int) -> AlignmentPlan:
    """The plan with its target expanded as the settings say, unless it is expanded already."""
    if settings.extra_rank == 0 or isinstance(plan.target, ExpandedAdapter):
        return plan
    return with_target(plan, expand_adapter(plan.target, settings, seed))


def with_target(plan: AlignmentPlan, target: LoraAdapter) -> AlignmentPlan:
    """The plan with the modules of another target, which has the same paths; ranks of groups follow it."""
    groups = {}
    for key, members in plan.groups.items():
        items = tuple(
            replace(item, target=replace(item.target, module=target.modules[item.target.module.path]))
            for item in members
        )
        groups[GroupKey(key.role, items[0].target.module.rank)] = items
    return replace(plan, target=target, groups=groups)


# ---- the config -------------------------------------------------------------------------------------------------


def expanded_config(anchor: LoraAdapter, count: int) -> dict[str, Any]:
    """`adapter_config.json` of an adapter whose every rank grows by `count`, with every module's scaling as it was.

    `lora_alpha` is what most modules need; the others are named in `alpha_pattern`.
    """
    config = dict(anchor.config)
    alphas = {
        path: scaled_alpha(module.scaling, module.rank + count, config["use_rslora"])
        for path, module in anchor.modules.items()
    }
    default = Counter(alphas.values()).most_common(1)[0][0]
    return config | {
        "r": config["r"] + count,
        "rank_pattern": {name: rank + count for name, rank in config["rank_pattern"].items()},
        "lora_alpha": default,
        "alpha_pattern": {path: alpha for path, alpha in alphas.items() if alpha != default},
    }


def set_ranks(config: LoraConfig, adapter: LoraAdapter) -> None:
    """Give PEFT's config of an adapter's file the ranks and alphas that the adapter has if it was expanded."""
    if isinstance(adapter, ExpandedAdapter):
        for name in ("r", "lora_alpha", "rank_pattern", "alpha_pattern"):
            setattr(config, name, adapter.config[name])


def scaled_alpha(scaling: float, rank: int, use_rslora: bool) -> float:
    """The `lora_alpha` that gives a scaling at a rank, exactly if a floating-point number does.

    Where none does in float64, the result is one that does in float32, in which PEFT applies it.
    """
    divisor = math.sqrt(rank) if use_rslora else rank
    alpha = scaling * divisor
    near = (alpha, math.nextafter(alpha, 0.0), math.nextafter(alpha, math.inf))
    best = min(near, key=lambda a: (np.float32(a / divisor) != np.float32(scaling), abs(a / divisor - scaling)))
    return int(best) if best.is_integer() else best


# ---- rows -------------------------------------------------------------------------------------------------------


def random_directions(A: Tensor, count: int, seed: int, path: str) -> Tensor:
    """Random orthonormal rows orthogonal to those of A: (count, in_features) float64, a stream per (seed, path)."""
    state = np.random.SeedSequence([seed, *path.encode()]).generate_state(1, np.uint64)[0]
    generator = torch.Generator().manual_seed(int(state))
    gaussian = torch.randn(count, A.shape[1], dtype=torch.float64, generator=generator)
    return orthogonal_rows(A, gaussian)


def orthogonal_rows(A: Tensor, directions: Tensor) -> Tensor:
    """Directions made orthonormal, in their order, and orthogonal to the rows of A.

    They are the last columns of Q in the (Householder) QR form of [A^T, directions^T]: orthonormal even where the rows
    of A are not independent. The signs are those of the directions. (count, in_features) to the same, in float64.
    """
    stacked = torch.cat([A.to(directions.device).double(), directions.double()])
    Q, R = torch.linalg.qr(stacked.T)  # (in, rank + count), (rank + count, rank + count)
    signs = torch.where(R.diagonal() < 0, -1.0, 1.0)
    return (Q * signs)[:, A.shape[0] :].T.contiguous()


def anchor_norm(A: Tensor) -> float:
    """Mean norm of the rows of A; that of a new lora_A if they are all zero."""
    norm = float(A.double().norm(dim=1).mean())
    return norm if norm > 0 else _DEFAULT_NORM


# ---- checkpoints ------------------------------------------------------------------------------------------------


def write_rows(folder: Path, adapter: LoraAdapter) -> None:
    """Write the extra rows of an adapter, and where they are from; nothing of one that was not expanded."""
    if isinstance(adapter, ExpandedAdapter):
        metadata = {"format": "pt", "expansion": json.dumps(adapter.expansion.to_dict())}
        save_file(adapter.extra_rows(), folder / BASIS_FILE, metadata)


def read_rows(folder: str | Path, adapter: ExpandedAdapter) -> ExpandedAdapter:
    """The adapter with the extra rows that `write_rows` wrote."""
    file = Path(folder).absolute() / BASIS_FILE
    try:
        with safe_open(file, "pt") as content:
            rows = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
            expansion = Expansion(**json.loads(content.metadata()["expansion"]))
    except (SafetensorError, OSError, TypeError, KeyError) as error:
        raise UserError(f"{file} cannot be read ({error}); resume from another checkpoint") from error
    return with_rows(adapter, rows, expansion)
