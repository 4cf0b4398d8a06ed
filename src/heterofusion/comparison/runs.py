"""A comparison becomes runs: what methods share, the searches for hyper-parameters, and then what is reported.

folder/made/<name>/[<case>/][seed=N/]       labels/ or adapter/ of what methods share
folder/search/<method>/<values>/            adapter/ and eval/ of each combination, on the validation data
folder/methods/<method>/[<case>/][seed=N/]  adapter/ and eval/ of what is reported, on the test data
"""

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from heterofusion.comparison.cases import Case, fill_flags
from heterofusion.comparison.data import check_same_data
from heterofusion.comparison.entries import point_name
from heterofusion.comparison.plan import Comparison, Method
from heterofusion.data.files import load_json, read_text
from heterofusion.evaluation.datasets import EvalDataArguments
from heterofusion.evaluation.results import RESULTS_FILE
from heterofusion.experts.generation import GenerationArguments
from heterofusion.publish.record import MERGE_FILE
from heterofusion.report.fields import Fields
from heterofusion.sweeps import Run, Step, check_step

Settings = Mapping[str, Mapping[str, Any]]  # by name of the method: chosen values of the searched flags
MERGE = "merge"  # which searches by itself, in one process
_SCORING_FLAGS = {item.name for kind in (EvalDataArguments, GenerationArguments) for item in fields(kind)}


@dataclass(frozen=True)
class ComparisonRun(Run):
    """A run of a comparison.

    Attributes:
        needs: folders of the runs that make what it uses, and what that is made of.
    """

    needs: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Place:
    """Where runs of a method go that are reported together.

    Attributes:
        case: the case whose variables they have.
        case_name: its name; None if nothing in them depends on one.
        seed: their seed; None if nothing in them depends on one.
        folder: the folder.
        made: names of the shared things that they use.
    """

    case: Case
    case_name: str | None
    seed: int | None
    folder: Path
    made: tuple[str, ...]


def made_runs(comparison: Comparison) -> list[ComparisonRun]:
    """The runs that make what methods share, each after those that it needs; only what is used is made.

    Raises:
        UserError: a flag is not one of its recipe, or has a value that it cannot have.
    """
    wanted: list[tuple[Case, int | None, tuple[str, ...]]] = []
    for method in comparison.methods:
        if method.search:
            case = _search_case(comparison)
            wanted.append((case, comparison.search_seed, comparison.search_needs(method, case).made))
        wanted += [(place.case, place.seed, place.made) for place in final_places(comparison, method)]
    runs: dict[Path, ComparisonRun] = {}
    for each in comparison.made:
        for case, seed, names in wanted:
            folder = each.folder(comparison.folder, case, seed) if each.name in names else None
            if folder is None or folder in runs:
                continue
            needs = each.needs[case.name]
            variables = _run_variables(case.name if each.by_case else None, seed if needs.seed else None)
            place = f"{comparison.where}, made {each.name!r}" + "".join(f", {k}={v}" for k, v in variables.items())
            output = each.output(comparison.folder, case, seed)
            flags = fill_flags(each.flags, _variables(comparison, case, seed), comparison.lists, place)
            step = Step(each.recipe, {**flags, "output_dir": str(output)}, output)
            check_step(step, f"{place}, {each.recipe}")
            needed = made_folders(comparison, needs.made, case, seed)
            runs[folder] = ComparisonRun("made", each.name, variables, folder, (step,), needed)
    return list(runs.values())


def made_folders(comparison: Comparison, names: Container[str], case: Case, seed: int | None) -> tuple[Path, ...]:
    """Folders of the runs that make what is used in a case with a seed."""
    return tuple(each.folder(comparison.folder, case, seed) for each in comparison.made if each.name in names)


def search_runs(comparison: Comparison) -> list[ComparisonRun]:
    """The runs that hyper-parameters are chosen by.

    Raises:
        UserError: a flag is not one of its recipe, or has a value that it cannot have.
    """
    runs = []
    case, seed = _search_case(comparison), comparison.search_seed
    for method in comparison.methods:
        if not method.search:
            continue
        needs = made_folders(comparison, comparison.search_needs(method, case).made, case, seed)
        for folder, point in _search_folders(comparison, method):
            flags = _fill(comparison, method, method.flags, case, seed)
            adapter = folder / "adapter"
            if method.recipe == MERGE:
                grid = [f"{name}={','.join(map(str, values))}" for name, values in method.search.items()]
                data = _fill(comparison, method, comparison.validation, case, seed)
                flags = {**{name: data[name] for name in data if name in _SCORING_FLAGS}, **flags, "search": grid}
                steps = [_step(comparison, method, case, MERGE, {**flags, "output_dir": str(adapter)}, adapter)]
            else:
                made = {**flags, **point, "output_dir": str(adapter)}
                steps = [_step(comparison, method, case, str(method.recipe), made, adapter)]
                scored = _fill(comparison, method, comparison.validation, case, seed, {"adapter": str(adapter)})
                scored = {"adapters": [str(adapter)], **scored, **_base(made), "name": method.name}
                steps.append(_evaluation(comparison, method, case, scored, folder / "eval"))
            variables = {"search": point_name(point)} if point else {"search": "all"}
            runs.append(ComparisonRun("search", method.name, variables, folder, tuple(steps), needs))
    return runs


def _search_case(comparison: Comparison) -> Case:
    return comparison.search_case or comparison.cases[0]  # without a search_case no search depends on one


def choose(comparison: Comparison, without: Container[str] = ()) -> dict[str, dict[str, Any]]:
    """The values that did best on the validation data, by method; of equals the first.

    Args:
        comparison: the comparison.
        without: names of methods whose searches could not be run.

    Returns:
        Per method with a search: `settings`, the table `tried` of settings and scores, and `seconds` of all of it,
        None if those of a run are not known.

    Raises:
        ValueError: a run of the search has not left its results, or they are of other data than those of another;
            names the file.
    """
    searched = [method for method in comparison.methods if method.search and method.name not in without]
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


def final_runs(comparison: Comparison, settings: Settings) -> list[ComparisonRun]:
    """The runs that are reported.

    Args:
        comparison: the comparison.
        settings: what was chosen; a method that is not among them has the first value of each flag that is searched,
            for a look at the flags before anything is run.

    Raises:
        UserError: a flag is not one of its recipe, or has a value that it cannot have.
    """
    runs: list[ComparisonRun] = []
    for method in comparison.methods:
        searched = comparison.method(method.settings_of or method.name)
        chosen = settings.get(searched.name) or next(searched.points())
        for place in final_places(comparison, method):
            runs += _final(comparison, method, {} if not searched.search else chosen, place)
    return runs


def final_places(comparison: Comparison, method: Method) -> list[Place]:
    """Where the runs of a method go: one for each case and seed, as far as anything in it depends on them."""
    cases = comparison.cases_of(method)
    needs = [comparison.needs(method, case) for case in cases]
    folder = comparison.folder / "methods" / method.slug
    if any(each.case for each in needs):
        return [
            place
            for case, found in zip(cases, needs, strict=True)
            for place in _places(
                case, case.name, case.seeds if found.seed else (), folder.joinpath(*case.parts), found.made
            )
        ]
    seeds = dict.fromkeys(seed for case in cases for seed in case.seeds)
    return _places(cases[0], None, seeds if needs[0].seed else (), folder, needs[0].made)


def _places(case: Case, name: str | None, seeds: Iterable[int], folder: Path, made: tuple[str, ...]) -> list[Place]:
    """One for each seed; one without a seed if there are none."""
    seeded = [Place(case, name, seed, folder / f"seed={seed}", made) for seed in seeds]
    return seeded or [Place(case, name, None, folder, made)]


def part_folders(method: Method, folder: Path) -> list[Path]:
    """The evaluations that make up a row: one, or one per part."""
    return [folder / f"part-{number}" for number in range(1, len(method.parts) + 1)] or [folder]


def _final(comparison: Comparison, method: Method, chosen: Mapping[str, Any], at: Place) -> Iterator[ComparisonRun]:
    variables = _run_variables(at.case_name, at.seed)
    steps, made, adapter = [], {}, {}
    if method.recipe is not None:
        made_folder = at.folder / "adapter"
        flags = _fill(comparison, method, method.flags, at.case, at.seed)
        made = {**flags, **chosen, "output_dir": str(made_folder)}
        steps.append(_step(comparison, method, at.case, method.recipe, made, made_folder))
        adapter = {"adapter": str(made_folder)}
    labels = [f"{key}={value}" for key, value in variables.items()]
    needs = made_folders(comparison, at.made, at.case, at.seed)
    for folder, part in zip(part_folders(method, at.folder), method.parts or ({},), strict=True):
        wanted = {**comparison.test, **_base(made), **method.evaluation, **part}
        scored = _fill(comparison, method, wanted, at.case, at.seed, adapter)
        made_flags = {"adapters": [adapter["adapter"]]} if adapter else {}
        scored = {**made_flags, **scored, "name": method.name, **({"labels": labels} if labels else {})}
        evaluation = _evaluation(comparison, method, at.case, scored, folder / "eval")
        title = {**variables, **({"part": folder.name} if method.parts else {})}
        yield ComparisonRun("compare", method.name, title, folder, (*steps, evaluation), needs)


def _run_variables(case: str | None, seed: int | None) -> dict[str, str]:
    """Case and seed of a run, as far as it has them."""
    return {**({} if case is None else {"case": case}), **({} if seed is None else {"seed": str(seed)})}


def _base(made: Mapping[str, Any]) -> dict[str, Any]:
    """The base of what was made is that of its evaluation."""
    name = made.get("model_name_or_path")
    return {} if name is None else {"model_name_or_path": name}


def _variables(comparison: Comparison, case: Case, seed: int | None) -> dict[str, Any]:
    """What flags can have in a case, with a seed or without one."""
    made = {
        each.name: str(each.output(comparison.folder, case, seed))
        for each in comparison.made
        if seed is not None or not each.needs[case.name].seed
    }
    return {**case.variables, **made, **({} if seed is None else {"seed": seed})}


def _fill(
    comparison: Comparison,
    method: Method,
    flags: Mapping[str, Any],
    case: Case,
    seed: int | None,
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Flags of a method with their variables filled in."""
    variables = {**_variables(comparison, case, seed), **(more or {})}
    return fill_flags(flags, variables, comparison.lists, comparison.place(method, case))


def _evaluation(comparison: Comparison, method: Method, case: Case, flags: Mapping[str, Any], folder: Path) -> Step:
    return _step(comparison, method, case, "eval", {**flags, "output_dir": str(folder)}, folder)


def _step(
    comparison: Comparison, method: Method, case: Case, recipe: str, flags: Mapping[str, Any], folder: Path
) -> Step:
    step = Step(recipe, dict(flags), folder)
    check_step(step, f"{comparison.place(method, case)}, {recipe}")
    return step
