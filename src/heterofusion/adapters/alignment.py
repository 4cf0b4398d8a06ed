"""Which source module feeds which target module: the alignment plan (METHOD: topology-based alignment).

A module's key is (layer, role, suffix). Layers are mapped between models of different depth, roles between models
of different naming; fused projections take part role by role. The plan also records what stays untouched and why.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import NamedTuple

from torch import Tensor
from transformers import PretrainedConfig

from heterofusion.adapters.architectures import base_config, module_keys, read_source_configs, role_rows
from heterofusion.adapters.controls import SOURCE_CONTROLS, control_sources
from heterofusion.adapters.lora import AdapterError, LoraAdapter, LoraModule, load_adapter
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.flags import flag

logger = logging.getLogger(__name__)

_OUTSIDE = "outside the decoder layers"


@dataclass
class AdapterArguments:
    """Which adapters are fused."""

    target_adapter: str = flag(help="Target adapter (the anchor): local folder or Hub id.")
    source_adapters: list[str] = flag(help="Source adapters of any family, in order: local folders or Hub ids.")
    source_configs: list[str] | None = flag(
        None,
        help="Base model (folder, config.json or Hub id) of each source with fused projections, 'none' to follow "
        "base_model_name_or_path.",
    )
    target_revision: str | None = flag(None, help="Hub revision of the target adapter.")
    source_control: str | None = flag(
        None,
        help="Make a control: noise in place of the sources' tensors, shuffle them among modules, or zero them; "
        "--seed draws.",
        choices=list(SOURCE_CONTROLS),
    )
    allow_pickle: bool = flag(False, help="Also read adapter_model.bin, with weights_only=True.")
    trust_remote_code: bool = flag(False, help="Run model code from the Hub for the target's base, never sources'.")


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
    """The part of a LoRA module that does one role: all of it, or some rows of a fused projection's B."""

    module: LoraModule
    layer: int
    role: str
    suffix: str  # path inside the layer
    rows: Tensor | None = None  # int64 row indices of lora_B, None for all

    @property
    def lora_B(self) -> Tensor:
        """(rows, rank): the rows of B that belong to the role."""
        return self.module.lora_B if self.rows is None else self.module.lora_B[self.rows]

    @property
    def out_features(self) -> int:
        return self.module.out_features if self.rows is None else len(self.rows)

    @property
    def label(self) -> str:
        return self.module.path if self.rows is None else f"{self.module.path} [{self.role}]"


@dataclass(frozen=True)
class AlignedSlice:
    """A target slice and the (source number, source slice) that feed it, in the order the user gave the sources."""

    target: RoleSlice
    sources: tuple[tuple[int, RoleSlice], ...]


@dataclass(frozen=True)
class AlignmentPlan:
    """The result of `plan_alignment`."""

    target: LoraAdapter
    sources: tuple[LoraAdapter, ...]
    groups: dict[GroupKey, tuple[AlignedSlice, ...]]  # in layer order; one hypernetwork each
    layer_maps: tuple[dict[int, int], ...]  # per source, the kept pairs target layer -> source layer
    untouched: dict[str, str] = field(default_factory=dict)  # target modules or roles that keep their B, and why
    unused: tuple[dict[str, str], ...] = ()  # per source, what feeds nothing, and why
    layer_alignment: str = "tail"
    transfer_ratio: Fraction = Fraction(1)  # share of the layer pairs kept, from the top

    @property
    def aligned(self) -> list[AlignedSlice]:
        """All aligned slices."""
        return [item for members in self.groups.values() for item in members]


def load_plan(
    adapters: AdapterArguments,
    base: str | None = None,
    base_revision: str | None = None,
    *,
    layer_alignment: str = "tail",
    transfer_ratio: str = "1",
    seed: int = 42,
) -> AlignmentPlan:
    """Read all adapters, draw the source control if there is one, and align; no base weights are loaded."""
    pickles = adapters.allow_pickle
    target = load_adapter(adapters.target_adapter, revision=adapters.target_revision, allow_pickle=pickles)
    sources = [load_adapter(name, allow_pickle=pickles) for name in adapters.source_adapters]
    if adapters.source_control is not None:
        sources = control_sources(sources, adapters.source_control, seed)
    return plan_alignment(
        target,
        sources,
        layer_alignment=layer_alignment,
        transfer_ratio=transfer_ratio,
        target_config=base_config(target, "target adapter", base, base_revision, adapters.trust_remote_code),
        source_configs=read_source_configs(adapters.source_configs, sources),
    )


def parse_transfer_ratio(value: float | str | Fraction) -> Fraction:
    """Read a transfer ratio in (0, 1], such as 0.5 or "1/2"."""
    try:
        ratio = Fraction(str(value))  # 0.3 means 3/10, not the binary number beside it
    except (ValueError, ZeroDivisionError):
        ratio = Fraction(0)
    if not 0 < ratio <= 1:
        raise UserError(f"transfer_ratio is {value!r}; give a number above 0 and at most 1, such as 0.5 or 1/2")
    return ratio


def map_layers(target_layers: int, source_layers: int, alignment: str, ratio: Fraction) -> dict[int, int]:
    """Pairs target layer -> source layer of one source, after the transfer ratio.

    `tail`: target layer i takes source layer i - (L_t - L_s) where that exists.
    `proportional`: every target layer i takes source layer round(i (L_s - 1) / (L_t - 1)).
    Of the n pairs, in layer order, the last max(1, int(n * ratio)) are kept.
    """
    if alignment == "tail":
        offset = target_layers - source_layers
        pairs = [(i, i - offset) for i in range(max(0, offset), target_layers)]
    elif alignment == "proportional":
        first, last = (0, target_layers - 1) if target_layers > 1 else (1, 1)  # the last layers meet
        pairs = [
            (i, int(Fraction((first + i) * (source_layers - 1), last) + Fraction(1, 2))) for i in range(target_layers)
        ]
    else:
        raise UserError(f"layer_alignment is {alignment!r}; choose one of tail, proportional")
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
        target_config: config of the target's base; needed only for fused projections, and then read from where
            `base_model_name_or_path` leads by default.
        source_configs: one config or None per source; the same.

    Raises:
        AdapterError: no source, a source that is the target, nothing in common, or a fused projection without config.
        UserError: an option is out of range.
    """
    ratio = parse_transfer_ratio(transfer_ratio)
    _check_inputs(target, sources)
    target_config = target_config or base_config(target, "target adapter")
    configs = read_source_configs(None, sources) if source_configs is None else source_configs
    wanted = _RoleTable(target, target_config, "target adapter")
    tables = [
        _RoleTable(source, config, f"source adapter {source.name}")
        for source, config in zip(sources, configs, strict=True)
    ]
    layer_maps = tuple(map_layers(wanted.depth, table.depth, layer_alignment, ratio) for table in tables)
    groups: dict[GroupKey, tuple[AlignedSlice, ...]] = {}
    untouched = dict.fromkeys(wanted.outside, _OUTSIDE)
    used: set[int] = set()
    for item in wanted.slices:
        matches = [_match(item, wanted, table, pairs) for table, pairs in zip(tables, layer_maps, strict=True)]
        found = tuple((index, match) for index, match in enumerate(matches) if match is not None)
        used.update(id(match) for _, match in found)
        if found:
            key = GroupKey(item.role, item.module.rank)
            groups[key] = (*groups.get(key, ()), AlignedSlice(item, found))
        else:
            untouched[item.label] = _why_untouched(item, tables, layer_maps)
    if not groups:
        raise AdapterError(_nothing_aligned(wanted, tables, layer_maps))
    unused = []
    for number, (table, pairs) in enumerate(zip(tables, layer_maps, strict=True), start=1):
        idle = {item.label: _why_unused(item, wanted, pairs) for item in table.slices if id(item) not in used}
        unused.append(dict.fromkeys(table.outside, _OUTSIDE) | idle)
        name, extra, count = table.adapter.name, sorted(table.adapter.extra_tensors), len(table.slices)
        if extra:
            ignored = "%d tensors outside LoRA (modules_to_save, embeddings) are ignored: %s"
            logger.warning(f"source %s: {ignored}", name, len(extra), ", ".join(extra[:3]))
        if len(idle) == count:
            logger.warning("source %s (number %d) feeds no target module", name, number)
        logger.info("source %s: %d of %d modules used", name, count - len(idle), count)
    return AlignmentPlan(target, tuple(sources), groups, layer_maps, untouched, tuple(unused), layer_alignment, ratio)


def adapter_depth(adapter: LoraAdapter) -> int:
    """Layers of a model as far as its adapter tells: 1 + the highest layer index that it holds."""
    return 1 + max(key.layer for key in module_keys(adapter).values() if key is not None)


def _check_inputs(target: LoraAdapter, sources: Sequence[LoraAdapter]) -> None:
    if not sources:
        raise AdapterError("no source adapter given; --source_adapters needs at least one")
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


class _RoleTable:
    """An adapter's modules as role slices, in layer order, found by layer and role; paths outside the layers apart."""

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
                rows = role_rows(key, module.out_features, config) if key.is_fused else {}
            except AdapterError as error:
                raise AdapterError(f"{what} ({adapter.weights_file}): {error}") from None
            self.slices += [RoleSlice(module, key.layer, role, key.suffix, rows.get(role)) for role in key.roles]
        if not self.slices:
            raise AdapterError(
                f"{what} ({adapter.weights_file}) has no LoRA module inside the language model's layers; train it on "
                "q_proj, v_proj or the like"
            )
        self.slices.sort(key=lambda item: item.layer)
        self.depth = 1 + self.slices[-1].layer
        self.roles = {item.role for item in self.slices}
        self._places: dict[tuple[int | None, str], list[RoleSlice]] = {}
        for item in self.slices:
            self._places.setdefault((item.layer, item.role), []).append(item)

    def at(self, layer: int | None, role: str) -> list[RoleSlice]:
        """The slices that do a role in a layer: several only among experts."""
        return self._places.get((layer, role), [])


def _match(item: RoleSlice, target: _RoleTable, source: _RoleTable, pairs: dict[int, int]) -> RoleSlice | None:
    candidates = source.at(pairs.get(item.layer), item.role)
    # Under other names a role is matched only where it is the only one of its layer (not among MoE experts).
    alone = len(candidates) == 1 and len(target.at(item.layer, item.role)) == 1
    return next((other for other in candidates if alone or other.suffix == item.suffix), None)


def _why_untouched(item: RoleSlice, sources: list[_RoleTable], layer_maps: Sequence[dict[int, int]]) -> str:
    if not any(item.role in source.roles for source in sources):
        return f"no source has {item.role}"
    if not any(item.layer in pairs for pairs in layer_maps):
        return f"no source layer is mapped to layer {item.layer}"
    if any(source.at(pairs.get(item.layer), item.role) for source, pairs in zip(sources, layer_maps, strict=True)):
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


def _nothing_aligned(target: _RoleTable, sources: list[_RoleTable], layer_maps: Sequence[dict[int, int]]) -> str:
    offered = "; ".join(
        f"{source.adapter.name}: {', '.join(sorted(source.roles))} on layers {sorted(set(pairs.values()))}"
        for source, pairs in zip(sources, layer_maps, strict=True)
    )
    return (
        f"no source module matches a module of target {target.adapter.name} ({', '.join(sorted(target.roles))}): "
        f"sources offer {offered}; train target and sources on overlapping target_modules, or raise --transfer_ratio"
    )
