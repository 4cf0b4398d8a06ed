"""Methods side by side, from `comparison.json`: one table with scores and costs, gains, and what was searched."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heterofusion.markdown import markdown_table
from heterofusion.records import load_json, read_text
from heterofusion.report.fields import Fields
from heterofusion.report.intervals import Estimate, Seed, differences, estimate, mean_per_seed

_GIB = 2**30


@dataclass(frozen=True)
class ComparisonRow:
    """One method.

    Attributes:
        name: of the row.
        group: heading of the rows that it stands among.
        content: its record in `comparison.json`.
        scores: by data set, score by seed; None is the seed of what does not depend on one.
    """

    name: str
    group: str
    content: Mapping[str, Any]
    scores: Mapping[str, Mapping[Seed, float]]

    @property
    def means(self) -> dict[Seed, float]:
        """Mean over the data sets, by seed."""
        seeds = next(iter(self.scores.values()))
        return {seed: sum(values[seed] for values in self.scores.values()) / len(self.scores) for seed in seeds}

    def estimate(self, dataset: str | None = None) -> Estimate:
        """Mean over seeds of a data set, or of the mean over all of them."""
        found = estimate((self.means if dataset is None else self.scores[dataset]).values())
        assert found is not None  # a row has a run
        return found

    def over_seeds(self, name: str) -> float | None:
        """Mean over seeds of another number of its runs; None where no run has it."""
        found = [run[name] for run in self.content["runs"] if run.get(name) is not None]
        return sum(found) / len(found) if found else None


@dataclass(frozen=True)
class ComparisonTable:
    """A comparison as it is reported.

    Attributes:
        content: `comparison.json`.
        rows: the methods, in order.
        datasets: names of the data sets.
    """

    content: Mapping[str, Any]
    rows: Sequence[ComparisonRow]
    datasets: Sequence[str]

    def row(self, name: str) -> ComparisonRow | None:
        """The row of a name, None if its runs are missing."""
        return next((row for row in self.rows if row.name == name), None)

    def gain(self, row: str, over: str) -> Estimate | None:
        """Mean of a row less that of another, paired by seed; None if one is missing."""
        left, right = self.row(row), self.row(over)
        if left is None or right is None:
            return None
        seeds, _ = mean_per_seed(differences({(): left.means}, {(): right.means}))
        return estimate(seeds.values())


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
        ValueError: a field is missing or of another type, or rows are of different data; names file and field.
    """
    field = Fields(content, where)
    rows = []
    for index, entry in enumerate(field.get("rows", list)):
        row = Fields(entry, where, f"rows[{index}].")
        for name, kind in (("models_at_inference", int), ("needs_task_id", bool), ("ran_source_models", bool)):
            row.get(name, kind)
        runs = [Fields(run, where, f"rows[{index}].runs.") for run in row.get("runs", list)]
        if not runs:
            raise ValueError(f"{where}: rows[{index}] has no runs; make the comparison again")
        scores: dict[str, dict[Seed, float]] = {}
        for run in runs:
            seed = None if run.get("seed", int, None) is None else str(run.get("seed", int))
            values = run.get("scores", dict)
            for dataset in values:
                number = Fields(values, where, f"rows[{index}].runs.scores.").number(dataset)
                scores.setdefault(dataset, {})[seed] = float(number)
        rows.append(ComparisonRow(row.get("name", str), row.get("group", str, ""), entry, scores))
    for index, entry in enumerate(field.get("gains", list, [])):
        for name in ("name", "row", "over"):
            Fields(entry, where, f"gains[{index}].").get(name, str)
    if not rows:
        raise ValueError(f"{where} has no rows; recipes/compare.py has to finish a run first")
    datasets = list(rows[0].scores)
    for each in rows:
        if set(each.scores) != set(datasets):
            raise ValueError(f"{where}: {each.name} is scored on {', '.join(each.scores)}, others on other data sets")
    return ComparisonTable(content, rows, datasets)


def comparison_table(table: ComparisonTable) -> str:
    """Markdown table: scores with the interval of the mean, and what each method costs and needs."""
    normal = table.row(table.content.get("normalize_by") or "")
    shared = any(row.over_seeds("made_seconds") is not None for row in table.rows)
    header = ["", *table.datasets, "mean", *(["normalized"] if normal else []), "n",
              *(["labels etc., s"] if shared else []), "making, s", "search, s", "answering, s", "peak GiB", "models",
              "task id", "runs sources"]  # fmt: skip
    rows: list[list[Any]] = []
    group = None
    for row in table.rows:
        if row.group != group:
            group = row.group
            if group:
                rows.append([f"**{group}**", *[""] * (len(header) - 1)])
        content, search = row.content, row.content.get("search")
        peak = row.over_seeds("peak_memory_bytes")
        rows.append(
            [
                row.name,
                *(row.estimate(dataset).mean for dataset in table.datasets),
                row.estimate().text(),
                *([_normalized(row, normal, table.datasets)] if normal else []),
                len(row.means),
                *([_seconds(row.over_seeds("made_seconds"))] if shared else []),
                _seconds(row.over_seeds("making_seconds")),
                _seconds(search["seconds"] if search else None),
                _seconds(row.over_seeds("evaluation_seconds")),
                None if peak is None else f"{peak / _GIB:.2f}",
                content["models_at_inference"],
                "yes" if content["needs_task_id"] else "no",
                "yes" if content["ran_source_models"] else "no",
            ]
        )
    return markdown_table(header, rows)


def _normalized(row: ComparisonRow, normal: ComparisonRow, datasets: Sequence[str]) -> float | None:
    """Mean over data sets of the score as a share of another row's; None where that is 0."""
    shares = []
    for dataset in datasets:
        whole = normal.estimate(dataset).mean
        if whole == 0:
            return None
        shares.append(row.estimate(dataset).mean / whole)
    return sum(shares) / len(shares)


def _seconds(value: float | None) -> str | None:
    return None if value is None else f"{value:.1f}"


def gain_sentences(table: ComparisonTable) -> list[str]:
    """What each gain came out as, whatever it is."""
    sentences = []
    for gain in table.content.get("gains") or []:
        found = table.gain(gain["row"], gain["over"])
        told = f"**{gain['name']}** = {gain['row']} - {gain['over']}"
        if found is None:
            sentences.append(f"{told}: one of the two is missing.")
            continue
        interval = found.interval
        verdict = "one seed: undecided"
        if interval is not None:
            sign = "above" if interval[0] > 0 else "below" if interval[1] < 0 else None
            verdict = f"the whole 95% interval is {sign} 0" if sign else "the 95% interval contains 0: undecided"
        sentences.append(f"{told} = **{found.text(signed=True)}** (n = {len(found.values)}; {verdict}).")
    return sentences


def search_table(table: ComparisonTable) -> str | None:
    """Markdown table of the searches: what was tried, the scores on the validation data, what was chosen."""
    rows = []
    for row in table.rows:
        search = row.content.get("search")
        if search:
            tried = ", ".join(f"{settings_text(each['settings'])}: {each['score']:.3f}" for each in search["tried"])
            rows.append([row.name, settings_text(row.content["settings"]), search["runs"], tried])
    return (
        markdown_table(["", "chosen", "validation runs", "mean score of each on the validation data"], rows)
        if rows
        else None
    )


def settings_text(settings: Mapping[str, Any]) -> str:
    """Values of flags, as a cell."""
    return " ".join(f"{name} {value}" for name, value in settings.items())


def comparison_section(table: ComparisonTable, pictures: Sequence[tuple[str, str]], level: str) -> str:
    """The whole section: text, table, gains, searches and pictures.

    Args:
        table: the comparison.
        pictures: title and Markdown target of each.
        level: `##` or the like.
    """
    content = table.content
    budget = content.get("search_budget")
    told = [
        "Scores run from 0 to 1; `mean` is over the data sets, ± half the width of its 95% t interval over seeds "
        "(n = 1: nothing in it is random, or one seed was run).",
        "`making` is what one run takes without imports and loading, `search` all runs of the search for "
        "hyper-parameters together, `answering` all test prompts; `peak GiB` is the most that one process held, on "
        "the GPU if it used one; `models` are alive while it answers; `task id`: it must be told which task a prompt "
        "is of; `runs sources`: the source experts are run on their own bases. Seconds are missing where nothing was "
        "made or recorded, or where a run was resumed.",
    ]
    if any(row.over_seeds("made_seconds") is not None for row in table.rows):
        told.append(
            "`labels etc.` is what it took to make what several methods share, in each row that uses it: labels of "
            "the source experts, further adapters."
        )
    normal = content.get("normalize_by")
    if normal and table.row(normal):
        told.append(f"`normalized`: mean over the data sets of the score as a share of that of {normal}.")
    if budget:
        told.append(
            f"Every method whose hyper-parameters were searched got {budget} validation runs, on data of their own; "
            "controls take the hyper-parameters of what they are the control of."
        )
    parts = [f"{level} {content.get('title') or 'Methods side by side'}", " ".join(told)]
    if content.get("missing"):
        parts.append(f"> **Warning.** Runs are missing: {'; '.join(content['missing'])}.")
    parts.append(comparison_table(table))
    gains = gain_sentences(table)
    if gains:
        parts.append("\n".join(f"- {sentence}" for sentence in gains))
    parts += [f"![{title}]({target})" for title, target in pictures]
    notes = [f"- **{row.name}**: {row.content['about']}" for row in table.rows if row.content.get("about")]
    if notes:
        parts += ["What the rows are:", "\n".join(notes)]
    searches = search_table(table)
    if searches:
        parts += ["Hyper-parameters:", searches]
    return "\n\n".join(parts)
