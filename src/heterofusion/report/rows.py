"""Results as tables: groups, rows over seeds, columns, and what a reader must be warned of."""

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from heterofusion.report.intervals import Estimate, Seed, differences, estimate, mean_per_seed, natural
from heterofusion.report.results import MEAN, SEED, SETTINGS, Result
from heterofusion.runtime.errors import UserError

DETAIL_COUNTS = ("num_examples", "true_positives", "num_predicted", "num_expected")  # no scores


@dataclass(frozen=True)
class Row:
    """Results that agree in name and in all labels but the seed.

    Attributes:
        name: the name.
        labels: labels but the seed, and settings by which it differs from other rows of the name.
        results: one per seed, sorted.
    """

    name: str
    labels: Mapping[str, str]
    results: tuple[Result, ...]

    def estimate(self, column: str, columns: Sequence[str]) -> Estimate | None:
        """Mean of a column over seeds. Of `mean`, over the results that have all columns: others are another mean."""
        if column == MEAN:
            values = [r.score(MEAN) for r in self.results if set(columns) == r.datasets.keys()]
        else:
            values = [result.score(column) for result in self.results]
        return estimate(value for value in values if value is not None)

    def detail(self, column: str, score: str) -> Estimate | None:
        """Mean of one of a data set's scores over seeds."""
        found = [r.datasets[column].scores.get(score) for r in self.results if column in r.datasets]
        return estimate(value for value in found if value is not None)

    def seconds(self, of_fusion: bool) -> float | None:
        """Mean seconds of the fusion or of the evaluation; None if no result knows them."""
        found = [result.fusion_seconds if of_fusion else result.seconds for result in self.results]
        known = [value for value in found if value is not None]
        return sum(known) / len(known) if known else None


@dataclass(frozen=True)
class Group:
    """The rows of one table.

    Attributes:
        value: the label that makes groups; None where results have none.
        rows: in order.
        columns: data sets, in order; the mean comes after them.
        common: labels that all rows share, the grouping one left out.
        warnings: what a reader must know, as sentences.
    """

    value: str | None
    rows: Sequence[Row]
    columns: Sequence[str]
    common: Mapping[str, str]
    warnings: list[str] = field(default_factory=list)

    @property
    def results(self) -> list[Result]:
        """Results of all rows."""
        return [result for row in self.rows for result in row.results]

    def text(self, row: Row, group_by: str) -> str:
        """Name of a row with the labels that tell it from others."""
        told = [f"{name} {value}" for name, value in row.labels.items() if name not in (*self.common, group_by)]
        return f"{row.name} ({', '.join(told)})" if told else row.name


def make_rows(results: Iterable[Result]) -> list[Row]:
    """Rows in order of name and labels.

    Results that agree in name and labels, but not in a setting of the fusion, make rows of their own, told apart by
    the setting.

    Raises:
        ValueError: a row has two results of one seed; names the files.
    """
    same_labels: dict[tuple, list[Result]] = defaultdict(list)
    for result in results:
        same_labels[result.name, tuple(sorted(result.labels.items()))].append(result)
    rows = []
    for (name, labels), members in same_labels.items():
        varied = [key for key in SETTINGS if len({member.settings.get(key) for member in members}) > 1]
        parts: dict[tuple, list[Result]] = defaultdict(list)
        for member in members:
            parts[tuple((key, member.settings[key]) for key in varied if key in member.settings)].append(member)
        for settings, part in parts.items():
            part = sorted(part, key=lambda result: natural(result.seed))
            for first, second in itertools.pairwise(part):
                if first.seed == second.seed:
                    seed = "no seed" if first.seed is None else f"seed {first.seed}"
                    raise UserError(
                        f"{first.origin} and {second.origin} are both {name!r} with the same labels and {seed}; "
                        f"evaluate with --labels that tell them apart, such as {SEED}=1, or take one away"
                    )
            rows.append(Row(name, {**dict(settings), **dict(labels)}, tuple(part)))
    return sorted(rows, key=lambda row: (row.name, [(key, natural(row.labels[key])) for key in sorted(row.labels)]))


def make_groups(
    results: Sequence[Result], group_by: str, row_order: Sequence[str] = (), column_order: Sequence[str] = ()
) -> list[Group]:
    """One group per value of a label, in order of the values.

    Args:
        results: the results.
        group_by: the label. Results without it are a group of their own, which comes last.
        row_order: names of rows that come first, in this order.
        column_order: data sets that come first, in this order.

    Raises:
        ValueError: an order has a name that no result has, or a row has two results of one seed.
    """
    for flag, order, known in (
        ("rows", row_order, {result.name for result in results}),
        ("columns", column_order, {name for result in results for name in result.datasets}),
    ):
        unknown = [name for name in order if name not in known]
        if unknown:
            raise UserError(f"--{flag} has {unknown[0]!r}, which no result has; there is {', '.join(sorted(known))}")
    parts: dict[str | None, list[Row]] = defaultdict(list)
    for row in make_rows(results):
        parts[row.labels.get(group_by)].append(row)
    return [
        _make_group(value, parts[value], group_by, row_order, column_order)
        for value in sorted(parts, key=lambda value: (value is None, natural(value)))
    ]


def _make_group(
    value: str | None, rows: list[Row], group_by: str, row_order: Sequence[str], column_order: Sequence[str]
) -> Group:
    rows = sorted(rows, key=lambda row: _place(row.name, row_order))  # stable: the rest stays as it was
    names = dict.fromkeys(name for row in rows for result in row.results for name in result.datasets)
    columns = sorted(names, key=lambda name: _place(name, column_order))
    first = rows[0].labels
    common = {
        key: first[key] for key in first if key != group_by and all(row.labels.get(key) == first[key] for row in rows)
    }
    group = Group(value, rows, columns, common)
    group.warnings.extend(_warnings(group, group_by))
    return group


def _place(name: str, order: Sequence[str]) -> int:
    return list(order).index(name) if name in order else len(order)


def _warnings(group: Group, group_by: str) -> list[str]:
    found = []
    told: dict[str, Callable] = {
        "metrics": lambda dataset: f"{dataset.primary} of {dataset.metric}",
        "numbers of examples": lambda dataset: dataset.examples,
        "test files (their sha256)": lambda dataset: dataset.sha256,
    }
    for column in group.columns:
        datasets = [result.datasets[column] for result in group.results if column in result.datasets]
        for what, key in told.items():
            values = {key(dataset) for dataset in datasets} - {None}
            if len(values) > 1:
                shown = "" if "sha256" in what else f" ({', '.join(sorted(map(str, values), key=natural))})"
                found.append(f"The results in column {column} have different {what}{shown}: they cannot be compared.")
    for row in group.rows:
        lacking: dict[str, list[str]] = defaultdict(list)
        for result in row.results:
            for column in group.columns:
                if column not in result.datasets:
                    lacking[column].append("" if result.seed is None else result.seed)
        if not lacking:
            continue
        whole = [column for column, seeds in lacking.items() if len(seeds) == len(row.results)]
        parts = [f"{column} of seed {', '.join(seeds)}" for column, seeds in lacking.items() if column not in whole]
        kept = row.estimate(MEAN, group.columns)
        outcome = (
            "it has no mean, for one over the rest would be of other data sets"
            if kept is None
            else f"its mean is over {len(kept.values)} of {len(row.results)} seeds"
        )
        found.append(f"{group.text(row, group_by)} lacks {', '.join([*whole, *parts])}: {outcome}.")
    return found


def cells(results: Iterable[Result], keys: Sequence[str], column: str) -> dict[tuple[str, ...], dict[Seed, float]]:
    """Scores by the values of some labels and by seed; several of the same labels and seed are averaged.

    Args:
        results: results that all have the labels.
        keys: the labels.
        column: a data set, or `mean`. Results without the data set are left out.
    """
    found: dict[tuple[str, ...], dict[Seed, list[float]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        value = result.score(column)
        if value is not None:
            found[tuple(result.attributes[key] for key in keys)][result.seed].append(value)
    return {
        combination: {seed: sum(values) / len(values) for seed, values in seeds.items()}
        for combination, seeds in found.items()
    }


def shared_labels(left: Sequence[Result], right: Sequence[Result], but: Iterable[str] = ()) -> list[str]:
    """Labels that all results of both sides have, some left out."""
    keys = set.intersection(*(set(result.labels) for result in (*left, *right))) - set(but)
    return sorted(keys)


def baseline_rows(group: Group, baseline: str, group_by: str) -> list[Row]:
    """The rows of a group that are the baseline: by name, else the row whose text with its labels is the name."""
    named = [row for row in group.rows if row.name == baseline]
    return named or [row for row in group.rows if group.text(row, group_by) == baseline]


def baseline_difference(row: Row, group: Group, baseline: str, column: str, group_by: str) -> Estimate | None:
    """What a row has more than the baseline in its group: differences paired by the other labels and by seed.

    Args:
        row: the row.
        group: its group.
        baseline: name of the baseline's rows, which are paired with `row` by the labels that both have; or the text
            of one row, which is paired with `row` by seed alone.
        column: a data set, or `mean`.
        group_by: the label that makes groups.

    Returns:
        Mean difference over seeds; None if there is no pair, if a side lacks a data set that the mean is over, or if
        the row is a baseline itself.
    """
    others = baseline_rows(group, baseline, group_by)
    if row in others:
        return None
    sides = []
    for rows in ([row], others):
        results = [result for each in rows for result in each.results]
        # a mean over other data sets is another quantity
        sides.append([r for r in results if column != MEAN or r.datasets.keys() == set(group.columns)])
    ours, theirs = sides
    if not ours or not theirs:
        return None
    told = () if others[0].name == baseline else others[0].labels
    keys = shared_labels(ours, theirs, (group_by, *told))
    seeds, _ = mean_per_seed(differences(cells(ours, keys, column), cells(theirs, keys, column)))
    return estimate(seeds.values())
