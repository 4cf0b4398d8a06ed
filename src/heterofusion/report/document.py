"""The report as Markdown, and the same numbers as JSON."""

import json
import posixpath
import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from heterofusion.data.markdown import markdown_table
from heterofusion.report.claims import AT_LEAST, Finding
from heterofusion.report.comparison_record import ComparisonTable
from heterofusion.report.results import MEAN, Result
from heterofusion.report.rows import DETAIL_COUNTS, Group, Row, baseline_difference, baseline_rows

# what an f1 is the F1 of: see heterofusion.evaluation.uie
_SCORES = {"f1": "micro-F1"}
_INTERVAL = (
    "Cells are the mean over seeds ± half the width of its 95% t interval; with one seed (n = 1), the value alone."
)


def score_name(group: Group) -> str:
    """What the scores of a group are, for axes: the primary score, or `score` where columns differ."""
    names = {d.primary for result in group.results for d in result.datasets.values()}
    return _SCORES.get(names.pop(), "score") if names == {"f1"} else names.pop() if len(names) == 1 else "score"


def group_table(group: Group, group_by: str) -> str:
    """Markdown table of a group: a row per name and labels, a column per data set, the mean, seeds and seconds."""
    header = ["", *group.columns, MEAN, "n", "fusion, s", "evaluation, s"]
    rows = []
    for row in group.rows:
        found = [row.estimate(column, group.columns) for column in (*group.columns, MEAN)]
        cells = ["-" if each is None else each.text() for each in found]
        times = [_seconds(row.seconds(of_fusion=True)), _seconds(row.seconds(of_fusion=False))]
        rows.append([group.text(row, group_by), *cells, len(row.results), *times])
    return markdown_table(header, rows)


def _seconds(value: float | None) -> str | None:
    return None if value is None else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def column_sentence(group: Group) -> str:
    """Which score of which metric each column is, and over how many examples."""
    kinds: dict[tuple[str, str, str], list[str]] = {}
    for column in group.columns:
        datasets = [result.datasets[column] for result in group.results if column in result.datasets]
        counts = sorted({dataset.examples for dataset in datasets})
        first = datasets[0]
        key = (_SCORES.get(first.primary, first.primary), first.metric, "/".join(map(str, counts)))
        kinds.setdefault(key, []).append(column)
    parts = [
        f"{', '.join(columns)}: {score} of {metric}, {examples} examples"
        for (score, metric, examples), columns in kinds.items()
    ]
    return f"Scores run from 0 to 1. {'; '.join(parts)}."


def difference_table(group: Group, group_by: str, baseline: str) -> str | None:
    """Markdown table of differences to a baseline; bold where the interval does not hold 0. None if there are none."""
    rows = []
    for row in group.rows:
        found = [baseline_difference(row, group, baseline, c, group_by) for c in (*group.columns, MEAN)]
        if any(each is not None for each in found):
            rows.append([group.text(row, group_by), *map(_difference, found)])
    return markdown_table(["", *group.columns, MEAN], rows) if rows else None


def _difference(found: Any) -> str:
    if found is None:
        return "-"
    text = found.text(signed=True)
    decided = found.interval is not None and not found.interval[0] <= 0 <= found.interval[1]
    return f"**{text}**" if decided else text


def details_table(group: Group, group_by: str) -> str:
    """Markdown table of all scores of the metrics, a row per table row and data set; counts are left out."""
    scores = dict.fromkeys(
        name
        for result in group.results
        for dataset in result.datasets.values()
        for name in dataset.scores
        if name not in DETAIL_COUNTS
    )
    rows = []
    for row in group.rows:
        for column in group.columns:
            found = [row.detail(column, score) for score in scores]
            if any(each is not None for each in found):
                cells = ["-" if each is None else each.text() for each in found]
                rows.append([group.text(row, group_by), column, *cells])
    return markdown_table(["", "data set", *(name.replace("_", " ") for name in scores)], rows)


def claims_table(findings: Sequence[Finding]) -> str:
    """Markdown table of claims: what was measured, what was claimed, and the verdict."""
    rows = []
    for finding in findings:
        claim, measured = finding.claim, finding.measured
        kind = "spread" if claim.spread is not None else "difference" if claim.over is not None else "score"
        sign = "≥" if claim.bound == AT_LEAST else "≤"
        interval = None if measured is None else measured.interval
        rows.append(
            [
                claim.text,
                f"**{finding.verdict}**" + (f" ({finding.reason})" if finding.reason else ""),
                f"{kind} of {claim.column} {sign} {claim.threshold:.3f}",
                None if measured is None else measured.text(signed=kind == "difference"),
                None if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}",
                0 if measured is None else len(measured.values),
            ]
        )
    return markdown_table(["claim", "verdict", "claimed", "measured", "95% interval", "n"], rows)


def slug(text: str) -> str:
    """A name as part of a file's name."""
    return re.sub(r"[^A-Za-z0-9.-]+", "-", text).strip("-.").lower() or "results"


def link(picture: str, folder: str) -> str:
    """Markdown target of a picture, relative to the folder of the document; both are absolute, with slashes."""
    return quote(posixpath.relpath(picture, folder))


def group_section(
    group: Group, group_by: str, baseline: str | None, details: bool, pictures: Sequence[tuple[str, str]], level: str
) -> str:
    """One group: what all rows share, warnings, tables and pictures.

    Args:
        group: the group.
        group_by: the label that makes groups.
        baseline: row to which differences are shown.
        details: whether all scores of the metrics are told.
        pictures: title and Markdown target of each.
        level: `##` or the like.
    """
    parts = [f"{level} {group_title(group, group_by)}"]
    if group.common:
        parts.append("All rows: " + ", ".join(f"{name} {value}" for name, value in group.common.items()) + ".")
    parts.append(f"{column_sentence(group)} {_INTERVAL}")
    parts += [f"> **Warning.** {warning}" for warning in group.warnings]
    parts.append(group_table(group, group_by))
    if baseline is not None:
        if not baseline_rows(group, baseline, group_by):
            parts.append(f"There is no row `{baseline}` here to compare with.")
        else:
            table = difference_table(group, group_by, baseline)
            told = f"Difference to `{baseline}`, paired by seed and shared labels"
            parts += (
                [f"{told}; bold where its 95% interval does not contain 0:", table]
                if table
                else [f"{told}: no other row has a pair."]
            )
    parts += [f"![{title}]({target})" for title, target in pictures]
    if details:
        parts += ["All scores of the metrics:", details_table(group, group_by)]
    return "\n\n".join(parts)


def group_title(group: Group, group_by: str) -> str:
    """Heading of a group."""
    return f"Results without the label {group_by}" if group.value is None else f"{group_by}: {group.value}"


def provenance_sentence(results: Sequence[Result], comparisons: Sequence[ComparisonTable] = ()) -> str:
    """How many results and comparisons there are, what the former ran on, and with which versions of packages."""
    devices = sorted({result.device for result in results if result.device})
    versions: dict[str, set[str]] = {}
    for of_one in [result.versions for result in results] + [table.versions for table in comparisons]:
        for name, version in of_one.items():
            versions.setdefault(name, set()).add(version)
    told = ", ".join(f"{name} {' and '.join(sorted(found))}" for name, found in versions.items())
    where = f" on {', '.join(devices)}" if devices else ""
    counts = ((len(results), "result", where), (len(comparisons), "comparison", ""))
    made_from = " and ".join(f"{count} {what}{'s' * (count > 1)}{rest}" for count, what, rest in counts if count)
    return f"Made from {made_from}{f', with {told}' if told else ''}."


def group_numbers(group: Group, group_by: str, baseline: str | None) -> dict[str, Any]:
    """The numbers of a group for JSON."""

    def numbers(row: Row) -> dict[str, Any]:
        columns = (*group.columns, MEAN)
        scores = {column: row.estimate(column, group.columns) for column in columns}
        entry: dict[str, Any] = {
            "name": row.name,
            "labels": dict(row.labels),
            "seeds": [result.seed for result in row.results],
            "files": [result.origin for result in row.results],
            "scores": {column: found and found.plain() for column, found in scores.items()},
            "fusion_seconds": row.seconds(of_fusion=True),
            "evaluation_seconds": row.seconds(of_fusion=False),
        }
        if baseline is not None:
            found = {c: baseline_difference(row, group, baseline, c, group_by) for c in columns}
            entry["differences"] = {column: each and each.plain() for column, each in found.items()}
        return entry

    return {
        "group_by": group_by,
        "value": group.value,
        "labels": dict(group.common),
        "columns": list(group.columns),
        "warnings": group.warnings,
        "rows": [numbers(row) for row in group.rows],
    }


def claim_numbers(finding: Finding) -> dict[str, Any]:
    """A finding for JSON."""
    claim = finding.claim
    sides = {key: getattr(claim, key) for key in ("row", "over", "spread") if getattr(claim, key) is not None}
    return {
        "text": claim.text,
        **sides,
        "column": claim.column,
        claim.bound: claim.threshold,
        "verdict": finding.verdict,
        "reason": finding.reason,
        "measured": finding.measured and finding.measured.plain(),
    }


def as_json(content: Mapping[str, Any]) -> str:
    """Strict JSON, which has no NaN."""
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
