"""What a fusion is doing: scale of the updates, how much the gates close, which sources are attended to."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from heterofusion.adapters.alignment import AlignedSlice, adapter_depth
from heterofusion.method.expansion import extra_rank
from heterofusion.method.model import HeteroFusionModel
from heterofusion.runtime.files import display_name

DIAGNOSTICS_FILE = "diagnostics.json"


def diagnostic_logs(model: HeteroFusionModel) -> dict[str, float]:
    """The state of the fusion as flat log entries: `alpha/q_proj`, ..., `attention/<source>` over all roles."""
    groups = {key.name: key for key in model.plan.groups}
    roles = [key.role for key in groups.values()]
    shares = defaultdict(list)
    logs: dict[str, float] = {}
    for name, values in fusion_diagnostics(model).items():
        label = groups[name].role if roles.count(groups[name].role) == 1 else name
        for entry, value in values.items():
            if entry.startswith("attention/"):
                shares[int(entry.removeprefix("attention/"))].append(value)
            else:
                logs[f"{entry}/{label}"] = value
    for index, parts in sorted(shares.items()):
        source = display_name(model.plan.sources[index].name)
        logs[f"attention/{index + 1}-{source}"] = sum(parts) / len(parts)
    return logs


def fusion_diagnostics(model: HeteroFusionModel) -> dict[str, dict[str, float]]:
    """State of the fusion, by group name: one extra forward of the hypernetworks, on all ranks together.

    Args:
        model: the model, as it is now.

    Returns:
        Per group: `alpha`; `gate_sparsity`, the share of zeros in the sources' gates; `delta_ratio`,
        ||alpha dB|| / ||B|| over the group's modules; `attention/<i>`, the share of attention that B blocks give
        to source i (counted from 0).
    """
    report = {}
    for name, (alpha, slices) in _slice_diagnostics(model).items():
        sources, blocks = sum(part.source_blocks for part in slices), sum(part.b_blocks for part in slices)
        report[name] = {
            "alpha": alpha,
            "gate_sparsity": sum(part.gate_sparsity * part.source_blocks for part in slices) / sources,
            "delta_ratio": _ratio(slices),
        }
        for index in range(len(model.plan.sources)):
            share = sum(part.attention.get(index, 0.0) * part.b_blocks for part in slices)
            report[name][f"attention/{index}"] = share / blocks
    return report


def adapter_diagnostics(model: HeteroFusionModel) -> dict[str, Any]:
    """What `diagnostics.json` beside a fused adapter holds: the fusion module by module, for the report's pictures.

    Args:
        model: the trained model; all ranks together.

    Returns:
        `target` and `sources` with their names and layers, and `modules`: of each aligned module `path`, `role`,
        `layer`, `rank`, `delta_ratio` and `gate_sparsity` as in `fusion_diagnostics`, and `sources`, a list of the
        source (its index), its layer, and the share of attention that the module's B blocks give to it. With an
        `extra_rank` also `extra_share`: the share of ||alpha dB||^2 in the columns of the extra rows.
    """
    plan = model.plan
    modules: list[dict[str, Any]] = [
        {
            "path": part.item.target.module.path,
            "role": part.item.target.role,
            "layer": part.item.target.layer,
            "rank": part.item.target.module.rank,
            "delta_ratio": _ratio([part]),
            "gate_sparsity": part.gate_sparsity,
            "sources": [
                {"source": index, "layer": source.layer, "attention": part.attention[index]}
                for index, source in part.item.sources
            ],
            **({} if part.extra_share is None else {"extra_share": part.extra_share}),
        }
        for _, slices in _slice_diagnostics(model).values()
        for part in slices
    ]
    return {
        "target": {"name": display_name(plan.target.name), "layers": adapter_depth(plan.target)},
        "sources": [{"name": display_name(s.name), "layers": adapter_depth(s)} for s in plan.sources],
        "modules": modules,
    }


@dataclass(frozen=True)
class _SliceDiagnostics:
    """State of one aligned slice.

    Attributes:
        item: the slice.
        update_norm: ||alpha dB||.
        weight_norm: ||B||.
        gate_sparsity: share of zeros in the gates of its source blocks.
        attention: by source, the share of attention of its B blocks.
        source_blocks: number of its source blocks.
        b_blocks: number of its B blocks.
        extra_share: share of ||alpha dB||^2 in the columns of extra rows; None without any.
    """

    item: AlignedSlice
    update_norm: float
    weight_norm: float
    gate_sparsity: float
    attention: dict[int, float]
    source_blocks: int
    b_blocks: int
    extra_share: float | None


def _ratio(slices: Sequence[_SliceDiagnostics]) -> float:
    """||alpha dB|| / ||B|| over some slices."""
    update, weight = (math.hypot(*(getattr(part, name) for part in slices)) for name in ("update_norm", "weight_norm"))
    return update / max(weight, 1e-12)


@torch.no_grad()
def _slice_diagnostics(model: HeteroFusionModel) -> dict[str, tuple[float, list[_SliceDiagnostics]]]:
    """Alpha and the state of every aligned slice, by group name: one forward of the hypernetworks."""
    report = {}
    extra = extra_rank(model.plan.target)
    for name, output in model.updates.predict(diagnostics=True).items():
        context = model.updates.contexts[name]
        assert output.attention is not None and output.source_gate is not None and output.alpha is not None
        origin = context.source_of_block  # (M, N_s)
        real = origin >= 0
        closed = (output.source_gate == 0).float().mean(-1)  # (M, N_s)
        sparsity = ((closed * real).sum(-1) / real.sum(-1)).tolist()
        counts = torch.tensor(context.b_blocks, device=origin.device)
        rows = output.attention.flatten(0, 1)[context.decode_index]  # (T, N_s)
        module = torch.arange(len(counts), device=origin.device).repeat_interleave(counts)  # (T,)
        shares = []  # (M,) per source
        for index in range(len(model.plan.sources)):
            share = (rows * (origin[module] == index)).sum(-1)
            shares.append((share.new_zeros(len(counts)).index_add(0, module, share) / counts).tolist())
        # padded rows are part of the blocks but not of the update: cut them as the update does
        updates = [
            blocks.flatten(0, 1)[: item.target.out_features]
            for item, blocks in zip(context.members, output.update.split(context.b_blocks), strict=True)
        ]
        norms = torch.stack([update.norm() for update in updates]).tolist()
        extra_norms = torch.stack([update[:, update.shape[1] - extra :].norm() for update in updates]).tolist()
        slices = [
            _SliceDiagnostics(
                item,
                norms[position],
                float(item.target.lora_B.float().norm()),
                sparsity[position],
                {index: shares[index][position] for index, _ in item.sources},
                int(real[position].sum()),
                context.b_blocks[position],
                (extra_norms[position] / max(norms[position], 1e-12)) ** 2 if extra else None,
            )
            for position, item in enumerate(context.members)
        ]
        report[name] = (float(output.alpha), slices)
    return report
