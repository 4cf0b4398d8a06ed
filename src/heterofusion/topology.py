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

from heterofusion.adapters import AdapterError, LoraAdapter, LoraModule
from heterofusion.architectures import ModuleKey, module_key, role_rows

logger = logging.getLogger(__name__)

LAYER_ALIGNMENTS = ("tail", "proportional")


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
        ratio = Fraction(value.strip()) if isinstance(value, str) else Fraction(value).limit_denominator(10**6)
    except (ValueError, ZeroDivisionError, OverflowError, AttributeError):
        raise ValueError(
            f"transfer_ratio is {value!r}; give a number such as 0.5, or a fraction such as 1/2"
        ) from None
    if not 0 < ratio <= 1:
        raise ValueError(f"transfer_ratio is {value}; it must be above 0 and at most 1")
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
        raise ValueError(f"layer_alignment is {alignment!r}; choose one of {', '.join(LAYER_ALIGNMENTS)}")
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
        target_config: config of the target's base; needed only if it has fused projections.
        source_configs: one config or None per source; needed only for sources with fused projections.

    Returns:
        The plan.

    Raises:
        AdapterError: no source, a source that is the target, nothing in common, or a fused projection without config.
        ValueError: an option is out of range.
    """
    ratio = parse_transfer_ratio(transfer_ratio)
    configs = list(source_configs) if source_configs is not None else [None] * len(sources)
    _check_inputs(target, sources, configs)
    target_slices, outside = _slices(target, target_config, "target adapter")
    source_slices = [
        _slices(source, config, f"source adapter {source.name}")[0]
        for source, config in zip(sources, configs, strict=True)
    ]
    depth = 1 + max(item.layer for item in target_slices)
    layer_maps = tuple(
        map_layers(depth, 1 + max(item.layer for item in slices), layer_alignment, ratio) for slices in source_slices
    )
    groups: dict[GroupKey, list[AlignedSlice]] = {}
    untouched = dict.fromkeys(outside, "outside the decoder layers")
    used: list[set[int]] = [set() for _ in sources]
    for item in target_slices:
        found = []
        for index, slices in enumerate(source_slices):
            match = _match(item, slices, target_slices, layer_maps[index].get(item.layer))
            if match is not None:
                found.append((index, match))
                used[index].add(id(match))
        if found:
            groups.setdefault(GroupKey(item.role, item.module.rank), []).append(AlignedSlice(item, tuple(found)))
        else:
            untouched[_label(item)] = _why_untouched(item, source_slices, layer_maps)
    if not groups:
        raise AdapterError(_nothing_aligned(target, target_slices, sources, source_slices, layer_maps))
    unused = tuple(
        {_label(item): _why_unused(item, target_slices, pairs) for item in slices if id(item) not in seen}
        for slices, seen, pairs in zip(source_slices, used, layer_maps, strict=True)
    )
    for index, (source, slices, seen) in enumerate(zip(sources, source_slices, used, strict=True)):
        if source.extra_tensors:
            logger.warning(
                "source %s: %d tensors outside LoRA (modules_to_save, embeddings) are ignored: %s",
                source.name, len(source.extra_tensors), ", ".join(sorted(source.extra_tensors)[:3]),
            )  # fmt: skip
        if not seen:
            logger.warning("source %s (number %d) feeds no target module", source.name, index + 1)
        logger.info("source %s: %d of %d modules used", source.name, len(seen), len(slices))
    ordered = {key: tuple(members) for key, members in groups.items()}
    return AlignmentPlan(
        target, tuple(sources), ordered, layer_maps, untouched, unused, layer_alignment, ratio
    )  # fmt: skip


def _check_inputs(target: LoraAdapter, sources: Sequence[LoraAdapter], configs: Sequence) -> None:
    if not sources:
        raise AdapterError("no source adapter given; --source_adapters needs at least one")
    if len(configs) != len(sources):
        raise ValueError(
            f"--source_configs has {len(configs)} entries for {len(sources)} sources; give one per source, "
            "'none' where a source needs none"
        )
    if target.config.get("task_type") not in (None, "CAUSAL_LM"):
        raise AdapterError(
            f"{target.folder}: task_type is {target.config['task_type']!r}; the target must be a CAUSAL_LM adapter"
        )
    seen: dict = {}
    for source in sources:
        if source.folder == target.folder:
            raise AdapterError(f"source adapter {source.name} is the target adapter itself ({target.folder})")
        if source.folder in seen:
            logger.warning("source %s is given twice", source.name)
        seen[source.folder] = True


def _slices(adapter: LoraAdapter, config: PretrainedConfig | None, what: str) -> tuple[list[RoleSlice], list[str]]:
    """Split an adapter's modules into role slices; second, the modules outside the layers."""
    slices: list[RoleSlice] = []
    outside: list[str] = []
    for path, module in adapter.modules.items():
        try:
            key = module_key(path)
            if key is None:
                outside.append(path)
                continue
            rows = _rows(module, key, config)
        except AdapterError as error:
            raise AdapterError(f"{what} ({adapter.weights_file}): {error}") from error.__cause__
        slices += [RoleSlice(module, key.layer, role, key.suffix, rows[role]) for role in key.roles]
    if not slices:
        raise AdapterError(f"{what} ({adapter.weights_file}) has no LoRA module inside the language model's layers")
    slices.sort(key=lambda item: item.layer)
    return slices, outside


def _rows(module: LoraModule, key: ModuleKey, config: PretrainedConfig | None) -> dict[str, Tensor | None]:
    if not key.is_fused:
        return dict.fromkeys(key.roles)
    if config is None:
        raise AdapterError(
            f"{module.path} is a fused projection ({', '.join(key.roles)}); splitting it needs the head counts in its "
            "base model's config.json, which base_model_name_or_path does not lead to: give it with --source_configs "
            "(a source) or --model_name_or_path (the target)"
        )
    return dict(role_rows(key, module.out_features, config))


def _match(
    item: RoleSlice, slices: list[RoleSlice], target_slices: list[RoleSlice], layer: int | None
) -> RoleSlice | None:
    if layer is None:
        return None
    candidates = [other for other in slices if other.layer == layer and other.role == item.role]
    same_path = [other for other in candidates if other.suffix == item.suffix]
    if same_path:
        return same_path[0]
    # Under other names a role is matched only where it is the only one of its layer (not among MoE experts).
    peers = sum(other.layer == item.layer and other.role == item.role for other in target_slices)
    return candidates[0] if len(candidates) == 1 and peers == 1 else None


def _label(item: RoleSlice) -> str:
    return item.module.path if item.rows is None else f"{item.module.path} [{item.role}]"


def _why_untouched(
    item: RoleSlice, source_slices: list[list[RoleSlice]], layer_maps: tuple[dict[int, int], ...]
) -> str:
    if not any(other.role == item.role for slices in source_slices for other in slices):
        return f"no source has {item.role}"
    if not any(item.layer in pairs for pairs in layer_maps):
        return f"no source layer is mapped to layer {item.layer}"
    return f"no source has {item.role} at the layer mapped to layer {item.layer}"


def _why_unused(item: RoleSlice, target_slices: list[RoleSlice], pairs: dict[int, int]) -> str:
    if not any(other.role == item.role for other in target_slices):
        return f"the target has no {item.role}"
    if item.layer not in pairs.values():
        return f"layer {item.layer} is mapped to no target layer"
    return f"the target has no {item.role} at the mapped layer"


def _nothing_aligned(target, target_slices, sources, source_slices, layer_maps) -> str:
    wanted = sorted({item.role for item in target_slices})
    offered = "; ".join(
        f"{source.name}: {', '.join(sorted({item.role for item in slices}))} on layers {sorted(pairs.values())}"
        for source, slices, pairs in zip(sources, source_slices, layer_maps, strict=True)
    )
    return (
        f"no source module matches a module of target {target.name} ({', '.join(wanted)}): sources offer {offered}; "
        "train target and sources on overlapping target_modules, or raise --transfer_ratio"
    )
