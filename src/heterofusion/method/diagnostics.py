"""What a fusion is doing: scale of the updates, how much the gates close, which sources are attended to."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from heterofusion.adapters.alignment import AlignedSlice, adapter_depth
from heterofusion.method.expansion import extra_rank
from heterofusion.method.model import HeteroFusionModel
from heterofusion.runtime.files import display_name

DIAGNOSTICS_FILE = "diagnostics.json"


class SliceState(NamedTuple):
    """State of one aligned slice."""

    item: AlignedSlice
    b_blocks: int
    weight_norm: float  # ||B||
    update_norm: float  # ||alpha dB||
    extra_norm: float  # the same in the columns of extra rows
    gate_sparsity: float  # share of zeros in the gates of its source blocks
    source_blocks: float
    attention: list[float]  # per source of the plan, the share of attention of the slice's B blocks


@torch.no_grad()
def _slice_states(model: HeteroFusionModel) -> dict[str, tuple[float, list[SliceState]]]:
    """Alpha and the state of every aligned slice, by group name: one forward of the hypernetworks, on all ranks."""
    report = {}
    extra = extra_rank(model.plan.target)
    predictor = model.updates.predictor
    for name, output in predictor.predict(diagnostics=True).items():
        context = predictor.contexts[name]
        assert output.attention is not None and output.source_gate is not None and output.alpha is not None
        origin = context.source_of_block  # (M, N_s)
        real = (origin >= 0).float()
        zeros = (output.source_gate == 0).float().mean(-1)  # (M, N_s)
        sparsity = (zeros * real).sum(-1) / real.sum(-1)
        attention = output.attention.flatten(0, 1)[context.inputs.decode_index].split(context.b_blocks)
        rows = []
        for position, (item, blocks) in enumerate(
            zip(context.members, output.update.split(context.b_blocks), strict=True)
        ):
            # padded rows are part of the blocks but not of the update: cut them as the update does
            update = blocks.flatten(0, 1)[: item.target.out_features]
            extra_columns = update[:, update.shape[1] - extra :]
            figures = [update.norm(), extra_columns.norm(), sparsity[position], real[position].sum()]
            weights = attention[position].mean(0)  # (N_s,), 0 at padding
            shares = weights.new_zeros(len(model.plan.sources)).index_add(0, origin[position].clamp(min=0), weights)
            rows.append(torch.cat([torch.stack(figures), shares]))
        states = [
            SliceState(
                item, count, float(item.target.lora_B.float().norm()), update, extra_part, closed, blocks, shares
            )
            for item, count, (update, extra_part, closed, blocks, *shares) in zip(
                context.members, context.b_blocks, torch.stack(rows).tolist(), strict=True
            )  # one wait for the device
        ]
        report[name] = (float(output.alpha), states)
    return report


def diagnostic_logs(model: HeteroFusionModel) -> dict[str, float]:
    """The state of the fusion as log entries: per role, or role and rank, and attention to each source over all roles.

    `alpha`; `gate_sparsity`, the share of zeros in the sources' gates; `delta_ratio`, ||alpha dB|| / ||B||;
    `attention/<source>`, the share of attention that B blocks give to it. All ranks together.
    """
    logs: dict[str, float] = {}
    roles = [key.role for key in model.plan.groups]
    names = {key.name: key.role if roles.count(key.role) == 1 else key.name for key in model.plan.groups}
    shares = []
    for name, (alpha, states) in _slice_states(model).items():
        logs[f"alpha/{names[name]}"] = alpha
        source_blocks = [state.source_blocks for state in states]
        closed = np.average([state.gate_sparsity for state in states], weights=source_blocks)
        logs[f"gate_sparsity/{names[name]}"] = float(closed)
        logs[f"delta_ratio/{names[name]}"] = _ratio(states)
        b_blocks = [state.b_blocks for state in states]
        shares.append(np.average([state.attention for state in states], axis=0, weights=b_blocks))
    for number, (source, share) in enumerate(zip(model.plan.sources, np.mean(shares, axis=0), strict=True), start=1):
        logs[f"attention/{number}-{display_name(source.name)}"] = float(share)
    return logs


def adapter_diagnostics(model: HeteroFusionModel) -> dict[str, Any]:
    """What `diagnostics.json` beside a fused adapter holds: the fusion module by module, for the report's pictures.

    `modules` tells of each aligned module its figures as in `diagnostic_logs`, the share of attention that its B
    blocks give to each of its `sources`, and with an `extra_rank` the share of ||alpha dB||^2 in the extra columns.
    """
    plan = model.plan
    modules = []
    for state in [state for _, states in _slice_states(model).values() for state in states]:
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
    target_and_sources = [
        {"name": display_name(a.name), "layers": adapter_depth(a)} for a in (plan.target, *plan.sources)
    ]
    return {"target": target_and_sources[0], "sources": target_and_sources[1:], "modules": modules}


def _ratio(states: Sequence[SliceState]) -> float:
    """||alpha dB|| / ||B|| over some slices."""
    update = math.hypot(*(state.update_norm for state in states))
    return update / max(math.hypot(*(state.weight_norm for state in states)), 1e-12)
