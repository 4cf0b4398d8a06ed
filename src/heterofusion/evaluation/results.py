"""What an evaluation leaves: scores as plain JSON values, what made an adapter, and a table.

    output_dir/state.json                  what is evaluated; written first, so that a resumed run can compare
    output_dir/parts/<label>/rank-0.jsonl  answers as they come, until all is finished
    output_dir/predictions/<label>.jsonl   all answers, in the order of the data set
    output_dir/results.json                written last: where it stands, the evaluation is complete

With several rows, all but the state is in a folder per row.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from heterofusion.data.markdown import markdown_table
from heterofusion.evaluation.metrics import primary_score, score
from heterofusion.experts.expert import Adapter
from heterofusion.publish.record import find_record, join_controls

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


def made_by(*adapters: Adapter | None) -> dict[str, Any] | None:
    """What made adapters of one kind and method, by the records beside them; None where they do not tell that.

    Equal records are of one run, which made several adapters; the costs of different runs add up.
    """
    found = [find_record(adapter.folder, adapter.sha256) if adapter else None for adapter in adapters]
    told = [record.get("made_by") for _, record in filter(None, found)]
    runs: list[dict[str, Any]] = [run for index, run in enumerate(told) if run and run not in told[:index]]
    if len(told) < len(adapters) or None in told or len({(run["kind"], run["method"]) for run in runs}) != 1:
        return None
    if len(runs) == 1:
        return runs[0]
    costs = [run["cost"] for run in runs]
    seconds: list[Any] = [None if cost.get("resumed_from_step") else cost["seconds"] for cost in costs]
    peaks = [cost["peak_memory_bytes"] or 0 for cost in costs]
    return {
        **runs[0],
        "seed": runs[0]["seed"] if len({run["seed"] for run in runs}) == 1 else None,
        "ran_source_models": any(run["ran_source_models"] for run in runs),
        "source_control": join_controls(*(run["source_control"] for run in runs)),
        "cost": {
            "seconds": None if None in seconds else round(sum(seconds), 3),
            "peak_memory_bytes": max(peaks) or None,
            "device": costs[0]["device"],
        },
    }


def row_name(result: Mapping[str, Any]) -> str:
    """How tables call a result: a control says that it is one, whatever it was named."""
    control = (result.get("made_by") or {}).get("source_control")
    return f"{result['name']} (CONTROL: {control})" if control else str(result["name"])


def results_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Markdown table of results of the same data sets: a row each, with mean, seconds and tokens per second."""
    rows = [
        [
            row_name(result),
            *(record["score"] for record in result["datasets"].values()),
            result["mean"],
            f"{result['seconds']:.1f}",
            f"{result['tokens_per_second']:.0f}",
        ]
        for result in results
    ]
    return markdown_table(["", *results[0]["datasets"], "mean", "seconds", "tokens/s"], rows)
