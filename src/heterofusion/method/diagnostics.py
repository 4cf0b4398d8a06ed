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


@dataclass(frozen=True)
class SliceState:
    """State of one aligned slice."""

    item: AlignedSlice
    update_norm: float  # ||alpha dB||
    extra_norm: float  # the same in the columns of extra rows
    weight_norm: float  # ||B||
    gate_sparsity: float  # share of zeros in the gates of its source blocks
    attention: dict[int, float]  # by source, the share of attention of its B blocks
    source_blocks: int
    b_blocks: int


@torch.no_grad()
def slice_states(model: HeteroFusionModel) -> dict[str, tuple[float, list[SliceState]]]:
    """Alpha and the state of every aligned slice, by group name: one forward of the hypernetworks, on all ranks."""
    report = {}
    extra = extra_rank(model.plan.target)
    predictor = model.updates.predictor
    for name, output in predictor.predict(diagnostics=True).items():
        context = predictor.contexts[name]
        assert output.attention is not None and output.source_gate is not None and output.alpha is not None
        origin = context.source_of_block  # (M, N_s)
        real = (origin >= 0).float()
        closed = (output.source_gate == 0).float().mean(-1)  # (M, N_s)
        sparsity = (closed * real).sum(-1) / real.sum(-1)
        attention = output.attention.flatten(0, 1)[context.inputs.decode_index].split(context.b_blocks)
        updates = output.update.split(context.b_blocks)
        rows = []
        for position, item in enumerate(context.members):
            # padded rows are part of the blocks but not of the update: cut them as the update does
            update = updates[position].flatten(0, 1)[: item.target.out_features]
            extra_columns = update[:, update.shape[1] - extra :]
            figures = [update.norm(), extra_columns.norm(), sparsity[position], real[position].sum()]
            weights = attention[position].mean(0)  # (N_s,), 0 at padding
            shares = weights.new_zeros(len(model.plan.sources)).index_add(0, origin[position].clamp(min=0), weights)
            rows.append(torch.cat([torch.stack(figures), shares]))
        states = [
            SliceState(
                item,
                update_norm,
                extra_norm,
                float(item.target.lora_B.float().norm()),
                closed_share,
                {index: shares[index] for index, _ in item.sources},
                int(blocks),
                b_blocks,
            )
            for item, b_blocks, (update_norm, extra_norm, closed_share, blocks, *shares) in zip(
                context.members, context.b_blocks, torch.stack(rows).tolist(), strict=True
            )  # one wait for the device
        ]
        report[name] = (float(output.alpha), states)
    return report


def fusion_diagnostics(model: HeteroFusionModel) -> dict[str, dict[str, float]]:
    """State of the fusion, by group name: one extra forward of the hypernetworks, on all ranks together.

    Per group: `alpha`; `gate_sparsity`, the share of zeros in the sources' gates; `delta_ratio`, ||alpha dB|| / ||B||
    over the group's modules; `attention/<i>`, the share of attention that B blocks give to source i (counted from 0).
    """
    report = {}
    for name, (alpha, states) in slice_states(model).items():
        sources, blocks = sum(state.source_blocks for state in states), sum(state.b_blocks for state in states)
        report[name] = {
            "alpha": alpha,
            "gate_sparsity": sum(state.gate_sparsity * state.source_blocks for state in states) / sources,
            "delta_ratio": _ratio(states),
        }
        for index in range(len(model.plan.sources)):
            share = sum(state.attention.get(index, 0.0) * state.b_blocks for state in states)
            report[name][f"attention/{index}"] = share / blocks
    return report


def diagnostic_logs(model: HeteroFusionModel) -> dict[str, float]:
    """The state of the fusion as flat log entries: `alpha/q_proj`, ..., `attention/<source>` over all roles."""
    roles = {key.name: key.role for key in model.plan.groups}
    shares = defaultdict(list)
    logs: dict[str, float] = {}
    for name, values in fusion_diagnostics(model).items():
        label = roles[name] if list(roles.values()).count(roles[name]) == 1 else name
        for entry, value in values.items():
            if entry.startswith("attention/"):
                shares[int(entry.removeprefix("attention/"))].append(value)
            else:
                logs[f"{entry}/{label}"] = value
    for index, parts in sorted(shares.items()):
        source = display_name(model.plan.sources[index].name)
        logs[f"attention/{index + 1}-{source}"] = sum(parts) / len(parts)
    return logs


def adapter_diagnostics(model: HeteroFusionModel) -> dict[str, Any]:
    """What `diagnostics.json` beside a fused adapter holds: the fusion module by module, for the report's pictures.

    `modules` tells of each aligned module its figures as in `fusion_diagnostics`, the share of attention that its B
    blocks give to each of its `sources`, and with an `extra_rank` the share of ||alpha dB||^2 in the extra columns.
    """
    plan = model.plan
    modules = []
    for state in [state for _, states in slice_states(model).values() for state in states]:
        target = state.item.target
        row = {
            "path": target.module.path,
            "role": target.role,
            "layer": target.layer,
            "rank": target.module.rank,
            "delta_ratio": _ratio([state]),
            "gate_sparsity": state.gate_sparsity,
            "sources": [
                {"source": index, "layer": source.layer, "attention": state.attention[index]}
                for index, source in state.item.sources
            ],
        }
        if extra_rank(plan.target):
            row["extra_share"] = (state.extra_norm / max(state.update_norm, 1e-12)) ** 2
        modules.append(row)
    return {
        "target": {"name": display_name(plan.target.name), "layers": adapter_depth(plan.target)},
        "sources": [{"name": display_name(s.name), "layers": adapter_depth(s)} for s in plan.sources],
        "modules": modules,
    }


def _ratio(states: Sequence[SliceState]) -> float:
    """||alpha dB|| / ||B|| over some slices."""
    update = math.hypot(*(state.update_norm for state in states))
    return update / max(math.hypot(*(state.weight_norm for state in states)), 1e-12)
