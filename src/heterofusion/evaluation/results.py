"""Results of an evaluation as plain JSON values, and as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from heterofusion.evaluation.metrics import primary_score, score
from heterofusion.markdown import markdown_table


def metric_record(metric: str, predictions: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """What `results.json` holds of the scores of one data set.

    Args:
        metric: One of `heterofusion.evaluation.metrics.METRICS`.
        predictions: The answers.
        references: The right answers, as many.

    Returns:
        `metric`, `primary`, `score` and `scores`.

    Raises:
        ValueError: the metric cannot score these references.
    """
    scores = score(metric, predictions, references)
    primary = primary_score(metric)
    return {"metric": metric, "primary": primary, "score": scores[primary], "scores": scores}


def mean_score(datasets: Mapping[str, Mapping[str, Any]]) -> float:
    """Mean of the scores of data sets."""
    return sum(record["score"] for record in datasets.values()) / len(datasets)


def results_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Markdown table of results: a row per adapter, a column per data set, mean, seconds and tokens per second.

    Args:
        results: Contents of `results.json` files of the same data sets.

    Returns:
        The table.
    """
    labels = list(results[0]["datasets"])
    rows = [
        [
            result["name"],
            *(result["datasets"][label]["score"] for label in labels),
            result["mean"],
            f"{result['seconds']:.1f}",
            f"{result['tokens_per_second']:.0f}",
        ]
        for result in results
    ]
    return markdown_table(["", *labels, "mean", "seconds", "tokens/s"], rows)
