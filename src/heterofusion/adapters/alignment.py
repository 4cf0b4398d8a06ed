"""Which source module feeds which target module: the alignment plan (METHOD: topology-based alignment).

A module's key is (layer, role, suffix). Layers are mapped between models of different depth, roles between models
of different naming; fused projections take part role by role. The plan also records what stays untouched and why.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, NamedTuple

from torch import Tensor
from transformers import (
    PretrainedConfig,
)

from heterofusion.adapters.architectures import (
    ModuleKey,
    module_keys,
    read_source_configs,
    read_target_config,
    role_rows,
)
from heterofusion.adapters.controls import control_sources
from heterofusion.adapters.lora import AdapterError, LoraAdapter, LoraModule, load_adapter
from heterofusion.runtime.errors import UserError


@dataclass
class AdapterArguments:
    """Which adapters are fused."""

    target_adapter: str = field(metadata={"help": "Target adapter (the anchor): local folder or Hub id."})
    source_adapters: list[str] = field(
        metadata={"help": "Source adapters of any family, in order: local folders or Hub ids."}
    )
    source_configs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Base model (folder, config.json or Hub id) of each source, 'none' where not needed; only fused "
            "projections need it, and base_model_name_or_path is followed by default."
        },
    )
    target_revision: str | None = field(default=None, metadata={"help": "Hub revision of the target adapter."})
    source_control: str | None = field(
        default=None,
        metadata={
            "help": "Replace the sources' tensors, to see what the sources contribute: noise (random directions of "
            "the same norms and spectra), shuffle (the right tensors in the wrong modules) or zero; --seed draws. The "
            "result is a control, no fusion of the sources.",
            "choices": ["noise", "shuffle", "zero"],
        },
    )
    allow_pickle: bool = field(
        default=False, metadata={"help": "Also read adapter_model.bin, with weights_only=True."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run model code from the Hub for the target's base; sources never need it."}
    )


logger = logging.getLogger(__name__)

LAYER_ALIGNMENTS = ("tail", "proportional")
_OUTSIDE = "outside the decoder layers"


class GroupKey(NamedTuple):
    """Modules of one role and rank share a hypernetwork."""

    role: str
    rank: int

    @property
    def name(self) -> str:
        """A name that is valid as a submodule name."""
        return f"{self.role}_r{self.rank}"


@dataclass(frozen=True)
class RoleSlice:
    """The part of a LoRA module that does one role: all of it, or some rows of a fused projection's B.

    Attributes:
        module: the LoRA module.
        layer: its layer index.
        role: the role.
        suffix: its path inside the layer.
        rows: int64 row indices of `lora_B`, None for all.
    """

    module: LoraModule
    layer: int
    role: str
    suffix: str
    rows: Tensor | None = None

    @property
    def lora_B(self) -> Tensor:
        """(rows, rank): the rows of B that belong to the role."""
        return self.module.lora_B if self.rows is None else self.module.lora_B[self.rows]

    @property
    def out_features(self) -> int:
        return self.module.out_features if self.rows is None else len(self.rows)


@dataclass(frozen=True)
class AlignedSlice:
    """A target slice and the source slices that feed it, in the order the user gave the sources."""

    target: RoleSlice
    sources: tuple[tuple[int, RoleSlice], ...]


@dataclass(frozen=True)
class AlignmentPlan:
    """The result of `plan_alignment`.

    Attributes:
        target: the target adapter.
        sources: the source adapters.
        groups: aligned slices by (role, rank), in layer order; one hypernetwork each.
        layer_maps: per source, the kept pairs target layer -> source layer.
        untouched: target modules (or roles of fused ones) that keep their B, with the reason.
        unused: per source, modules that feed nothing, with the reason.
        layer_alignment: `tail` or `proportional`.
        transfer_ratio: share of the layer pairs kept, from the top.
    """

    target: LoraAdapter
    sources: tuple[LoraAdapter, ...]
    groups: dict[GroupKey, tuple[AlignedSlice, ...]]
    layer_maps: tuple[dict[int, int], ...]
    untouched: dict[str, str] = field(default_factory=dict)
    unused: tuple[dict[str, str], ...] = ()
    layer_alignment: str = "tail"
    transfer_ratio: Fraction = Fraction(1)

    @property
    def aligned(self) -> list[AlignedSlice]:
        """All aligned slices."""
        return [item for members in self.groups.values() for item in members]


def parse_transfer_ratio(value: float | str | Fraction) -> Fraction:
    """Read a transfer ratio such as 0.5 or "1/2".

    Raises:
        ValueError: it is not a number in (0, 1].
    """
    try:
        ratio = Fraction(value)
        if isinstance(value, float):  # 0.3 means 3/10, not the binary number beside it
            ratio = ratio.limit_denominator(10**6) or ratio
    except (TypeError, ValueError, ZeroDivisionError, OverflowError):
        raise UserError(f"transfer_ratio is {value!r}; give a number such as 0.5, or a fraction such as 1/2") from None
    if not 0 < ratio <= 1:
        raise UserError(f"transfer_ratio is {value}; it must be above 0 and at most 1")
    return ratio


def map_layers(target_layers: int, source_layers: int, alignment: str, ratio: Fraction) -> dict[int, int]:
    """Pairs target layer -> source layer of one source, after the transfer ratio.

    `tail`: target layer i takes source layer i - (L_t - L_s) where that exists.
    `proportional`: every target layer i takes source layer round(i (L_s - 1) / (L_t - 1)).
    Of the n pairs, in layer order, the last max(1, int(n * ratio)) are kept.

    Raises:
        ValueError: unknown alignment.
    """
    if alignment == "tail":
        offset = target_layers - source_layers
        pairs = [(i, i - offset) for i in range(target_layers) if i >= offset]
    elif alignment == "proportional":
        last = target_layers - 1
        pairs = [
            (i, int(Fraction(i * (source_layers - 1), last) + Fraction(1, 2)) if last else source_layers - 1)
            for i in range(target_layers)
        ]
    else:
        raise UserError(f"layer_alignment is {alignment!r}; choose one of {', '.join(LAYER_ALIGNMENTS)}")
    return dict(pairs[-max(1, int(len(pairs) * ratio)) :])


def plan_alignment(
    target: LoraAdapter,
    sources: Sequence[LoraAdapter],
    *,
    layer_alignment: str = "tail",
    transfer_ratio: float | str | Fraction = 1,
    target_config: PretrainedConfig | None = None,
    source_configs: Sequence[PretrainedConfig | None] | None = None,
) -> AlignmentPlan:
    """Align the modules of source adapters with those of the target.

    Args:
        target: the adapter to be updated.
        sources: one or more adapters of any family, depth and width.
        layer_alignment: `tail` or `proportional`, see `map_layers`.
        transfer_ratio: share in (0, 1] of each source's layer pairs that is used, counted from the last layer.
        target_config: config of the target's base; needed only if it has fused projections, and then read from where
            `base_model_name_or_path` leads by default.
        source_configs: one config or None per source; the same.

    Returns:
        The plan.

    Raises:
        AdapterError: no source, a source that is the target, nothing in common, or a fused projection without config.
        ValueError: an option is out of range.
    """
    ratio = parse_transfer_ratio(transfer_ratio)
    target_config = read_target_config(target) if target_config is None else target_config
    configs = list(source_configs) if source_configs is not None else read_source_configs(None, sources)
    _check_inputs(target, sources, configs)
    target_modules = _RoleTable(target, target_config, "target adapter")
    tables = [
        _RoleTable(source, config, f"source adapter {source.name}")
        for source, config in zip(sources, configs, strict=True)
    ]
    layer_maps = tuple(map_layers(target_modules.depth, table.depth, layer_alignment, ratio) for table in tables)
    groups: dict[GroupKey, list[AlignedSlice]] = {}
    untouched = dict.fromkeys(target_modules.outside, _OUTSIDE)
    used: list[set[int]] = [set() for _ in sources]
    for item in target_modules.slices:
        found = []
        for index, table in enumerate(tables):
            match = _match(item, target_modules, table, layer_maps[index].get(item.layer))
            if match is not None:
                found.append((index, match))
                used[index].add(id(match))
        if found:
            groups.setdefault(GroupKey(item.role, item.module.rank), []).append(AlignedSlice(item, tuple(found)))
        else:
            untouched[_label(item)] = _why_untouched(item, tables, layer_maps)
    if not groups:
        raise AdapterError(_nothing_aligned(target_modules, tables, layer_maps))
    unused = tuple(
        dict.fromkeys(table.outside, _OUTSIDE)
        | {_label(item): _why_unused(item, target_modules, pairs) for item in table.slices if id(item) not in seen}
        for table, seen, pairs in zip(tables, used, layer_maps, strict=True)
    )
    for index, (source, table, seen) in enumerate(zip(sources, tables, used, strict=True)):
        if source.extra_tensors:
            logger.warning(
                "source %s: %d tensors outside LoRA (modules_to_save, embeddings) are ignored: %s",
                source.name, len(source.extra_tensors), ", ".join(sorted(source.extra_tensors)[:3]),
            )  # fmt: skip
        if not seen:
            logger.warning("source %s (number %d) feeds no target module", source.name, index + 1)
        logger.info("source %s: %d of %d modules used", source.name, len(seen), len(table.slices))
    ordered = {key: tuple(members) for key, members in groups.items()}
    return AlignmentPlan(target, tuple(sources), ordered, layer_maps, untouched, unused, layer_alignment, ratio)


def _check_inputs(target: LoraAdapter, sources: Sequence[LoraAdapter], configs: Sequence) -> None:
    if not sources:
        raise AdapterError("no source adapter given; --source_adapters needs at least one")
    if len(configs) != len(sources):
        raise UserError(
            f"--source_configs has {len(configs)} entries for {len(sources)} sources; give one per source, "
            "'none' where a source needs none"
        )
    if target.config.get("task_type") not in (None, "CAUSAL_LM"):
        raise AdapterError(
            f"{target.folder}: task_type is {target.config['task_type']!r}; the target must be a CAUSAL_LM adapter"
        )
    seen = {target.sha256: "the target"}
    for number, source in enumerate(sources, start=1):
        if source.folder == target.folder:
            raise AdapterError(
                f"source adapter {source.name} is the target adapter itself ({target.folder}); name another source"
            )
        if source.sha256 in seen:
            logger.warning("source %s has the same weights as %s", source.name, seen[source.sha256])
        seen.setdefault(source.sha256, f"source {number}")


def adapter_depth(adapter: LoraAdapter) -> int:
    """Layers of a model as far as its adapter tells: 1 + the highest layer index that it holds.

    Raises:
        AdapterError: it has no module inside the language model's layers.
    """
    layers = [key.layer for key in module_keys(adapter).values() if key is not None]
    if not layers:
        raise AdapterError(f"{adapter.folder} has no LoRA module inside the language model's layers")
    return 1 + max(layers)


class _RoleTable:
    """An adapter's modules as role slices, in layer order, found by layer and role.

    Attributes:
        adapter: the adapter.
        slices: its role slices.
        outside: paths of its modules outside the language model's layers.
        depth: 1 + the highest layer index.
        roles: roles that it holds anywhere.
    """

    def __init__(self, adapter: LoraAdapter, config: PretrainedConfig | None, what: str):
        self.adapter = adapter
        self.outside: list[str] = []
        self.slices: list[RoleSlice] = []
        places: dict[tuple[int, str], str] = {}
        for path, key in module_keys(adapter).items():
            if key is None:
                self.outside.append(path)
                continue
            other = places.setdefault((key.layer, key.suffix), path)
            if other != path:
                raise AdapterError(
                    f"{what} ({adapter.weights_file}): {other} and {path} stand at the same place of two stacks of "
                    "layers; an adapter of one decoder is needed, train it without the other"
                )
            module = adapter.modules[path]
            try:
                rows = _rows(module, key, config)
            except AdapterError as error:
                raise AdapterError(f"{what} ({adapter.weights_file}): {error}") from None
            self.slices += [RoleSlice(module, key.layer, role, key.suffix, rows[role]) for role in key.roles]
        if not self.slices:
            raise AdapterError(
                f"{what} ({adapter.weights_file}) has no LoRA module inside the language model's layers; train it on "
                "q_proj, v_proj or the like"
            )
        self.slices.sort(key=lambda item: item.layer)
        self.depth = 1 + self.slices[-1].layer
        self.roles = {item.role for item in self.slices}
        self._places: dict[tuple[int, str], list[RoleSlice]] = {}
        for item in self.slices:
            self._places.setdefault((item.layer, item.role), []).append(item)

    def at(self, layer: int, role: str) -> list[RoleSlice]:
        """The slices that do a role in a layer: several only among experts."""
        return self._places.get((layer, role), [])


def _rows(module: LoraModule, key: ModuleKey, config: PretrainedConfig | None) -> dict[str, Tensor | None]:
    if not key.is_fused:
        return dict.fromkeys(key.roles)
    if config is None:
        raise AdapterError(
            f"{module.path} is a fused projection ({', '.join(key.roles)}); splitting it needs the head counts in its "
            "base model's config.json, and base_model_name_or_path names none: give it with --source_configs "
            "(a source) or --model_name_or_path (the target)"
        )
    return dict(role_rows(key, module.out_features, config))


def _match(item: RoleSlice, target: _RoleTable, source: _RoleTable, layer: int | None) -> RoleSlice | None:
    if layer is None:
        return None
    candidates = source.at(layer, item.role)
    for other in candidates:
        if other.suffix == item.suffix:
            return other
    # Under other names a role is matched only where it is the only one of its layer (not among MoE experts).
    alone = len(candidates) == 1 and len(target.at(item.layer, item.role)) == 1
    return candidates[0] if alone else None


def _label(item: RoleSlice) -> str:
    return item.module.path if item.rows is None else f"{item.module.path} [{item.role}]"


def _why_untouched(item: RoleSlice, sources: list[_RoleTable], layer_maps: tuple[dict[int, int], ...]) -> str:
    if not any(item.role in source.roles for source in sources):
        return f"no source has {item.role}"
    mapped = [
        (source, pairs[item.layer]) for source, pairs in zip(sources, layer_maps, strict=True) if item.layer in pairs
    ]
    if not mapped:
        return f"no source layer is mapped to layer {item.layer}"
    if any(source.at(layer, item.role) for source, layer in mapped):
        return f"several modules do {item.role} at layer {item.layer} and no source has this one's name"
    return f"no source has {item.role} at the layer mapped to layer {item.layer}"


def _why_unused(item: RoleSlice, target: _RoleTable, pairs: dict[int, int]) -> str:
    if item.role not in target.roles:
        return f"the target has no {item.role}"
    mapped = [layer for layer, source_layer in pairs.items() if source_layer == item.layer]
    if not mapped:
        return f"layer {item.layer} is mapped to no target layer"
    if any(target.at(layer, item.role) for layer in mapped):
        return f"several modules do {item.role} at layer {item.layer} and the target has none of this name"
    return f"the target has no {item.role} at the mapped layer"


def _nothing_aligned(target: _RoleTable, sources: list[_RoleTable], layer_maps: tuple[dict[int, int], ...]) -> str:
    offered = "; ".join(
        f"{source.adapter.name}: {', '.join(sorted(source.roles))} on layers {sorted(set(pairs.values()))}"
        for source, pairs in zip(sources, layer_maps, strict=True)
    )
    return (
        f"no source module matches a module of target {target.adapter.name} ({', '.join(sorted(target.roles))}): "
        f"sources offer {offered}; train target and sources on overlapping target_modules, or raise --transfer_ratio"
    )


def load_plan(
    adapters: AdapterArguments,
    method: Any,  # a MethodConfig
    base: str | None = None,
    base_revision: str | None = None,
    target: LoraAdapter | None = None,
    seed: int = 42,
) -> AlignmentPlan:
    """Read all adapters and align them. No base weights are loaded.

    Args:
        adapters: names of the adapters.
        method: settings of the alignment.
        base: base model of the target; needed only if the target has fused projections and does not name it.
        base_revision: Hub revision of `base`.
        target: the target adapter, in place of the one that `adapters` names.
        seed: of the source control, if `adapters` asks for one.

    Raises:
        AdapterError: an adapter is not usable, or nothing aligns.
        ValueError: settings are out of range.
    """
    method.check_method()
    if target is None:
        target = load_adapter(
            adapters.target_adapter, revision=adapters.target_revision, allow_pickle=adapters.allow_pickle
        )
    sources = [load_adapter(name, allow_pickle=adapters.allow_pickle) for name in adapters.source_adapters]
    if adapters.source_control is not None:
        sources = control_sources(sources, adapters.source_control, seed)
    return plan_alignment(
        target,
        sources,
        layer_alignment=method.layer_alignment,
        transfer_ratio=method.transfer_ratio,
        target_config=read_target_config(target, base, base_revision, adapters.trust_remote_code),
        source_configs=read_source_configs(adapters.source_configs, sources),
    )
