"""What the runs of a comparison left becomes one record: `comparison.json`, which reports are made of."""

from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from heterofusion.comparison.data import check_same_data
from heterofusion.comparison.making import finished_folders, is_outdated, runs_sources, seconds_to_make
from heterofusion.comparison.plan import Comparison, Method
from heterofusion.comparison.runs import (
    Place,
    final_places,
    final_runs,
    made_folders,
    made_runs,
    making_seconds,
    part_folders,
    read_record,
)
from heterofusion.evaluation.results import RESULTS_FILE, join_results
from heterofusion.publish.record import library_versions
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
        `missing`, and so are those whose results are of other flags than were chosen now, or of shared things that
        have other flags now or were made again.

    Raises:
        ValueError: a result is damaged, or of other data than the others; names the file.
    """
    rows, missing = [], []
    everything: list[Fields] = []
    wanted = final_runs(comparison, {name: each["settings"] for name, each in chosen.items()})
    made = made_runs(comparison)
    there = finished_folders(made)
    finished = {
        run.folder for run in wanted if there.issuperset(run.needs) and not is_outdated(run, made) and is_finished(run)
    }
    seconds = {run.folder: seconds_to_make(run) for run in made if run.folder in there}
    with_sources = {run.folder for run in made if run.folder in there and runs_sources(run)}
    for method in comparison.methods:
        searched = comparison.method(method.settings_of or method.name)
        known = not searched.search or searched.name in chosen
        results: dict[Path, Fields] = {}
        for place in final_places(comparison, method):
            folders = part_folders(method, place.folder)
            if known and finished.issuperset(folders):
                found = [read_record(folder / "eval" / RESULTS_FILE) for folder in folders]
                results[place.folder] = _joined(found)
                everything += found
            else:
                missing.append(_title(method, place))
        for case, places in _places_by_row(comparison, method):
            done = [place for place in places if place.folder in results]
            if done:
                rows.append(_method_row(comparison, method, case, done, results, seconds, with_sources, chosen))
    check_same_data(everything)
    return {
        "cases": comparison.case_names,
        "seeds": comparison.seeds,
        "search_budget": comparison.budget,
        "search_case": comparison.search_case.name if comparison.search_case is not None else None,
        "rows": rows,
        "gains": [gain.plain() for gain in comparison.gains],
        "normalize_by": comparison.normalize_by,
        "missing": missing,
        "versions": library_versions(),
    }


def _title(method: Method, place: Place) -> str:
    seed = [] if place.seed is None else [f"seed {place.seed}"]
    return ", ".join([method.name, *([] if place.case_name is None else [place.case_name]), *seed])


def _places_by_row(comparison: Comparison, method: Method) -> Iterator[tuple[str | None, list[Place]]]:
    """The rows of a method with their runs.

    One for each case; what does not depend on one has a single row without a case, or, where it belongs to some cases
    alone, the same runs as the row of each of them.
    """
    places = final_places(comparison, method)
    if method.cases or places[0].case_name is not None:
        for case in comparison.cases_of(method):
            own = [place for place in places if place.case_name == case.name]
            shared = [place for place in places if place.case_name is None and place.seed in (None, *case.seeds)]
            yield case.name, own or shared
    else:
        yield None, places


def _joined(results: Sequence[Fields]) -> Fields:
    """The results of a row, whose parts are of different data sets."""
    if len(results) == 1:
        return results[0]
    return Fields(join_results([each.content for each in results]), results[0].where)


def _method_row(
    comparison: Comparison,
    method: Method,
    case: str | None,
    places: Sequence[Place],
    results: Mapping[Path, Fields],
    seconds: Mapping[Path, float | None],
    with_sources: Set[Path],
    chosen: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    settings = chosen.get(method.settings_of or method.name)
    made = [each for each in comparison.made if each.name in places[0].made]
    row = comparison_row(
        method.name,
        {place.seed: results[place.folder] for place in places},
        group=method.group,
        about=method.about,
        case=case,
        made=[each.name for each in made],
        made_seconds={place.seed: _made_seconds(comparison, place, seconds) for place in places},
    )
    shared = {folder for p in places for folder in made_folders(comparison, p.made, p.case, p.seed)}
    row["ran_source_models"] |= not shared.isdisjoint(with_sources)
    row["settings"] = dict(settings["settings"]) if settings else None
    row["settings_of"] = method.settings_of if settings else None
    if settings and method.name in chosen:
        row["search"] = {"runs": len(settings["tried"]), "seconds": settings["seconds"], "tried": settings["tried"]}
    return row


def _made_seconds(comparison: Comparison, place: Place, seconds: Mapping[Path, float | None]) -> float | None:
    """What the shared things of a run took together; None if there are none, or those of one are not known."""
    found = [seconds[folder] for folder in made_folders(comparison, place.made, place.case, place.seed)]
    known = [each for each in found if each is not None]
    return round(sum(known), 3) if known and len(known) == len(found) else None


def comparison_row(
    name: str,
    runs: Mapping[int | None, Fields],
    group: str = "",
    about: str = "",
    case: str | None = None,
    made: Sequence[str] = (),
    made_seconds: Mapping[int | None, float | None] | None = None,
) -> dict[str, Any]:
    """The row of a method.

    Args:
        name: of the row.
        runs: contents of `results.json` by seed; one with the key None does not depend on a seed.
        group: heading of the rows that it stands among.
        about: what it is, in a sentence.
        case: name of the case that it is of; None if it is of all, or there are none.
        made: names of the shared things that it uses.
        made_seconds: what these took, by seed.

    Raises:
        ValueError: a field is missing or of another type; names file and field.
    """
    first = next(iter(runs.values()))
    made_by = first.get("made_by", dict, {})
    models = first.get("models_at_inference", int)
    return {
        "name": name,
        "case": case,
        "group": group,
        "about": about,
        "settings": None,
        "settings_of": None,
        "search": None,
        "models_at_inference": models,
        "needs_task_id": first.get("needs_task_id", bool),
        "ran_source_models": bool(made_by.get("ran_source_models")) or models > 1,
        "source_control": made_by.get("source_control"),
        "made": list(made),
        "runs": [_run(seed, results, (made_seconds or {}).get(seed)) for seed, results in runs.items()],
    }


def _run(seed: int | None, results: Fields, made_seconds: float | None) -> dict[str, Any]:
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
        "made_seconds": made_seconds,
        "evaluation_seconds": float(results.number("seconds")),
        "tokens_per_second": float(results.number("tokens_per_second")),
        "peak_memory_bytes": max(peaks) or None,
        "device": results.get("device", str, None),
    }
