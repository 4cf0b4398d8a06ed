"""A comparison becomes runs: those that hyper-parameters are chosen by, and then those that are reported.

folder/search/<method>/<values>/    adapter/ and eval/ of each combination, on the validation data
folder/methods/<method>/[seed=N/]   adapter/ and eval/ of what is reported, on the test data
"""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from heterofusion.comparison.data import check_same_data
from heterofusion.comparison.plan import Comparison, Method, point_name
from heterofusion.evaluation.arguments import EvalDataArguments, GenerationArguments
from heterofusion.evaluation.store import RESULTS_FILE
from heterofusion.provenance import MERGE_FILE
from heterofusion.records import load_json, read_text
from heterofusion.report.fields import Fields
from heterofusion.sweeps import Run, Step, Template, check_step

Settings = Mapping[str, Mapping[str, Any]]  # by name of the method: chosen values of the searched flags
MERGE = "merge"  # which searches by itself, in one process
_SCORING_FLAGS = {item.name for kind in (EvalDataArguments, GenerationArguments) for item in fields(kind)}


def search_runs(comparison: Comparison) -> list[Run]:
    """The runs that hyper-parameters are chosen by.

    Raises:
        UsageError: a flag is not one of its recipe, or has a value that it cannot have.
    """
    runs = []
    for method in comparison.methods:
        if not method.search:
            continue
        for folder, point in _search_folders(comparison, method):
            flags, _ = _fill(comparison, method, method.flags, comparison.search_seed)
            adapter = folder / "adapter"
            if method.recipe == MERGE:
                grid = [f"{name}={','.join(map(str, values))}" for name, values in method.search.items()]
                data, _ = _fill(comparison, method, comparison.validation, None)
                flags = {**{name: data[name] for name in data if name in _SCORING_FLAGS}, **flags, "search": grid}
                steps = [_step(comparison, method, MERGE, {**flags, "output_dir": str(adapter)}, adapter)]
            else:
                made = {**flags, **point, "output_dir": str(adapter)}
                steps = [_step(comparison, method, str(method.recipe), made, adapter)]
                variables = {"adapter": str(adapter)}
                scored, _ = _fill(comparison, method, comparison.validation, None, variables)
                scored = {"adapters": [str(adapter)], **scored, **_base(made), "name": method.name}
                steps.append(_evaluation(comparison, method, scored, folder / "eval"))
            variables = {"search": point_name(point)} if point else {"search": "all"}
            runs.append(Run("search", method.name, variables, folder, tuple(steps)))
    return runs


def choose(comparison: Comparison) -> dict[str, dict[str, Any]]:
    """The values that did best on the validation data, by method; of equals the first.

    Returns:
        Per method with a search: `settings`, the table `tried` of settings and scores, and `seconds` of all of it,
        None if those of a run are not known.

    Raises:
        ValueError: a run of the search has not left its results, or they are of other data than those of another;
            names the file.
    """
    searched = [method for method in comparison.methods if method.search]
    check_same_data(
        read_record(folder / "eval" / RESULTS_FILE)
        for method in searched
        if method.recipe != MERGE
        for folder, _ in _search_folders(comparison, method)
    )
    return {method.name: _choose(comparison, method) for method in searched}


def _choose(comparison: Comparison, method: Method) -> dict[str, Any]:
    tried: list[dict[str, Any]] = []
    seconds: list[float | None] = []
    for folder, point in _search_folders(comparison, method):
        if method.recipe == MERGE:
            record = read_record(folder / "adapter" / MERGE_FILE)
            candidates = Fields(record.get("search", dict), record.where, "search.").get("candidates", list)
            for candidate in candidates:
                values = candidate["hyperparameters"]
                tried.append({"settings": {name: values[name] for name in method.search}, "score": candidate["mean"]})
            seconds.append(making_seconds(record))
            continue
        results = read_record(folder / "eval" / RESULTS_FILE)
        tried.append({"settings": point, "score": float(results.number("mean"))})
        seconds += [making_seconds(results), float(results.number("seconds"))]
    best = max(tried, key=lambda each: each["score"])
    known = [each for each in seconds if each is not None]
    whole = round(sum(known), 3) if len(known) == len(seconds) else None
    return {"settings": best["settings"], "tried": tried, "seconds": whole}


def making_seconds(record: Fields) -> float | None:
    """What it took to make an adapter, from a record's `made_by`.

    Returns:
        None if no record tells of it, or if the run was resumed: what it took before that is not known.
    """
    made = Fields(record.get("made_by", dict, {}), record.where, "made_by.")
    cost = Fields(made.get("cost", dict, {}), record.where, "made_by.cost.")
    seconds = cost.number("seconds", None)
    return None if seconds is None or "resumed_from_step" in cost.content else float(seconds)


def read_record(path: Path) -> Fields:
    """A JSON record of another program.

    Raises:
        ValueError: it is missing or damaged; names it.
    """
    where = f"record {path}"
    return Fields(load_json(read_text(path, where), where), where)


def _search_folders(comparison: Comparison, method: Method) -> list[tuple[Path, dict[str, Any]]]:
    folder = comparison.folder / "search" / method.slug
    if method.recipe == MERGE:
        return [(folder, {})]
    return [(folder / point_name(point), point) for point in method.points()]


def final_runs(comparison: Comparison, settings: Settings) -> list[Run]:
    """The runs that are reported.

    Args:
        comparison: the comparison.
        settings: what was chosen; an empty mapping leaves the searched flags at the first of their values, for a look
            at the flags before anything is run.

    Raises:
        UsageError: a flag is not one of its recipe, or has a value that it cannot have.
    """
    runs = []
    for method in comparison.methods:
        searched = comparison.method(method.settings_of or method.name)
        chosen = settings.get(searched.name) or next(searched.points())
        for folder, seed in final_folders(comparison, method):
            runs += _final(comparison, method, {} if not searched.search else chosen, folder, seed)
    return runs


def final_folders(comparison: Comparison, method: Method) -> list[tuple[Path, int | None]]:
    """Where the runs of a method go, with their seeds: one folder without a seed if nothing in it depends on one."""
    folder = comparison.folder / "methods" / method.slug
    _, seeded = _fill(comparison, method, method.flags, comparison.seeds[0])
    if not seeded:
        return [(folder, None)]
    return [(folder / f"seed={seed}", seed) for seed in comparison.seeds]


def part_folders(method: Method, folder: Path) -> list[Path]:
    """The evaluations that make up a row: one, or one per part."""
    return [folder / f"part-{number}" for number in range(1, len(method.parts) + 1)] or [folder]


def _final(
    comparison: Comparison, method: Method, chosen: Mapping[str, Any], folder: Path, seed: int | None
) -> list[Run]:
    variables = {} if seed is None else {"seed": str(seed)}
    steps, made, adapter = [], {}, {}
    if method.recipe is not None:
        made_folder = folder / "adapter"
        made = {**_fill(comparison, method, method.flags, seed)[0], **chosen, "output_dir": str(made_folder)}
        steps.append(_step(comparison, method, method.recipe, made, made_folder))
        adapter = {"adapter": str(made_folder)}
    runs = []
    for place, part in zip(part_folders(method, folder), method.parts or ({},), strict=True):
        wanted = {**comparison.test, **_base(made), **method.evaluation, **part}
        scored, _ = _fill(comparison, method, wanted, seed, adapter)
        labels = [f"{key}={value}" for key, value in variables.items()]
        made_flags = {"adapters": [adapter["adapter"]]} if adapter else {}
        scored = {**made_flags, **scored, "name": method.name, **({"labels": labels} if labels else {})}
        evaluation = _evaluation(comparison, method, scored, place / "eval")
        title = {**variables, **({"part": place.name} if method.parts else {})}
        runs.append(Run("compare", method.name, title, place, (*steps, evaluation)))
    return runs


def _base(made: Mapping[str, Any]) -> dict[str, Any]:
    """The base of what was made is that of its evaluation."""
    name = made.get("model_name_or_path")
    return {} if name is None else {"model_name_or_path": name}


def _fill(
    comparison: Comparison,
    method: Method,
    flags: Mapping[str, Any],
    seed: int | None,
    variables: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], bool]:
    """Flags with their variables filled in, and whether the seed was among them."""
    known: dict[str, Any] = dict(variables or {})
    if seed is not None:
        known["seed"] = seed
    template = Template(known, comparison.lists, f"{comparison.where}, method {method.name!r}")
    return template.fill(dict(flags)), "seed" in template.used


def _evaluation(comparison: Comparison, method: Method, flags: Mapping[str, Any], folder: Path) -> Step:
    return _step(comparison, method, "eval", {**flags, "output_dir": str(folder)}, folder)


def _step(comparison: Comparison, method: Method, recipe: str, flags: Mapping[str, Any], folder: Path) -> Step:
    step = Step(recipe, dict(flags), folder)
    check_step(step, f"{comparison.where}, method {method.name!r}, {recipe}")
    return step
