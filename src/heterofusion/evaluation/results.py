"""Results of an evaluation as plain JSON values, and as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from heterofusion.data.markdown import markdown_table
from heterofusion.evaluation.metrics import primary_score, score
from heterofusion.runtime.errors import UserError


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


def tokens_per_second(new_tokens: int, seconds: float) -> float:
    """Speed of generation, rounded; 0 where no time is known."""
    return round(new_tokens / seconds, 1) if seconds else 0.0


def join_results(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Join results of disjoint data sets into one row, such as those of experts on bases of their own.

    Args:
        parts: Contents of `results.json` files, each with data sets of its own.

    Returns:
        Contents of a `results.json`: data sets of all; seconds, tokens and models summed; the largest peak of memory.
        It needs the task id. `parts` says which base and adapters answered what; the rest is the first part's.

    Raises:
        ValueError: There are no parts, one is no content of a `results.json`, or two have a data set in common.
    """
    if not parts:
        raise UserError("no results to join; give the contents of one results.json at least")
    datasets: dict[str, Any] = {}
    for number, part in enumerate(parts, start=1):
        missing = [key for key in ("name", "datasets", "seconds", "new_tokens") if key not in part]
        if missing:
            raise UserError(f"part {number} of the results to join has no {missing[0]}; give a whole results.json")
        for label, record in part["datasets"].items():
            if label in datasets:
                raise UserError(f"two of the results to join have the data set {label!r}; join disjoint ones only")
            datasets[label] = record
    seconds = sum(part["seconds"] for part in parts)
    new_tokens = sum(part["new_tokens"] for part in parts)
    peaks = [part["peak_memory_bytes"] for part in parts if part.get("peak_memory_bytes") is not None]
    bases = {part.get("base_model") for part in parts}
    told = ("base_model", "adapter", "adapters", "made_by")
    return {
        **{key: value for key, value in parts[0].items() if key not in ("adapters", "members")},
        "base_model": bases.pop() if len(bases) == 1 else None,
        "adapter": None,
        "fusion": None,
        "made_by": common_made_by([part.get("made_by") for part in parts]),
        "parts": [
            {**{key: part[key] for key in told if key in part}, "datasets": [*part["datasets"]]} for part in parts
        ],
        "models_at_inference": sum(part.get("models_at_inference", 1) for part in parts),
        "needs_task_id": True,
        "datasets": datasets,
        "mean": mean_score(datasets),
        "seconds": round(seconds, 3),
        "new_tokens": new_tokens,
        "tokens_per_second": tokens_per_second(new_tokens, seconds),
        "peak_memory_bytes": max(peaks, default=None),
    }


def common_made_by(records: Sequence[Mapping[str, Any] | None]) -> dict[str, Any] | None:
    """What made several adapters of one kind and method, else None.

    Records that are equal are of one run, which made several adapters. What other runs took adds up; a seed that they
    do not share is None, and a source control of one of them is told.
    """
    first = records[0]
    if first is None or any(
        record is None or any(record.get(key) != first.get(key) for key in ("kind", "method")) for record in records
    ):
        return None
    told = [record for record in records if record is not None]
    runs = [record for index, record in enumerate(told) if record not in told[:index]]
    if len(runs) == 1:
        return dict(first)
    controls = dict.fromkeys(run["source_control"] for run in runs if run.get("source_control") is not None)
    return {
        **first,
        "seed": first.get("seed") if all(run.get("seed") == first.get("seed") for run in runs) else None,
        "ran_source_models": any(run.get("ran_source_models") for run in runs),
        "source_control": "+".join(controls) or None,
        "cost": _added_cost([run.get("cost") or {} for run in runs]),
    }


def _added_cost(costs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Cost of several runs together: seconds of all, None if those of one are not known, and the largest peak."""
    known = [cost["seconds"] for cost in costs if cost.get("seconds") is not None]
    peaks = [cost["peak_memory_bytes"] for cost in costs if cost.get("peak_memory_bytes") is not None]
    devices = {cost.get("device") for cost in costs}
    resumed = [cost["resumed_from_step"] for cost in costs if cost.get("resumed_from_step") is not None]
    return {
        "seconds": round(sum(known), 3) if len(known) == len(costs) else None,
        "peak_memory_bytes": max(peaks, default=None),
        "device": devices.pop() if len(devices) == 1 else None,
        **({"resumed_from_step": max(resumed)} if resumed else {}),
    }


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
