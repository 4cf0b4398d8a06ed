"""What `diagnostics.json` beside a fused adapter tells, as the arrays that the pictures show."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from heterofusion.data.files import load_json, read_text
from heterofusion.method.diagnostics import DIAGNOSTICS_FILE
from heterofusion.report.fields import Fields
from heterofusion.runtime.errors import UserError

_ROLES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
QUANTITIES = ("delta_ratio", "gate_sparsity")


def role_order(role: str) -> tuple[int, str]:
    """Key that sorts roles as a layer uses them, unusual ones last."""
    return (_ROLES.index(role) if role in _ROLES else len(_ROLES), role)


@dataclass(frozen=True)
class Connection:
    """What one target module takes from one source.

    Attributes:
        source: index of the source, from 0.
        layer: layer of the source's module.
        attention: share of the attention of the module's B blocks; may be NaN.
    """

    source: int
    layer: int
    attention: float


@dataclass(frozen=True)
class ModuleState:
    """One aligned module of the target; values may be NaN."""

    role: str
    layer: int
    delta_ratio: float
    gate_sparsity: float
    sources: tuple[Connection, ...]


@dataclass(frozen=True)
class Fusion:
    """One fusion.

    Attributes:
        target: name of the target.
        layers: layers of the target.
        sources: name and layers of each source; the name of a control has its kind behind it.
        modules: the aligned modules.
    """

    target: str
    layers: int
    sources: Sequence[tuple[str, int]]
    modules: Sequence[ModuleState]

    @property
    def roles(self) -> list[str]:
        """Roles in the order in which a layer uses them; unusual ones last."""
        return sorted({module.role for module in self.modules}, key=role_order)


def read_fusion(folder: Path) -> Fusion:
    """Read and check `diagnostics.json` of a fused adapter.

    Raises:
        ValueError: it cannot be read, or a field is missing or wrong; names file and field.
    """
    label = f"diagnostics {folder / DIAGNOSTICS_FILE}"
    return parse_fusion(load_json(read_text(folder / DIAGNOSTICS_FILE, label), label), label)


def parse_fusion(content: Any, where: str) -> Fusion:
    """Check the content of a `diagnostics.json`.

    Args:
        content: what the file holds. NaN and null stand for values that are not known.
        where: name of the file for messages.

    Raises:
        ValueError: a field is missing, of another type or out of range; names file and field.
    """
    field = Fields(content, where)
    target = Fields(field.get("target", dict), where, "target.")
    layers = _depth(target)
    sources = []
    for index, entry in enumerate(field.get("sources", list)):
        source = Fields(entry, where, f"sources[{index}].")
        control = source.get("control", str, None)  # of a fusion with other tensors in the place of the source's
        name = source.get("name", str)
        sources.append((f"{name} [{control}]" if control else name, _depth(source)))
    modules = []
    for index, entry in enumerate(field.get("modules", list)):
        module = Fields(entry, where, f"modules[{index}].")
        connections = []
        for position, part in enumerate(module.get("sources", list)):
            link = Fields(part, where, f"modules[{index}].sources[{position}].")
            source_index = _index(link, "source", len(sources))
            depth = sources[source_index][1]
            connections.append(Connection(source_index, _index(link, "layer", depth), _value(link, "attention")))
        modules.append(
            ModuleState(
                role=module.get("role", str),
                layer=_index(module, "layer", layers),
                delta_ratio=_value(module, "delta_ratio"),
                gate_sparsity=_value(module, "gate_sparsity"),
                sources=tuple(connections),
            )
        )
    if not (modules and sources):
        raise UserError(f"{where}: modules or sources is empty; no fusion leaves that, export the adapter again")
    return Fusion(target.get("name", str), layers, sources, modules)


def _depth(field: Fields) -> int:
    layers = field.get("layers", int)
    if layers < 1:
        raise UserError(f"{field.where}: {field.prefix}layers is {layers}; at least 1 was expected")
    return layers


def _index(field: Fields, name: str, count: int) -> int:
    index = field.get(name, int)
    if not 0 <= index < count:
        raise UserError(f"{field.where}: {field.prefix}{name} is {index}; 0 to {count - 1} was expected")
    return index


def _value(field: Fields, name: str) -> float:
    value = float(field.number(name, float("nan"), finite=False))
    return value if np.isfinite(value) else float("nan")


def alignment_matrix(fusion: Fusion, role: str, source: int) -> np.ndarray:
    """Which layer of a source feeds which layer of the target.

    Args:
        fusion: the fusion.
        role: the role.
        source: index of the source.

    Returns:
        (target layers, source layers), True where a module of the role is fed.
    """
    matrix = np.zeros((fusion.layers, fusion.sources[source][1]), dtype=bool)
    for module in fusion.modules:
        for link in module.sources:
            if module.role == role and link.source == source:
                matrix[module.layer, link.layer] = True
    return matrix


def attention_shares(fusion: Fusion) -> np.ndarray:
    """Share of attention that each source gets in each layer of the target, mean over the layer's modules.

    A module that takes nothing from a source counts as 0 for it, so that the shares of a layer sum to 1.

    Returns:
        (sources, target layers); NaN where no module of the layer takes anything from the source, or nothing is known.
    """
    totals = np.full((len(fusion.sources), fusion.layers), np.nan)
    counts = np.zeros(fusion.layers)
    for module in fusion.modules:
        shares = [link.attention for link in module.sources]
        if not shares or not np.isfinite(shares).all():
            continue  # what is unknown is no zero
        counts[module.layer] += 1
        for link in module.sources:
            totals[link.source, module.layer] = np.nan_to_num(totals[link.source, module.layer]) + link.attention
    return totals / np.maximum(counts, 1)


def module_values(fusion: Fusion, quantity: str) -> np.ndarray:
    """A quantity per role and layer, mean over modules of the same role and layer (experts of a mixture, say).

    Args:
        fusion: the fusion.
        quantity: one of `QUANTITIES`.

    Returns:
        (roles, target layers), roles as in `Fusion.roles`; NaN where no module is aligned or nothing is known.
    """
    found: dict[tuple[str, int], list[float]] = {}
    for module in fusion.modules:
        value = getattr(module, quantity)
        if np.isfinite(value):
            found.setdefault((module.role, module.layer), []).append(value)
    values = np.full((len(fusion.roles), fusion.layers), np.nan)
    for (role, layer), parts in found.items():
        values[fusion.roles.index(role), layer] = sum(parts) / len(parts)
    return values
