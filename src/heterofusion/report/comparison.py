"""Methods side by side: a grid of methods and cases, gains, and for each case scores, costs and needs."""

from collections.abc import Mapping, Sequence
from typing import Any

from heterofusion.data.markdown import markdown_table
from heterofusion.report.comparison_gains import find_gains, gain_sentence, gain_sentences, gain_table
from heterofusion.report.comparison_record import (
    ComparisonRow,
    ComparisonTable,
    Gain,
    parse_comparison,
    read_comparison,
)

__all__ = [
    "ComparisonRow",
    "ComparisonTable",
    "Gain",
    "comparison_section",
    "comparison_table",
    "gain_sentences",
    "parse_comparison",
    "read_comparison",
]

_GIB = 2**30
Picture = tuple[str, str]  # title and Markdown target


def comparison_table(table: ComparisonTable) -> str:
    """Markdown table of the scores: with cases a row per method and a column per case, else with costs and needs."""
    return _case_grid(table) if table.cases else _detailed_table(table)


def _case_grid(table: ComparisonTable) -> str:
    """Mean scores with the interval of the mean, a row per method and a column per case."""
    found = {(row.name, row.case): row.estimate().text() for row in table.rows}
    rows: list[list[Any]] = []
    group = ""
    for name, of_group in table.names.items():
        if of_group != group:
            group = of_group
            rows.append([f"**{group}**" if group else "", *[""] * len(table.cases)])
        rows.append([name, *(found.get((name, case)) or found.get((name, None)) for case in table.cases)])
    return markdown_table(["", *table.cases], rows)


def _detailed_table(table: ComparisonTable) -> str:
    """Scores by data set with the interval of the mean, and what each method costs and needs."""
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


def search_table(table: ComparisonTable) -> str | None:
    """Markdown table of the searches: what was tried, the scores on the validation data, what was chosen."""
    rows = {}
    for row in table.rows:  # what was chosen holds in all cases of a method
        search = row.content.get("search")
        if search and row.name not in rows:
            tried = ", ".join(f"{settings_text(each['settings'])}: {each['score']:.3f}" for each in search["tried"])
            chosen = settings_text(row.content["settings"])
            if _is_at_an_edge(row.content["settings"], search["tried"]):
                chosen += " (at the edge)"
            rows[row.name] = [row.name, chosen, search["runs"], tried]
    header = ["", "chosen", "validation runs", "mean score of each on the validation data"]
    return markdown_table(header, list(rows.values())) if rows else None


def _is_at_an_edge(chosen: Mapping[str, Any], tried: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a number that was chosen is the lowest or highest of three or more: a better one may lie beyond."""
    for name, value in chosen.items():
        values = sorted({each["settings"][name] for each in tried if isinstance(each["settings"][name], (int, float))})
        if len(values) > 2 and value in (values[0], values[-1]):
            return True
    return False


def settings_text(settings: Mapping[str, Any]) -> str:
    """Values of flags, as a cell."""
    return " ".join(f"{name} {value}" for name, value in settings.items())


def comparison_section(
    table: ComparisonTable,
    pictures: Sequence[Picture],
    level: str,
    of_cases: Mapping[str, Sequence[Picture]] | None = None,
) -> str:
    """The whole section: text, tables, gains, searches and pictures.

    Args:
        table: the comparison.
        pictures: title and Markdown target of each.
        level: `##` or the like.
        of_cases: the same for single cases.
    """
    content = table.content
    parts = [f"{level} {content.get('title') or 'Methods side by side'}", _introduction(table)]
    if content.get("missing"):
        parts.append(f"> **Warning.** Runs are missing: {'; '.join(content['missing'])}.")
    parts.append(comparison_table(table))
    parts += _gains_of_all_cases(table) if table.cases else _bullets(gain_sentences(table))
    parts += _shown(pictures)
    about = {row.name: row.content["about"] for row in table.rows if row.content.get("about")}
    if about:
        parts += ["What the rows are:", *_bullets([f"**{name}**: {text}" for name, text in about.items()])]
    searches = search_table(table)
    if searches:
        parts += ["Hyper-parameters:", searches]
    found = list(find_gains(table))
    for case in table.cases:
        of_case = table.of_case(case)
        if of_case.rows:
            parts += [f"{level}# {case}", _detailed_table(of_case)]
            parts += _bullets([gain_sentence(gain, False) for gain in found if gain.case == case])
            parts += _shown((of_cases or {}).get(case, ()))
    return "\n\n".join(parts)


def _introduction(table: ComparisonTable) -> str:
    """What the columns are."""
    told = []
    if table.cases:
        told.append(
            "First the mean scores of all methods in all cases, where `-` is what was not compared; "
            "then the gains, and below a table with data sets and costs for each case."
        )
        if any(row.case is None for row in table.rows):
            told.append("What nothing of a case enters was run once and has the same score in all of them.")
    told += [
        "Scores run from 0 to 1; `mean` is over the data sets, ± half the width of its 95% t interval over seeds "
        "(n = 1: nothing in it is random, or one seed was run). An interval is of what a seed changes (sample, "
        "initialization, order) on one set of test data, and those of gains are not corrected for their number.",
        "`making` is what one run takes without imports and loading, `search` all runs of the search for "
        "hyper-parameters together, `answering` all test prompts; `peak GiB` is the most that one process held, on "
        "the GPU if it used one; `models` are alive while it answers; `task id`: it must be told which task a prompt "
        "is of; `runs sources`: models of the sources are run on their own bases. Seconds are missing where nothing "
        "was made or recorded, or where a run was resumed.",
    ]
    if any(row.over_seeds("made_seconds") is not None for row in table.rows):
        told.append(
            "`labels etc.` is what it took to make what several methods share, in each row that uses it: labels of "
            "the source experts, further adapters."
        )
    normal = table.content.get("normalize_by")
    if normal and any(row.name == normal for row in table.rows):
        told.append(f"`normalized`: mean over the data sets of the score as a share of that of {normal}.")
    budget = table.content.get("search_budget")
    if budget:
        case = table.content.get("search_case")
        told.append(
            f"Every method whose hyper-parameters were searched got {budget} validation runs, on data of their own"
            f"{f' and in the case {case}' if case else ''}; "
            "controls take the hyper-parameters of what they are the control of."
        )
    return " ".join(told)


def _gains_of_all_cases(table: ComparisonTable) -> list[str]:
    """The table of the gains and what its words mean."""
    gains = gain_table(table)
    if gains is None:
        return []
    told = (
        "Gains, paired by seed. `above 0` and `below 0`: the whole 95% interval is there; `undecided`: it contains 0; "
        "`-`: not compared. A target is met if the mean and the whole interval are where it wants them."
    )
    return [told, gains]


def _bullets(lines: Sequence[str]) -> list[str]:
    return ["\n".join(f"- {line}" for line in lines)] if lines else []


def _shown(pictures: Sequence[Picture]) -> list[str]:
    return [f"![{title}]({target})" for title, target in pictures]
