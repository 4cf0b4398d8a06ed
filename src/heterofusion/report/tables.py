"""Markdown tables of results."""

from collections.abc import Mapping, Sequence
from typing import Any


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; floats get three decimals, None a dash."""
    lines = ["| " + " | ".join(map(_cell, header)) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(map(_cell, row)) + " |" for row in rows])


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}"
    # a bar or a line break in a name would end the cell
    return " ".join(str(value).split()).replace("|", "\\|")


def score_table(scores: Mapping[str, Mapping[str, float]], tasks: Sequence[str]) -> str:
    """Markdown table of one score per task and the mean over the tasks, one row per method."""
    rows = []
    for name, row in scores.items():
        values = [row.get(task) for task in tasks]
        known = [value for value in values if value is not None]
        rows.append([name, *values, sum(known) / len(known) if known else None])
    return markdown_table(["", *tasks, "mean"], rows)
