"""What `comparison.json` holds: methods, each in its cases, and the gains that are asked for."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heterofusion.data.files import load_json, read_text
from heterofusion.report.fields import Fields
from heterofusion.report.intervals import Estimate, Seed, estimate
from heterofusion.runtime.errors import UserError


@dataclass(frozen=True)
class ComparisonRow:
    """One method in one case.

    Attributes:
        name: of the method.
        group: heading of the rows that it stands among.
        content: its record in `comparison.json`.
        scores: by data set, score by seed; None is the seed of what does not depend on one.
        case: its case; None if nothing of a case enters it, or there are no cases.
    """

    name: str
    group: str
    content: Mapping[str, Any]
    scores: Mapping[str, Mapping[Seed, float]]
    case: str | None = None

    @property
    def means(self) -> dict[Seed, float]:
        """Mean over the data sets, by seed."""
        seeds = next(iter(self.scores.values()))
        return {seed: sum(values[seed] for values in self.scores.values()) / len(self.scores) for seed in seeds}

    @property
    def is_control(self) -> bool:
        """Whether it is a fusion without the real sources."""
        return bool(self.content.get("source_control"))

    def by_seed(self, dataset: str | None = None) -> Mapping[Seed, float]:
        """Score by seed of a data set, or of the mean over all of them."""
        return self.means if dataset is None else self.scores[dataset]

    def estimate(self, dataset: str | None = None) -> Estimate:
        """Mean over seeds of a data set, or of the mean over all of them."""
        found = estimate(self.by_seed(dataset).values())
        assert found is not None  # a row has a run
        return found

    def over_seeds(self, name: str) -> float | None:
        """Mean over seeds of another number of its runs; None where no run has it."""
        found = [run[name] for run in self.content["runs"] if run.get(name) is not None]
        return sum(found) / len(found) if found else None


@dataclass(frozen=True)
class Gain:
    """A difference of two rows that is reported by a name of its own.

    Attributes:
        name: of the gain.
        row: what it is the gain of.
        over: what it is compared with; of several, the one with the best mean over seeds in a case.
        cases: the cases it is of; None for all.
        dataset: the data set it is of; None for the mean over all.
        at_least: what the mean difference has to reach; None without such a target.
        interval_above: what the whole 95% interval has to be above; None for 0 if there is `at_least`.
    """

    name: str
    row: str
    over: tuple[str, ...]
    cases: tuple[str, ...] | None = None
    dataset: str | None = None
    at_least: float | None = None
    interval_above: float | None = None

    @property
    def methods(self) -> set[str]:
        """Names of all methods that it is of."""
        return {self.row, *self.over}

    def plain(self) -> dict[str, Any]:
        """For `comparison.json`: what is given."""
        over = {"over": self.over[0]} if len(self.over) == 1 else {"over_best_of": list(self.over)}
        cases = None if self.cases is None else list(self.cases)
        others = {"dataset": self.dataset, "at_least": self.at_least, "interval_above": self.interval_above}
        values = {"name": self.name, "row": self.row, **over, "cases": cases, **others}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def has_target(self) -> bool:
        """Whether it is to be met."""
        return self.at_least is not None or self.interval_above is not None

    @property
    def target(self) -> str:
        """What it is to meet, in words."""
        mean = [] if self.at_least is None else [f"mean at least {self.at_least:g}"]
        return " and ".join([*mean, f"interval above {self.interval_above or 0:g}"])


@dataclass(frozen=True)
class ComparisonTable:
    """A comparison as it is reported.

    Attributes:
        content: `comparison.json`.
        rows: the methods, in order, each once per case.
        datasets: names of the data sets.
        gains: the gains that are asked for.
        cases: names of the cases, in order; none if all is of one table.
    """

    content: Mapping[str, Any]
    rows: Sequence[ComparisonRow]
    datasets: Sequence[str]
    gains: Sequence[Gain] = ()
    cases: Sequence[str] = ()

    @property
    def versions(self) -> dict[str, str]:
        """Version by name of the packages that it was made with."""
        return {str(name): str(version) for name, version in (self.content.get("versions") or {}).items()}

    @property
    def names(self) -> dict[str, str]:
        """Group by name of the method, groups together, in order."""
        groups = {row.name: row.group for row in self.rows}
        order = list(dict.fromkeys(groups.values()))
        return dict(sorted(groups.items(), key=lambda item: order.index(item[1])))

    def row(self, name: str) -> ComparisonRow | None:
        """The row of a name, None if its runs are missing; of a comparison with cases, ask `of_case`."""
        return next((row for row in self.rows if row.name == name), None)

    def of_case(self, case: str) -> "ComparisonTable":
        """The table of a case: its rows, those that nothing of a case enters, and its gains."""
        return dataclasses.replace(
            self,
            rows=[row for row in self.rows if row.case in (case, None)],
            gains=[gain for gain in self.gains if gain.cases is None or case in gain.cases],
            cases=(),
        )


def read_comparison(path: str | Path) -> ComparisonTable:
    """Read a `comparison.json`.

    Raises:
        ValueError: it cannot be read or is not of the schema; names file and field.
    """
    where = f"comparison {path}"
    return parse_comparison(load_json(read_text(Path(path), where), where), where)


def parse_comparison(content: Any, where: str) -> ComparisonTable:
    """A comparison from the content of its file.

    Raises:
        ValueError: a field is missing or of another type, rows are of different data, or a row or gain names a case,
            method or data set that is not there; names file and field.
    """
    field = Fields(content, where)
    cases = _names(field, "cases") or []
    field.get("versions", dict, {})
    rows = [_row(entry, f"rows[{index}]", cases, where) for index, entry in enumerate(field.get("rows", list))]
    if not rows:
        raise UserError(f"{where} has no rows; recipes/compare.py has to finish a run first")
    datasets = list(rows[0].scores)
    places: dict[str, list[str | None]] = {}
    for row in rows:
        if set(row.scores) != set(datasets):
            raise UserError(f"{where}: {row.name} is scored on {', '.join(row.scores)}, others on other data sets")
        taken = places.setdefault(row.name, [])
        if row.case in taken or None in taken or (taken and row.case is None):
            raise UserError(f"{where} has two rows {row.name!r} for the same case; make the comparison again")
        taken.append(row.case)
    gains = [
        _gain(Fields(entry, where, f"gains[{index}]."), cases, datasets)
        for index, entry in enumerate(field.get("gains", list, []))
    ]
    return ComparisonTable(content, rows, datasets, gains, cases)


def _row(entry: Any, place: str, cases: Sequence[str], where: str) -> ComparisonRow:
    row = Fields(entry, where, f"{place}.")
    for name, kind in (("models_at_inference", int), ("needs_task_id", bool), ("ran_source_models", bool)):
        row.get(name, kind)
    case = row.get("case", str, None)
    if case is not None and case not in cases:
        raise UserError(f"{where}: {place}.case is {case!r}, which is not one of its cases: {_told(cases)}")
    runs = [Fields(run, where, f"{place}.runs.") for run in row.get("runs", list)]
    if not runs:
        raise UserError(f"{where}: {place} has no runs; make the comparison again")
    scores: dict[str, dict[Seed, float]] = {}
    for run in runs:
        seed = None if run.get("seed", int, None) is None else str(run.get("seed", int))
        values = Fields(run.get("scores", dict), where, f"{place}.runs.scores.")
        for dataset in values.content:
            scores.setdefault(dataset, {})[seed] = float(values.number(dataset))
        for name in ("making_seconds", "made_seconds", "evaluation_seconds", "peak_memory_bytes"):
            run.number(name, None)
    if not scores or any(len(values) < len(runs) for values in scores.values()):
        raise UserError(
            f"{where}: the runs of {place} must each have a seed of their own and scores of the same data sets; make "
            "the comparison again"
        )
    return ComparisonRow(row.get("name", str), row.get("group", str, ""), entry, scores, case)


def _gain(field: Fields, cases: Sequence[str], datasets: Sequence[str]) -> Gain:
    best, of_cases = _names(field, "over_best_of"), _names(field, "cases")
    if best is not None and field.get("over", str, None) is not None:
        raise UserError(f"{field.where}: {field.prefix}over and over_best_of exclude each other; leave one out")
    if best == []:
        raise UserError(f"{field.where}: {field.prefix}over_best_of is empty; name the rows to choose from")
    gain = Gain(
        field.get("name", str),
        field.get("row", str),
        (field.get("over", str),) if best is None else tuple(best),
        None if of_cases is None else tuple(of_cases),
        field.get("dataset", str, None),
        field.number("at_least", None),
        field.number("interval_above", None),
    )
    for kind, asked, there in (("cases", gain.cases or (), cases), ("dataset", [gain.dataset], datasets)):
        unknown = [name for name in asked if name is not None and name not in there]
        if unknown:
            raise UserError(f"{field.where}: {field.prefix}{kind} names {unknown[0]!r}; there is {_told(there)}")
    return gain


def _names(field: Fields, name: str) -> list[str] | None:
    """A list of different names; None if there is none."""
    names = field.get(name, list, None)
    if names is not None and (not all(isinstance(each, str) for each in names) or len(set(names)) < len(names)):
        raise UserError(f"{field.where}: {field.prefix}{name} is {names}; a list of different names was expected")
    return names


def _told(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"
