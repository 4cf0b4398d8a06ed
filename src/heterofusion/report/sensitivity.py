"""Scores over a setting that was varied: which settings those are, and the points of their curves."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from heterofusion.method.config import MethodConfig
from heterofusion.report.intervals import Estimate, estimate, number
from heterofusion.report.results import MEAN, Result
from heterofusion.report.rows import Group, cells

FEWEST_POINTS = 3
_TITLES = {
    "alpha_init": r"initial scale $\alpha$ of the update (no unit)",
    "mu_gate": r"gate bias $\mu_\mathrm{gate}$ (no unit)",
}
_LOG_RANGE = 30  # largest over smallest value from which on the axis is logarithmic

Points = list[tuple[float, Estimate]]


@dataclass(frozen=True)
class Lines:
    """Points of one series.

    Attributes:
        mean: of the mean over all data sets; where a result lacks one, its value is left out.
        tasks: by data set.
    """

    mean: Points
    tasks: Mapping[str, Points]


@dataclass(frozen=True)
class Curve:
    """Scores over one setting.

    Attributes:
        setting: the label.
        title: what the axis says.
        default: the setting's default, None if it is none of the method's.
        series: by name and the labels in which series differ.
    """

    setting: str
    title: str
    default: float | None
    series: Mapping[str, Lines]

    @property
    def logarithmic(self) -> bool:
        """Whether the values span so much that a linear axis would press the small ones together."""
        values = [x for lines in self.series.values() for points in lines.tasks.values() for x, _ in points]
        return min(values) > 0 and max(values) / min(values) >= _LOG_RANGE


def find_curves(group: Group) -> list[Curve]:
    """Curves of a group: one per numeric label, or setting of the fusion, with three or more values.

    Results make one series if they agree in name and in all other labels and settings, but for labels that only name
    the value (each goes with one value, such as `case` alpha-0.3).
    """
    results = group.results
    keys = sorted({key for result in results for key in result.attributes})
    curves = []
    for key in keys:
        varied = [result for result in results if number(result.attributes.get(key)) is not None]
        if len({number(result.attributes[key]) for result in varied}) < FEWEST_POINTS:
            continue
        series = _series(varied, key, group.columns)
        if series:
            curves.append(Curve(key, _TITLES.get(key, f"{key} (as labelled)"), _default(key), series))
    return curves


def _default(key: str) -> float | None:
    return getattr(MethodConfig(), key) if key in _TITLES else None


def _series(results: Sequence[Result], key: str, columns: Sequence[str]) -> dict[str, Lines]:
    names = {name for result in results for name in result.attributes} - {key}
    others = sorted(name for name in names if not _only_names_value(results, name, key))
    parts: dict[tuple, list[Result]] = defaultdict(list)
    for result in results:
        parts[result.name, tuple(result.attributes.get(name, "") for name in others)].append(result)
    kept = {
        identity: part
        for identity, part in parts.items()
        if len({number(result.attributes[key]) for result in part}) >= FEWEST_POINTS
    }
    differ = [index for index in range(len(others)) if len({identity[1][index] for identity in kept}) > 1]
    series = {}
    for (name, values), part in sorted(kept.items()):
        told = ", ".join(f"{others[index]} {values[index]}" for index in differ if values[index])
        whole = [result for result in part if result.datasets.keys() == set(columns)]
        lines = {column: _points(part, key, column) for column in columns}
        series[f"{name} ({told})" if told else name] = Lines(
            _points(whole, key, MEAN), {column: points for column, points in lines.items() if points}
        )
    return series


def _only_names_value(results: Sequence[Result], label: str, key: str) -> bool:
    values: dict[str, set[float | None]] = defaultdict(set)
    for result in results:
        if label not in result.attributes:
            return False
        values[result.attributes[label]].add(number(result.attributes[key]))
    distinct = {number(result.attributes[key]) for result in results}
    return len(values) >= len(distinct) and all(len(found) == 1 for found in values.values())


def _points(results: Sequence[Result], key: str, column: str) -> Points:
    """Estimate over seeds at each value."""
    by_value: dict[float, list[Result]] = defaultdict(list)
    for result in results:
        value = number(result.attributes[key])
        if value is not None:
            by_value[value].append(result)
    points = []
    for value in sorted(by_value):
        found = estimate(cells(by_value[value], (), column).get((), {}).values())
        if found is not None:
            points.append((value, found))
    return points
