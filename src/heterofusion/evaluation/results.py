"""What an evaluation leaves: scores as plain JSON values, what made an adapter, rows that are joined, and a table.

    output_dir/state.json                  what is evaluated; written first, so that a resumed run can compare
    output_dir/parts/<label>/rank-0.jsonl  answers as they come, until all is finished
    output_dir/predictions/<label>.jsonl   all answers, in the order of the data set
    output_dir/results.json                written last: where it stands, the evaluation is complete

With several rows, all but the state is in a folder per row.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from heterofusion.data.markdown import markdown_table
from heterofusion.evaluation.metrics import primary_score, score
from heterofusion.experts.expert import Adapter
from heterofusion.publish.record import read_record
from heterofusion.runtime.errors import UserError

logger = logging.getLogger(__name__)

STATE_FILE, RESULTS_FILE, PREDICTIONS, PARTS = "state.json", "results.json", "predictions", "parts"


def metric_record(metric: str, predictions: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """What results hold of the scores of one data set: `metric`, `primary`, `score` and `scores`."""
    scores = score(metric, predictions, references)
    primary = primary_score(metric)
    return {"metric": metric, "primary": primary, "score": scores[primary], "scores": scores}


def mean_score(datasets: Mapping[str, Mapping[str, Any]]) -> float:
    """Mean of the scores of data sets."""
    return sum(record["score"] for record in datasets.values()) / len(datasets)


def totals(datasets: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Mean score, seconds and tokens of data sets together."""
    seconds = sum(record["seconds"] for record in datasets.values())
    new_tokens = sum(record["new_tokens"] for record in datasets.values())
    return {
        "mean": mean_score(datasets),
        "seconds": round(seconds, 3),
        "new_tokens": new_tokens,
        "tokens_per_second": round(new_tokens / seconds, 1) if seconds else 0.0,
    }


def made_record(adapter: Adapter | None) -> dict[str, Any]:
    """`fusion` and `made_by` of the record that was written for an adapter's weights; None where nothing tells."""
    nothing = {"fusion": None, "made_by": None}
    try:
        record = None if adapter is None else read_record(adapter.folder, adapter.sha256)
    except UserError as error:
        logger.warning("%s; results do not tell what made adapter %s", error, adapter and adapter.given)
        return nothing
    if record is None:
        return nothing
    made_by = record.get("made_by")
    if "sources" not in record or "preset" not in record.get("method", {}):
        return {**nothing, "made_by": made_by}
    fusion = {name: record["method"].get(name) for name in ("preset", "alpha_init", "mu_gate", "seed")}
    fusion["sources"] = [source["name"] for source in record["sources"]]
    fusion["train_seconds"] = record.get("metrics", {}).get("train_runtime")
    return {"fusion": fusion, "made_by": made_by}


def common_made_by(records: Sequence[Mapping[str, Any] | None]) -> dict[str, Any] | None:
    """What made several adapters of one kind and method, else None.

    Records that are equal are of one run, which made several adapters. What other runs took adds up; a seed that they
    do not share is None, and a source control of one of them is told.
    """
    told = [record for record in records if record is not None]
    if len(told) < len(records) or len({(record.get("kind"), record.get("method")) for record in told}) != 1:
        return None
    runs = [record for index, record in enumerate(told) if record not in told[:index]]
    if len(runs) == 1:
        return dict(runs[0])
    costs = [run.get("cost") or {} for run in runs]
    seconds = [cost.get("seconds") for cost in costs]
    devices = {cost.get("device") for cost in costs}
    resumed = [cost["resumed_from_step"] for cost in costs if cost.get("resumed_from_step") is not None]
    controls = dict.fromkeys(run["source_control"] for run in runs if run.get("source_control") is not None)
    return {
        **runs[0],
        "seed": runs[0].get("seed") if len({run.get("seed") for run in runs}) == 1 else None,
        "ran_source_models": any(run.get("ran_source_models") for run in runs),
        "source_control": "+".join(controls) or None,
        "cost": {
            "seconds": None if None in seconds else round(sum(filter(None, seconds)), 3),
            "peak_memory_bytes": _largest(cost.get("peak_memory_bytes") for cost in costs),
            "device": devices.pop() if len(devices) == 1 else None,
            **({"resumed_from_step": max(resumed)} if resumed else {}),
        },
    }


def _largest(values: Iterable[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)


def join_results(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Join results of disjoint data sets into one row, such as those of experts on bases of their own.

    Seconds, tokens and models are summed; it needs the task id. `parts` says which base and adapters answered what.
    """
    datasets: dict[str, Any] = {}
    for part in parts:
        for label, record in part["datasets"].items():
            if label in datasets:
                raise UserError(f"two of the results to join have the data set {label!r}; join disjoint ones only")
            datasets[label] = record
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
        **totals(datasets),
        "peak_memory_bytes": _largest(part.get("peak_memory_bytes") for part in parts),
    }


def row_name(result: Mapping[str, Any]) -> str:
    """How tables call a result: a control says that it is one, whatever it was named."""
    control = (result.get("made_by") or {}).get("source_control")
    return f"{result['name']} (CONTROL: {control})" if control else str(result["name"])


def results_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Markdown table of results of the same data sets: a row each, with mean, seconds and tokens per second."""
    labels = list(results[0]["datasets"])
    rows = [
        [
            row_name(result),
            *(result["datasets"][label]["score"] for label in labels),
            result["mean"],
            f"{result['seconds']:.1f}",
            f"{result['tokens_per_second']:.0f}",
        ]
        for result in results
    ]
    return markdown_table(["", *labels, "mean", "seconds", "tokens/s"], rows)
