"""The alignment plan for people and for machines: what feeds what, what stays, what it costs. No weights needed."""

from collections import Counter
from typing import Any

import torch

from heterofusion.adapters.alignment import AlignedSlice, AlignmentPlan, RoleSlice, adapter_depth
from heterofusion.adapters.controls import control_record, describe_control
from heterofusion.method.config import FORMS, HypernetworkConfig, MethodConfig
from heterofusion.method.contexts import predicted_blocks, sequence_lengths, source_factors
from heterofusion.method.expansion import expand_plan, extra_rank
from heterofusion.method.hypernet import HyperNetworks
from heterofusion.method.model import target_width

_FLOAT = 4  # bytes of a float32


def plan_summary(plan: AlignmentPlan, method: MethodConfig) -> dict[str, Any]:
    """A plan as plain values.

    Returns:
        `target`, `extra_rank` and `extra_basis` (None without), `source_control` (None, or as `control_record` has
        it), `sources` (layers, offset, modules used and not, with reasons), `modules` (which source module feeds which
        target module, ranks, scalings, truncated energy), `untouched` with reasons, `groups`, and `forms`
        (parameters and bytes of the hypernetworks in each form).
    """
    plan = expand_plan(plan, method, seed=0)  # of ranks and sizes, on which the seed has no influence
    modules = [_module_row(item, plan, method) for item in plan.aligned]
    return {
        "target": {
            "name": plan.target.name,
            "base_model": plan.target.base_model,
            "sha256": plan.target.sha256,
            "layers": adapter_depth(plan.target),
            "lora_modules": len(plan.target.modules),
        },
        "layer_alignment": plan.layer_alignment,
        "transfer_ratio": str(plan.transfer_ratio),
        "canonicalize": method.canonicalize,
        "extra_rank": method.extra_rank,
        "extra_basis": method.extra_basis if method.extra_rank else None,
        "source_control": control_record(plan.sources),
        "sources": [_source_row(index, plan, modules) for index in range(len(plan.sources))],
        "groups": {
            key.name: {"role": key.role, "rank": key.rank, "modules": len(members)}
            for key, members in plan.groups.items()
        },
        "modules": modules,
        "untouched": plan.untouched,
        "preset": method.preset,
        "form": method.form,
        "forms": {name: form_cost(plan, method, name) for name in FORMS},
    }


def _module_row(item: AlignedSlice, plan: AlignmentPlan, method: MethodConfig) -> dict[str, Any]:
    target = item.target
    own = target.module.rank - extra_rank(plan.target)  # the rank that sources are brought to
    row = {**_slice_row(target), "sources_at_rank": own, "sources": []}
    for index, source in item.sources:
        _, _, truncated = source_factors(source, own, target.module.scaling, method.canonicalize)
        row["sources"].append({"source": index + 1, **_slice_row(source), "truncated_energy": truncated})
    return row


def _slice_row(item: RoleSlice) -> dict[str, Any]:
    return {
        "module": item.module.path,
        "layer": item.layer,
        "role": item.role,
        "fused": item.rows is not None,
        "rank": item.module.rank,
        "scaling": item.module.scaling,
        "in_features": item.module.in_features,
        "out_features": item.out_features,
    }


def _source_row(index: int, plan: AlignmentPlan, modules: list[dict[str, Any]]) -> dict[str, Any]:
    source, pairs = plan.sources[index], plan.layer_maps[index]
    used = [part for row in modules for part in row["sources"] if part["source"] == index + 1]
    offsets = {target - layer for target, layer in pairs.items()}
    return {
        "name": source.name,
        "base_model": source.base_model,
        "sha256": source.sha256,
        "layer_map": {str(target): layer for target, layer in pairs.items()},
        "layer_offset": offsets.pop() if len(offsets) == 1 else None,
        "links": len(used),
        "max_truncated_energy": max((part["truncated_energy"] for part in used), default=0.0),
        "unused": plan.unused[index],
        "ignored_tensors": sorted(source.extra_tensors),
    }


def form_cost(plan: AlignmentPlan, method: MethodConfig, form: str) -> dict[str, Any]:
    """Size of the hypernetworks of one form; the method's own sizes apply to both.

    Returns:
        Sizes, `parameters`, and bytes of weights, gradients, AdamW states, activations (an estimate of what one
        forward with gradient keeps) and of all updates dB.
    """
    config = HypernetworkConfig.fitted(form, target_width(plan), method)
    predicted = predicted_blocks(plan, config.block_size)
    with torch.device("meta"):
        networks = HyperNetworks({key.name: key.rank for key in plan.groups}, config, blocks=predicted)
    size = _FLOAT * sum(parameter.numel() for parameter in networks.parameters())
    lengths = sequence_lengths(plan, config.block_size)
    floats = 0
    for key, members in plan.groups.items():
        block = config.block_size * key.rank
        width = block if form == "paper" else (config.row_features + key.rank) * config.column_features * 2
        floats += len(members) * 2 * lengths[key.name] * (width + 14 * config.embed_dim)
        floats += predicted[key.name] * 2 * block
    return {
        **config.to_dict(),
        "parameters": size // _FLOAT,
        "weight_bytes": size,
        "gradient_bytes": size,
        "optimizer_bytes": 2 * size,
        "activation_bytes_estimate": _FLOAT * floats,
        "delta_bytes": _FLOAT * sum(item.target.out_features * item.target.module.rank for item in plan.aligned),
        "longest_sequence": max(lengths.values()),
        "fits_positions": max(lengths.values()) <= config.max_position_embeddings,
    }


def format_plan(summary: dict[str, Any]) -> str:
    """The summary as text for a terminal."""
    target, control = summary["target"], summary["source_control"]
    lines = [] if control is None else [f"CONTROL: {describe_control(control)}"]
    lines.append(
        f"target  {target['name']}  (base {target['base_model'] or 'not named'}, {target['layers']} layers, "
        f"{target['lora_modules']} LoRA modules)"
    )
    for number, source in enumerate(summary["sources"], start=1):
        offset = source["layer_offset"]
        where = f"layer offset {offset:+d}" if offset is not None else "layers scaled"
        lines.append(
            f"source {number}  {source['name']}  (base {source['base_model'] or 'not named'}, {where}, "
            f"{source['links']} links, truncated energy at most {source['max_truncated_energy']:.2%})"
        )
    lines += ["", f"alignment: {summary['layer_alignment']}, transfer ratio {summary['transfer_ratio']}"]
    if summary["extra_rank"]:
        lines.append(f"extra rank: {summary['extra_rank']} ({summary['extra_basis']}), counted in the target's")
    lines += ["", *_table(
        ("layer", "role", "target module", "rank", "scaling", "sources (number: layer, module, rank, scaling)"),
        [(row["layer"], row["role"], row["module"], row["rank"], f"{row['scaling']:g}", _sources_text(row))
         for row in summary["modules"]],
    )]  # fmt: skip
    lines += _by_reason("untouched target modules", summary["untouched"])
    for number, source in enumerate(summary["sources"], start=1):
        lines += _by_reason(f"unused modules of source {number}", source["unused"])
        if source["ignored_tensors"]:
            lines += ["", f"source {number}: ignored outside LoRA: {', '.join(source['ignored_tensors'])}"]
    of_run = f"preset of this run: {summary['preset']}, form {summary['form']}"
    header = (
        "form", "b", "e", "heads", "positions", "parameters", "weights", "gradients", "AdamW", "activations ~", "dB"
    )  # fmt: skip
    lines += ["", f"hypernetworks ({len(summary['groups'])} groups; {of_run})"]
    lines += _table(header, [(name, *_cost_cells(cost)) for name, cost in summary["forms"].items()])
    return "\n".join(lines)


def _cost_cells(cost: dict[str, Any]) -> tuple[Any, ...]:
    positions = f"{cost['longest_sequence']}/{cost['max_position_embeddings']}"
    positions += "" if cost["fits_positions"] else " TOO LONG"
    kinds = ("weight_bytes", "gradient_bytes", "optimizer_bytes", "activation_bytes_estimate", "delta_bytes")
    sizes = (f"{cost[kind] / 2**20:,.1f} MiB" for kind in kinds)
    return cost["block_size"], cost["embed_dim"], cost["num_heads"], positions, f"{cost['parameters']:,}", *sizes


def _sources_text(row: dict[str, Any]) -> str:
    parts = []
    for source in row["sources"]:
        name = source["module"].rpartition(".")[2] + (f"[{source['role']}]" if source["fused"] else "")
        text = f"{source['source']}: {source['layer']} {name} r{source['rank']} s{source['scaling']:g}"
        if source["rank"] != row["sources_at_rank"]:
            text += f" (re-factored, cut {source['truncated_energy']:.2%})"
        parts.append(text)
    return "; ".join(parts)


def _by_reason(what: str, modules: dict[str, str]) -> list[str]:
    examples = {reason: path for path, reason in reversed(modules.items())}
    lines = [
        f"  {count:4d}  {reason}  (such as {examples[reason]})"
        for reason, count in Counter(modules.values()).most_common()
    ]
    return ["", f"{what} ({len(modules)}):", *lines] if modules else []


def _table(header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> list[str]:
    cells = [header, *[tuple(map(str, row)) for row in rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]
