"""Tables of scores: means with 95% intervals over seeds, differences paired by seed, and costs beside scores.

A `Row` is one evaluation of one method with one seed. `score_frame` makes a pandas frame of rows, a line for each data
set; the other functions make tables of it, and write them in Markdown.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from heterofusion.data.markdown import markdown_table
from heterofusion.runtime.errors import UserError

NO_SEED = -1  # of what does not depend on a seed; it is compared with every seed of the other side
_ROUNDING = 1e-9  # means of the same numbers in another order differ by less
_COSTS = ("making, s", "search, s", "shared, s", "answering, s", "peak GiB", "models", "task id", "runs sources")
COSTS_ARE = (
    "`making` is what one run takes without imports and loading, `search` all runs of the search for hyper-parameters "
    "together, `shared` what several methods use (labels of the source experts, say), `answering` all test prompts; "
    "`peak GiB` is the most that one process held; `models` are alive while it answers; `task id`: it must be told "
    "which task a prompt is of; `runs sources`: models of the sources are run. Seconds of resumed runs are missing."
)
SCORES_ARE = (
    "Scores run from 0 to 1; `mean` is over the data sets, ± half the width of its 95% t interval over seeds (n = 1: "
    "nothing in it is random, or one seed was run). An interval is of what a seed changes on one set of test data."
)
GAINS_ARE = (
    "Paired by seed, whatever they are. `above 0`, `below 0`: all of the 95% interval; `undecided`: it contains 0. "
    "A target is met if the mean and the whole interval are where it wants them."
)


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with half the width of its 95% t interval; NaN with one value, which says nothing of it."""

    mean: float
    half_width: float
    n: int

    def __str__(self) -> str:
        return self.text()

    def text(self, sign: str = "") -> str:
        """`0.563 ± 0.012`, or the value alone if there is one; `+` as the sign for a difference."""
        mean = f"{self.mean:{sign}.3f}"
        mean = "0.000" if float(mean) == 0 else mean
        return mean if self.n == 1 else f"{mean} ± {self.half_width:.3f}"

    @property
    def bar(self) -> float:
        """Half the width of the interval to draw."""
        return 0 if self.n == 1 else self.half_width

    @property
    def verdict(self) -> str:
        """On which side of 0 the whole interval is."""
        if self.n == 1:
            return "one seed"
        low, high = self.mean - self.half_width, self.mean + self.half_width
        return "above 0" if low > _ROUNDING else "below 0" if high < -_ROUNDING else "undecided"


def estimate(values: Iterable[float]) -> Estimate | None:
    """Mean ± t(0.975, n - 1) s / sqrt(n) of one value per seed; None of no values."""
    found = np.array(list(values), dtype=float)
    if not len(found):
        return None
    half = stats.t.ppf(0.975, len(found) - 1) * stats.sem(found) if len(found) > 1 else math.nan
    return Estimate(float(found.mean()), float(half), len(found))


# ---- from results to a frame ------------------------------------------------------------------------------------


@dataclass
class Row:
    """One evaluation of one method: contents of its `results.json`, several if they are of disjoint data sets."""

    name: str
    results: Sequence[Mapping[str, Any]]
    seed: int = NO_SEED
    labels: Mapping[str, Any] = field(default_factory=dict)  # what else tells rows apart, such as the case
    group: str = ""  # heading of the rows that it stands among
    searched: float | None = None  # seconds of the search for its hyper-parameters
    shared: float | None = None  # seconds of the runs that it shares with other methods
    ran_sources: bool = False  # whether one of these ran models of the sources

    @property
    def costs(self) -> dict[str, Any]:
        """The columns of costs."""
        made = self.results[0].get("made_by") or {}
        cost = made.get("cost") or {}
        models = sum(part["models_at_inference"] for part in self.results)
        peak = max(cost.get("peak_memory_bytes") or 0, *(part.get("peak_memory_bytes") or 0 for part in self.results))
        values = (
            None if cost.get("resumed_from_step") else cost.get("seconds"), self.searched, self.shared,
            sum(part["seconds"] for part in self.results), peak / 2**30 if peak else None, models,
            "yes" if len(self.results) > 1 or self.results[0]["needs_task_id"] else "no",
            "yes" if self.ran_sources or made.get("ran_source_models") or models > 1 else "no",
        )  # fmt: skip
        return dict(zip(_COSTS, values, strict=True))


def score_frame(rows: Sequence[Row]) -> pd.DataFrame:
    """A line for each row and data set: name, group, labels, seed, dataset, metric, score, control, and costs."""
    lines: list[dict[str, Any]] = []
    contents: dict[str, str] = {}
    for row in rows:
        labels = {name: str(value) for name, value in row.labels.items()}
        told = {"name": row.name, "group": row.group, **labels, "seed": row.seed}
        for part in row.results:
            control = (part.get("made_by") or {}).get("source_control")
            for dataset, entry in part["datasets"].items():
                if contents.setdefault(dataset, entry["sha256"]) != entry["sha256"]:
                    raise UserError(
                        f"results of {row.name!r} are of another data set {dataset} than those before: the file has "
                        "changed between the evaluations; evaluate again, or report them apart"
                    )
                scored = {"metric": entry["primary"], "score": entry["score"], "control": control}
                lines.append({**told, "dataset": dataset, **scored, **row.costs})
    frame = pd.DataFrame(lines)
    keys = [key for key in frame.columns if key not in ("score", "control", *_COSTS)]
    frame[keys] = frame[keys].fillna("")  # a label that a row does not have
    if len(frame) and frame.duplicated(keys).any():
        twice = frame[frame.duplicated(keys)].iloc[0]
        raise UserError(f"row {twice['name']!r} has two results of {twice['dataset']}; tell them apart by a label")
    return frame


# ---- statistics -------------------------------------------------------------------------------------------------


def by_seed(part: pd.DataFrame, dataset: str | None = None) -> pd.Series:
    """Score by seed: of one data set, or the mean over all and over the rows; seeds that lack one are left out."""
    part = part if dataset is None else part[part["dataset"] == dataset]
    if part.empty:
        return pd.Series(dtype=float)
    keys = [key for key in part.columns if key not in ("group", "seed", "score", "control", *_COSTS)]
    table = part.groupby([*keys, "seed"])["score"].mean().unstack("seed")
    if NO_SEED in table.columns and len(table.columns) > 1:  # rows without a seed stand beside all seeds
        filled = table.drop(columns=NO_SEED)
        table = filled.apply(lambda column: column.fillna(table[NO_SEED]))
    return table.dropna(axis="columns").mean()


def difference(left: pd.DataFrame, right: pd.DataFrame, dataset: str | None = None) -> pd.Series:
    """Left less right by seed, where both have it; what does not depend on a seed is compared with all."""
    ours, theirs = by_seed(left, dataset), by_seed(right, dataset)
    if list(theirs.index) == [NO_SEED]:
        return ours - theirs.iloc[0]
    if list(ours.index) == [NO_SEED]:
        return ours.iloc[0] - theirs
    return (ours - theirs).dropna()


@dataclass(frozen=True)
class Gain:
    """A difference of two rows that is reported, whatever it is; with `over` several, over the best of them.

    With `at_least` or `above` it has a target: the mean is at least the one, and the whole interval above the other.
    """

    name: str
    row: str
    over: str | Sequence[str]
    dataset: str | None = None
    at_least: float | None = None
    above: float = 0.0
    cases: Sequence[str] = ()

    @property
    def rivals(self) -> list[str]:
        """The rows that it is over."""
        return [self.over] if isinstance(self.over, str) else list(self.over)


def gain_text(frame: pd.DataFrame, gain: Gain) -> str:
    """What a gain came out as in a frame of one case, what it is over, and whether its target is met.

    It is not met without an interval, or without one of the rows that it is over or one of their seeds: what is
    missing may be the best of all.
    """
    over, parts = gain.rivals, dict(iter(frame.groupby("name"))) if len(frame) else {}
    missing = [name for name in (gain.row, *over) if name not in parts]
    there = [name for name in over if name in parts and gain.row in parts]
    found = {name: difference(parts[gain.row], parts[name], gain.dataset) for name in there}
    found = {name: values for name, values in found.items() if len(values)}
    if not found:
        return f"missing: {', '.join(missing) or 'a common seed'}"
    best = max(found, key=lambda name: (len(found[name]), -found[name].sum()))
    incomplete = [name for name, values in found.items() if len(values) < len(found[best])]
    result = estimate(found[best])
    assert result is not None
    told = [f"over {best}"] * (len(over) > 1) + [result.verdict]
    told += [f"without {name}" for name in missing] + [f"{name} without some seeds" for name in incomplete]
    if gain.at_least is not None:
        reached = result.mean >= gain.at_least - _ROUNDING
        clear = result.mean - result.half_width > gain.above + _ROUNDING  # False with one seed
        told.append("**met**" if reached and clear and not missing and not incomplete else "**not met**")
    return f"{result.text('+')} ({'; '.join(told)})"


def metric_name(frame: pd.DataFrame) -> str:
    """The metric of the scores, such as `f1`, or all of them if data sets have different ones."""
    return " / ".join(dict.fromkeys(frame["metric"]))


# ---- Markdown ---------------------------------------------------------------------------------------------------


def row_name(by: Sequence[str], keys: Sequence[Any]) -> str:
    """`fused (alpha_init 0.3)`: a row's name, and those of the other labels that it has."""
    told = ", ".join(f"{label} {key}" for label, key in zip(by[1:], keys[1:], strict=True) if key != "")
    return f"{keys[0]} ({told})" if told else str(keys[0])


def score_table(
    frame: pd.DataFrame, by: Sequence[str] = ("name",), normalize_by: str | None = None, costs: bool = True
) -> str:
    """Rows by their names and labels: the score on each data set, mean, n, and costs; groups have headings."""
    datasets = list(dict.fromkeys(frame["dataset"]))
    reference = frame[frame["name"] == normalize_by].groupby("dataset")["score"].mean() if normalize_by else None
    header = ["", *_headings(frame), *["normalized"] * (reference is not None), "n", *(_COSTS if costs else ())]
    lines: list[list[Any]] = []
    last = ""
    for (group, *keys), part in frame.groupby(["group", *by], sort=False):
        if group not in ("", last):
            lines.append([f"**{group}**", *[""] * (len(header) - 1)])
        last = group
        means = {dataset: estimate(by_seed(part, dataset)) for dataset in datasets}
        complete = all(means.values())
        line: list[Any] = [row_name(by, keys), *(each and each.mean for each in means.values())]
        line.append(estimate(by_seed(part)) if complete else None)
        if reference is not None:
            shares = [each.mean / reference[name] for name, each in means.items() if each and reference.get(name)]
            line.append(float(np.mean(shares)) if len(shares) == len(datasets) else None)
        lines.append([*line, part["seed"].nunique(), *(_cost(part[name]) for name in (_COSTS if costs else ()))])
    return markdown_table(header, lines)


def _headings(frame: pd.DataFrame) -> list[str]:
    """Of the columns of data sets, each with its metric, and of their mean."""
    metrics = frame.groupby("dataset", sort=False)["metric"].first()
    return [*(f"{dataset} ({metric})" for dataset, metric in metrics.items()), f"mean ({metric_name(frame)})"]


def _cost(column: pd.Series) -> Any:
    known = column.dropna()
    if known.empty:
        return None
    return known.iloc[0] if isinstance(known.iloc[0], str) else f"{known.mean():.3g}"


def case_table(frame: pd.DataFrame, case: str = "case") -> str:
    """Mean scores of all rows in all cases; the first cell names their metric."""
    cases = list(dict.fromkeys(frame[case]))
    lines = [
        [name, *(estimate(by_seed(part[part[case] == each])) for each in cases)]
        for name, part in frame.groupby("name", sort=False)
    ]
    return markdown_table([f"mean {metric_name(frame)}", *cases], lines)


def gain_table(frame: pd.DataFrame, gains: Sequence[Gain], case: str = "case") -> str:
    """A line for each gain, a column for each case."""
    cases, lines = dict(iter(frame.groupby(case, sort=False))), []
    for gain in gains:
        over = gain.rivals[0] if len(gain.rivals) == 1 else f"best of ({'; '.join(gain.rivals)})"
        title = f"**{gain.name}** = {gain.row} - {over}" + (f", on {gain.dataset}" if gain.dataset else "")
        told = [gain_text(part, gain) if each in (gain.cases or cases) else None for each, part in cases.items()]
        target = (
            f"mean at least {gain.at_least:g} and interval above {gain.above:g}" if gain.at_least is not None else None
        )
        lines.append([title, *told, target])
    heading = f"difference of mean {metric_name(frame)}"
    return markdown_table([heading, *(each or "difference" for each in cases), "target"], lines)


def difference_table(frame: pd.DataFrame, baseline: str, by: Sequence[str] = ("name",)) -> str:
    """Differences to the rows of one name, paired by seed and by the labels that both have; bold: not undecided."""
    datasets = list(dict.fromkeys(frame["dataset"]))
    base, lines = frame[frame["name"] == baseline], []
    for keys, part in frame[frame["name"] != baseline].groupby(list(by), sort=False):
        other = base
        for label, key in zip(by[1:], keys[1:], strict=True):
            other = other[other[label].isin([key, ""])]
        line = [row_name(by, keys)]
        for each in (estimate(difference(part, other, dataset)) for dataset in (*datasets, None)):
            sure = each is not None and each.verdict in ("above 0", "below 0")
            line.append("-" if each is None else f"**{each.text('+')}**" if sure else each.text("+"))
        lines.append(line)
    return markdown_table(["", *_headings(frame)], lines)
