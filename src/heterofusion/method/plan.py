"""The alignment plan for people and for machines: what feeds what, what stays, what it costs. No weights needed."""

from collections import Counter
from typing import Any

import torch

from heterofusion.adapters.alignment import AlignmentPlan, RoleSlice, adapter_depth
from heterofusion.adapters.controls import control_record, describe_control
from heterofusion.adapters.lora import LoraAdapter
from heterofusion.method.config import FORMS, HypernetworkConfig, MethodConfig
from heterofusion.method.contexts import predicted_blocks, sequence_lengths, source_factors
from heterofusion.method.expansion import expand_plan, extra_rank
from heterofusion.method.hypernet import HyperNetworks
from heterofusion.method.model import target_width


def plan_summary(plan: AlignmentPlan, method: MethodConfig) -> dict[str, Any]:
    """A plan as plain values: target, sources, which source module feeds which target module, what stays untouched
    and why, and the parameters and bytes of the hypernetworks in each form."""
    plan = expand_plan(plan, method, seed=0)  # of ranks and sizes, on which the seed has no influence
    modules = []
    for item in plan.aligned:
        own = item.target.module.rank - extra_rank(plan.target)  # the rank that sources are brought to
        sources = []
        for index, source in item.sources:
            truncated = source_factors(source, own, item.target.module.scaling, method.canonicalize)[2]
            sources.append({"source": index + 1, **_slice_row(source), "truncated_energy": truncated})
        modules.append({**_slice_row(item.target), "sources_at_rank": own, "sources": sources})
    return {
        "target": _adapter_row(plan.target) | {"lora_modules": len(plan.target.modules)},
        "layer_alignment": plan.layer_alignment,
        "transfer_ratio": str(plan.transfer_ratio),
        "canonicalize": method.canonicalize,
        "extra_rank": method.extra_rank,
        "extra_basis": method.extra_basis if method.extra_rank else None,
        "source_control": control_record(plan.sources),
        "sources": [
            _adapter_row(source) | _source_row(plan, index, modules) for index, source in enumerate(plan.sources)
        ],
        "groups": {key.name: len(members) for key, members in plan.groups.items()},
        "modules": modules,
        "untouched": plan.untouched,
        "preset": method.preset,
        "form": method.form,
        "forms": {name: _form_cost(plan, method, name) for name in FORMS},
    }


def _slice_row(item: RoleSlice) -> dict[str, Any]:
    own = {"module": item.module.path, "layer": item.layer, "role": item.role, "fused": item.rows is not None}
    return own | {"rank": item.module.rank, "scaling": item.module.scaling}


def _adapter_row(adapter: LoraAdapter) -> dict[str, Any]:
    names = {"name": adapter.name, "base_model": adapter.base_model, "sha256": adapter.sha256}
    return names | {"layers": adapter_depth(adapter)}


def _source_row(plan: AlignmentPlan, index: int, modules: list[dict[str, Any]]) -> dict[str, Any]:
    pairs = plan.layer_maps[index]
    used = [part for row in modules for part in row["sources"] if part["source"] == index + 1]
    offsets = {target - layer for target, layer in pairs.items()}
    return {
        "layer_map": {str(target): layer for target, layer in pairs.items()},
        "layer_offset": offsets.pop() if len(offsets) == 1 else None,
        "links": len(used),
        "max_truncated_energy": max((part["truncated_energy"] for part in used), default=0.0),
        "unused": plan.unused[index],
        "ignored_tensors": sorted(plan.sources[index].extra_tensors),
    }


def _form_cost(plan: AlignmentPlan, method: MethodConfig, form: str) -> dict[str, Any]:
    """Sizes, parameters and bytes of the hypernetworks of one form; activations are an estimate of one forward's."""
    config = HypernetworkConfig.fitted(form, target_width(plan), method)
    predicted, lengths = predicted_blocks(plan, config.block_size), sequence_lengths(plan, config.block_size)
    with torch.device("meta"):
        networks = HyperNetworks({key.name: key.rank for key in plan.groups}, config, blocks=predicted)
    parameters = sum(parameter.numel() for parameter in networks.parameters())
    floats = 0
    for key, members in plan.groups.items():
        block = config.block_size * key.rank
        width = block if form == "paper" else (config.row_features + key.rank) * config.column_features * 2
        floats += len(members) * 2 * lengths[key.name] * (width + 14 * config.embed_dim)
        floats += predicted[key.name] * 2 * block
    return {
        **config.to_dict(),
        "parameters": parameters,
        "weight_bytes": 4 * parameters,
        "gradient_bytes": 4 * parameters,
        "optimizer_bytes": 8 * parameters,
        "activation_bytes_estimate": 4 * floats,
        "delta_bytes": 4 * sum(item.target.out_features * item.target.module.rank for item in plan.aligned),
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
    rows: list[tuple[Any, ...]] = [
        ("layer", "role", "target module", "rank", "scaling", "sources (number: layer, module, rank, scaling)")
    ]
    for row in summary["modules"]:
        fed = "; ".join(_source_text(source, row["sources_at_rank"]) for source in row["sources"])
        rows.append((row["layer"], row["role"], row["module"], row["rank"], f"{row['scaling']:g}", fed))
    lines += ["", *_table(rows), *_by_reason("untouched target modules", summary["untouched"])]
    for number, source in enumerate(summary["sources"], start=1):
        lines += _by_reason(f"unused modules of source {number}", source["unused"])
        if source["ignored_tensors"]:
            lines += ["", f"source {number}: ignored outside LoRA: {', '.join(source['ignored_tensors'])}"]
    lines += ["", f"hypernetworks ({len(summary['groups'])} groups; preset of this run: {summary['preset']}, "
              f"form {summary['form']})"]  # fmt: skip
    costs = ("weight_bytes", "gradient_bytes", "optimizer_bytes", "activation_bytes_estimate", "delta_bytes")
    rows = [("form", "b", "e", "heads", "positions", "parameters",
             "weights", "gradients", "AdamW", "activations ~", "dB")]  # fmt: skip
    for name, cost in summary["forms"].items():
        positions = f"{cost['longest_sequence']}/{cost['max_position_embeddings']}"
        positions += "" if cost["fits_positions"] else " TOO LONG"
        sizes = (cost["block_size"], cost["embed_dim"], cost["num_heads"], positions, f"{cost['parameters']:,}")
        rows.append((name, *sizes, *(f"{cost[kind] / 2**20:,.1f} MiB" for kind in costs)))
    return "\n".join([*lines, *_table(rows)])


def _source_text(source: dict[str, Any], rank: int) -> str:
    name = source["module"].rpartition(".")[2] + (f"[{source['role']}]" if source["fused"] else "")
    text = f"{source['source']}: {source['layer']} {name} r{source['rank']} s{source['scaling']:g}"
    return text if source["rank"] == rank else f"{text} (re-factored, cut {source['truncated_energy']:.2%})"


def _by_reason(what: str, modules: dict[str, str]) -> list[str]:
    examples = {reason: path for path, reason in reversed(modules.items())}
    counts = Counter(modules.values()).most_common()
    lines = [f"  {count:4d}  {reason}  (such as {examples[reason]})" for reason, count in counts]
    return ["", f"{what} ({len(modules)}):", *lines] if modules else []


def _table(rows: list[tuple[Any, ...]]) -> list[str]:
    """Rows as lines, the first one underlined."""
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows, strict=True)]
    rows = [rows[0], tuple("-" * width for width in widths), *rows[1:]]
    return ["  ".join(str(c).ljust(width) for c, width in zip(row, widths, strict=True)).rstrip() for row in rows]
