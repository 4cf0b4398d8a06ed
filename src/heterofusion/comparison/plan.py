"""What is compared: the sections of a comparison file, checked.

validation: {...}        # flags of recipes/eval.py on the data that hyper-parameters are chosen by
test: {...}              # flags of recipes/eval.py on the data that is reported
lists: {tasks: [a, b]}   # for `for_each`, see `heterofusion.sweeps.Template`
cases:                   # conditions of a table each; what is not name or seeds is a variable in flags
  - {name: 'N=0', seeds: [0, 1], replay: []}
  - {name: 'N=30', replay: [{for_each: tasks, value: 'replay/{item}.jsonl'}]}
search_case: 'N=30'      # where hyper-parameters are chosen, for all cases
made:                    # made before the searches, for all methods whose flags have {labels} in them
  labels: {recipe: label, flags: {...}}
methods:                 # a row each
  - name: direct tuning of B
    group: any base      # heading of the rows
    recipe: expert       # train, expert, merge or distill; without one, something that is there is evaluated
    flags: {...}         # of the recipe; {seed} in them makes it one run per seed
    search: {learning_rate: [0.001, 0.003]}
    eval: {...}          # flags in place of those of `test`; {adapter} is what the recipe made
    cases: ['N=30']      # run in these alone
  - name: noise sources
    like: HeteroFusion   # recipe, flags and the chosen hyper-parameters of another method, some flags replaced
    flags: {source_control: noise}
  - name: source experts
    parts: [{...}, {...}]   # evaluations of different data sets, joined to one row
gains:
  - {name: source_gain, row: HeteroFusion, over: noise sources}   # see `Gain`
normalize_by: target experts
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from heterofusion.comparison.cases import Case, Made, find_needs, find_search_case, plan_cases, plan_made
from heterofusion.comparison.entries import Needs, mapping, names_of, slug
from heterofusion.comparison.gains import Gain, plan_gains
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.flags import as_text
from heterofusion.sweeps import MAKERS, with_config

SECTIONS = ("validation", "test", "lists", "cases", "search_case", "made", "methods", "gains", "normalize_by")
_NOT_SEARCHED = ("seed", "dataset_seed", "output_dir")
_METHOD_KEYS = {"name", "group", "about", "recipe", "like", "flags", "search", "eval", "parts", "cases"}


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        name: of the row.
        group: heading of the rows that it stands among.
        about: what it is, in a sentence.
        recipe: the recipe that makes the adapter; None if there is nothing to make.
        flags: its flags, with variables.
        search: values of the flags that are searched.
        settings_of: name of the method whose chosen values it takes.
        evaluation: flags of recipes/eval.py over those of the section `test`.
        parts: evaluations that make up the row together.
        cases: names of the cases that it is run in; empty for all.
    """

    name: str
    group: str
    about: str
    recipe: str | None
    flags: Mapping[str, Any]
    search: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    settings_of: str | None = None
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    parts: Sequence[Mapping[str, Any]] = ()
    cases: Sequence[str] = ()

    @property
    def slug(self) -> str:
        """Its name as that of a folder."""
        return slug(self.name)

    def points(self) -> Iterator[dict[str, Any]]:
        """The combinations of values that are searched; one empty one without a search."""
        for values in itertools.product(*self.search.values()):
            yield dict(zip(self.search, values, strict=True))


@dataclass(frozen=True)
class Comparison:
    """A comparison file.

    Attributes:
        folder: where everything goes.
        cases: the conditions that methods are compared under, with the seeds of the runs that are reported.
        search_case: the case that hyper-parameters are chosen in; None where no search depends on one.
        search_seed: of the runs that hyper-parameters are chosen by.
        budget: validation runs that every method with hyper-parameters gets.
        lists: the named lists.
        validation: flags of recipes/eval.py.
        test: flags of recipes/eval.py.
        made: what methods share, each after what it is made of.
        methods: in order of the rows.
        gains: differences to report.
        normalize_by: name of the method that is 1 in normalized scores; None for no such column.
        where: names the file in messages.
    """

    folder: Path
    cases: Sequence[Case]
    search_case: Case | None
    search_seed: int
    budget: int
    lists: Mapping[str, Sequence[Any]]
    validation: Mapping[str, Any]
    test: Mapping[str, Any]
    made: Sequence[Made]
    methods: Sequence[Method]
    gains: Sequence[Gain]
    normalize_by: str | None
    where: str

    def method(self, name: str) -> Method:
        """The method of a name."""
        return next(method for method in self.methods if method.name == name)

    @property
    def case_names(self) -> list[str]:
        """Names of the cases; empty where there are none."""
        return [case.name for case in self.cases if case.name is not None]

    @property
    def seeds(self) -> list[int]:
        """Seeds of all runs that are reported."""
        return list(dict.fromkeys(seed for case in self.cases for seed in case.seeds))

    def cases_of(self, method: Method) -> list[Case]:
        """The cases that a method is run in."""
        return [case for case in self.cases if not method.cases or case.name in method.cases]

    def place(self, method: Method, case: Case) -> str:
        """A method in messages."""
        return f"{self.where}, method {method.name!r}" + ("" if case.name is None else f", case {case.name!r}")

    def needs(self, method: Method, case: Case) -> Needs:
        """What the reported runs of a method depend on in a case."""
        scored = {**self.test, **method.evaluation}
        flags = [dict(method.flags), *({**scored, **part} for part in method.parts or ({},))]
        place = self.place(method, case)
        return find_needs(flags, case, self.made, self.lists, place, adapter=method.recipe is not None)

    def search_needs(self, method: Method, case: Case) -> Needs:
        """What the search of a method depends on in a case."""
        flags = [dict(method.flags), dict(self.validation)]
        return find_needs(flags, case, self.made, self.lists, self.place(method, case), adapter=True)


def plan_comparison(
    sections: Mapping[str, Any],
    file: Path,
    folder: Path,
    seeds: Sequence[int],
    search_seed: int,
    budget: int,
    only: Sequence[str] = (),
) -> Comparison:
    """Check the sections of a comparison file.

    Args:
        sections: what it holds beside flags, by the names in `SECTIONS`.
        file: the file, for messages, and because `config:` in it is relative to its folder.
        folder: where everything goes.
        seeds: of the runs that are reported, in cases that name none.
        search_seed: of the runs that hyper-parameters are chosen by.
        budget: validation runs that a search must have.
        only: names of the methods that are compared; all by default.

    Raises:
        UserError: something in it is not as it has to be; names it.
    """
    where = f"--config: {file}"
    for name in ("test", "methods"):
        if not sections.get(name):
            raise UserError(f"{where} has no section {name}; a comparison needs one")
    lists = sections.get("lists") or {}
    if not isinstance(lists, dict) or not all(isinstance(items, list) for items in lists.values()):
        raise UserError(f"{where}: lists must be a mapping of names to lists")
    validation, test = (
        with_config(mapping(sections.get(name), f"{where}, {name}"), file.parent, f"{where}, {name}")
        for name in ("validation", "test")
    )
    for name, flags in (("validation", validation), ("test", test)):
        if taken := [flag for flag in ("adapters", "output_dir", "name", "labels") if flag in flags]:
            raise UserError(f"{where}, {name}: {taken[0]} is set for each row; leave it out")
    cases = plan_cases(sections.get("cases"), seeds, search_seed, where)
    case_names = [case.name for case in cases if case.name is not None]
    search_case = find_search_case(sections.get("search_case"), cases, where)
    made = plan_made(sections.get("made"), cases, lists, file.parent, where)
    methods: list[Method] = []
    entries = sections["methods"]
    if not isinstance(entries, list):
        raise UserError(f"{where}: methods must be a list of mappings, each with a name")
    for entry in entries:
        methods.append(_method(entry, methods, case_names, file.parent, where, budget))
    names = [method.slug for method in methods]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise UserError(f"{where}: two methods are called {methods[index].name!r}; give each its own name")
    if not validation and any(method.search for method in methods):
        raise UserError(f"{where} has methods with a search but no section validation to choose by")
    unknown = [name for name in only if name not in {method.name for method in methods}]
    if unknown:
        there = ", ".join(method.name for method in methods)
        raise UserError(f"--only {unknown[0]!r} is no method of {file}; there is {there}")
    known = {method.name: method.cases or case_names for method in methods}
    gains = plan_gains(sections.get("gains"), known, case_names, where)
    normalize_by = sections.get("normalize_by")
    if normalize_by is not None and (not isinstance(normalize_by, str) or normalize_by not in known):
        raise UserError(f"{where}: normalize_by is {normalize_by!r}, which is no method of it")
    if only:
        methods = [method for method in methods if method.name in only]
        for method in methods:
            if method.settings_of is not None and method.settings_of not in only:
                raise UserError(
                    f"--only {method.name!r} takes its hyper-parameters of {method.settings_of!r}: name both"
                )
        gains = tuple(gain for gain in gains if gain.methods <= set(only))
        normalize_by = normalize_by if normalize_by in only else None
    comparison = Comparison(
        folder, cases, search_case, search_seed, budget, lists, validation, test, made, tuple(methods), gains,
        normalize_by, where,
    )  # fmt: skip
    _check_search_case(comparison)
    return comparison


def _check_search_case(comparison: Comparison) -> None:
    if comparison.search_case is not None:
        return
    for method in comparison.methods:
        if method.search and any(comparison.search_needs(method, case).case for case in comparison.cases):
            raise UserError(
                f"{comparison.where}: search_case is missing: the search of {method.name!r} depends on a variable of "
                f"the cases; name the one to search in, of {', '.join(comparison.case_names)}"
            )


def _method(
    entry: Any, before: Sequence[Method], cases: Sequence[str], folder: Path, where: str, budget: int
) -> Method:
    if not isinstance(entry, dict) or not entry.get("name"):
        raise UserError(f"{where}: methods must be a list of mappings, each with a name; found {entry!r}")
    name = str(entry["name"])
    place = f"{where}, method {name!r}"
    unknown = [str(key) for key in entry if key not in _METHOD_KEYS]
    if unknown:
        raise UserError(f"{place} has unknown keys: {', '.join(unknown)}; known are {', '.join(sorted(_METHOD_KEYS))}")
    flags = with_config(mapping(entry.get("flags"), f"{place}, flags"), folder, f"{place}, flags")
    if flags.get("search"):
        raise UserError(f"{place}: flags has search; write it beside flags, where its budget is that of all")
    evaluation = with_config(mapping(entry.get("eval"), f"{place}, eval"), folder, f"{place}, eval")
    search = _search(entry.get("search"), place, budget)
    own_cases = names_of(entry.get("cases"), cases, "case", f"{place}: cases")
    recipe, settings_of = entry.get("recipe"), None
    inherited: list[dict[str, Any]] = []
    if "like" in entry:
        model = next((method for method in before if method.name == entry["like"]), None)
        if model is None or recipe is not None or search:
            raise UserError(
                f"{place}: like must name a method above it, and recipe and search then come from there; it is "
                f"{entry['like']!r}"
            )
        settings_of = model.settings_of or model.name
        searched = next(method.search for method in before if method.name == settings_of)
        if own := [flag for flag in flags if flag in searched]:
            raise UserError(f"{place} sets {own[0]}, which is searched in {settings_of!r} and comes from there")
        recipe, flags, evaluation = model.recipe, {**model.flags, **flags}, {**model.evaluation, **evaluation}
        own_cases = own_cases or tuple(model.cases)
        inherited = [dict(part) for part in model.parts]
    if recipe is not None and recipe not in MAKERS:
        raise UserError(f"{place}: recipe is {recipe!r}; it can be {', '.join(MAKERS)}, or left out")
    if recipe is None and (flags or search):
        raise UserError(f"{place} has flags or a search but no recipe that they are of")
    parts = entry.get("parts") or inherited
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise UserError(f"{place}: parts must be a list of mappings of flags of recipes/eval.py")
    if parts and recipe is not None:
        raise UserError(f"{place} has parts and a recipe; parts are of what is there already")
    return Method(
        name, str(entry.get("group") or ""), str(entry.get("about") or ""), recipe, flags, search, settings_of,
        evaluation, tuple(with_config(part, folder, f"{place}, parts") for part in parts), own_cases,
    )  # fmt: skip


def _search(search: Any, place: str, budget: int) -> dict[str, list[Any]]:
    values = mapping(search, f"{place}, search")
    for flag in _NOT_SEARCHED:
        if flag in values:
            raise UserError(f"{place}: {flag} is no hyper-parameter: runs of other seeds would be the same")
    if not all(isinstance(items, list) and items for items in values.values()):
        raise UserError(f"{place}: search must map flags to lists of values")
    for flag, items in values.items():
        if len(set(map(as_text, items))) < len(items):
            raise UserError(f"{place}: its search has a value of {flag} twice: {items}")
    count = math.prod(map(len, values.values()))
    if values and count != budget:
        raise UserError(
            f"{place}: its search has {count} combinations, but every method gets --search_budget {budget} validation "
            "runs: give it as many"
        )
    return values
