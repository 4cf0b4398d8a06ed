"""What the runs of a comparison left becomes one record: `comparison.json`, which reports are made of."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from heterofusion.comparison.plan import Comparison, Method
from heterofusion.comparison.runs import final_folders, part_folders, read_record
from heterofusion.evaluation.results import join_results
from heterofusion.evaluation.store import RESULTS_FILE
from heterofusion.provenance import library_versions
from heterofusion.report.fields import Fields

logger = logging.getLogger(__name__)

COMPARISON_FILE = "comparison.json"


def collect(comparison: Comparison, chosen: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Join the results of all methods.

    Args:
        comparison: the comparison.
        chosen: what `choose` gave.

    Returns:
        For `comparison.json`: the rows, in order, and the gains' names. Methods whose runs are not all there are
        listed as `missing`.

    Raises:
        ValueError: a result is damaged, or of other data than the others; names the file.
    """
    rows, missing = [], []
    for method in comparison.methods:
        runs = {}
        for folder, seed in final_folders(comparison, method):
            files = [place / "eval" / RESULTS_FILE for place in part_folders(method, folder)]
            if all(file.is_file() for file in files):
                runs[seed] = _joined(files)
            else:
                missing.append(method.name if seed is None else f"{method.name}, seed {seed}")
        if runs:
            rows.append(_method_row(comparison, method, runs, chosen))
    return {
        "seeds": list(comparison.seeds),
        "search_budget": comparison.budget,
        "rows": rows,
        "gains": [{"name": gain.name, "row": gain.row, "over": gain.over} for gain in comparison.gains],
        "normalize_by": comparison.normalize_by,
        "missing": missing,
        "versions": library_versions(),
    }


def _joined(files: Sequence[Path]) -> Fields:
    results = [read_record(file) for file in files]
    if len(results) == 1:
        return results[0]
    return Fields(join_results([each.content for each in results]), results[0].where)


def _method_row(
    comparison: Comparison, method: Method, runs: Mapping[int | None, Fields], chosen: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    settings = chosen.get(method.settings_of or method.name)
    row = comparison_row(method.name, runs, group=method.group, about=method.about)
    row["settings"] = dict(settings["settings"]) if settings else None
    row["settings_of"] = method.settings_of if settings else None
    if settings and method.name in chosen:
        row["search"] = {"runs": len(settings["tried"]), "seconds": settings["seconds"], "tried": settings["tried"]}
    return row


def comparison_row(name: str, runs: Mapping[int | None, Fields], group: str = "", about: str = "") -> dict[str, Any]:
    """The row of a method.

    Args:
        name: of the row.
        runs: contents of `results.json` by seed; one with the key None does not depend on a seed.
        group: heading of the rows that it stands among.
        about: what it is, in a sentence.

    Raises:
        ValueError: a field is missing or of another type; names file and field.
    """
    first = next(iter(runs.values()))
    made = first.get("made_by", dict, {})
    models = first.get("models_at_inference", int)
    return {
        "name": name,
        "group": group,
        "about": about,
        "settings": None,
        "settings_of": None,
        "search": None,
        "models_at_inference": models,
        "needs_task_id": first.get("needs_task_id", bool),
        "ran_source_models": bool(made.get("ran_source_models")) or models > 1,
        "source_control": made.get("source_control"),
        "runs": [_run(seed, results) for seed, results in runs.items()],
    }


def _run(seed: int | None, results: Fields) -> dict[str, Any]:
    made = Fields(results.get("made_by", dict, {}), results.where, "made_by.")
    cost = Fields(made.get("cost", dict, {}), results.where, "made_by.cost.")
    datasets = results.get("datasets", dict)
    scores = {
        name: float(Fields(entry, results.where, f"datasets.{name}.").number("score"))
        for name, entry in datasets.items()
    }
    peaks = (cost.get("peak_memory_bytes", int, 0), results.get("peak_memory_bytes", int))
    return {
        "seed": seed,
        "scores": scores,
        "mean": sum(scores.values()) / len(scores),
        "examples": {name: entry.get("examples") for name, entry in datasets.items()},
        "sha256": {name: entry.get("sha256") for name, entry in datasets.items()},
        "making_seconds": cost.number("seconds", None),
        "evaluation_seconds": float(results.number("seconds")),
        "tokens_per_second": float(results.number("tokens_per_second")),
        "peak_memory_bytes": max(peaks),
        "device": results.get("device", str, None),
    }
