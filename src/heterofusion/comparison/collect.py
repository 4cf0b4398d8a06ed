"""What the runs of a comparison left becomes one record: `comparison.json`, which reports are made of."""

from collections.abc import Mapping, Sequence
from typing import Any

from heterofusion.comparison.data import check_same_data
from heterofusion.comparison.plan import Comparison, Method
from heterofusion.comparison.runs import final_folders, final_runs, making_seconds, part_folders, read_record
from heterofusion.evaluation.results import join_results
from heterofusion.evaluation.store import RESULTS_FILE
from heterofusion.provenance import library_versions
from heterofusion.report.fields import Fields
from heterofusion.sweeps import is_finished

COMPARISON_FILE = "comparison.json"


def collect(comparison: Comparison, chosen: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Join the results of all methods.

    Args:
        comparison: the comparison.
        chosen: what `choose` gave.

    Returns:
        For `comparison.json`: the rows, in order, and the gains' names. Runs that are not finished are listed as
        `missing`, and so are those whose results are of other flags than were chosen now.

    Raises:
        ValueError: a result is damaged, or of other data than the others; names the file.
    """
    rows, missing = [], []
    everything: list[Fields] = []
    wanted = final_runs(comparison, {name: each["settings"] for name, each in chosen.items()})
    finished = {run.folder for run in wanted if is_finished(run)}
    for method in comparison.methods:
        runs = {}
        for folder, seed in final_folders(comparison, method):
            places = part_folders(method, folder)
            if finished.issuperset(places):
                results = [read_record(place / "eval" / RESULTS_FILE) for place in places]
                runs[seed] = _joined(results)
                everything += results
            else:
                missing.append(method.name if seed is None else f"{method.name}, seed {seed}")
        if runs:
            rows.append(_method_row(comparison, method, runs, chosen))
    check_same_data(everything)
    return {
        "seeds": list(comparison.seeds),
        "search_budget": comparison.budget,
        "rows": rows,
        "gains": [{"name": gain.name, "row": gain.row, "over": gain.over} for gain in comparison.gains],
        "normalize_by": comparison.normalize_by,
        "missing": missing,
        "versions": library_versions(),
    }


def _joined(results: Sequence[Fields]) -> Fields:
    """The results of a row, whose parts are of different data sets."""
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
    peaks = (cost.get("peak_memory_bytes", int, 0), results.get("peak_memory_bytes", int, 0))
    return {
        "seed": seed,
        "scores": scores,
        "mean": sum(scores.values()) / len(scores),
        "examples": {name: entry.get("examples") for name, entry in datasets.items()},
        "sha256": {name: entry.get("sha256") for name, entry in datasets.items()},
        "making_seconds": making_seconds(results),
        "evaluation_seconds": float(results.number("seconds")),
        "tokens_per_second": float(results.number("tokens_per_second")),
        "peak_memory_bytes": max(peaks) or None,
        "device": results.get("device", str, None),
    }
