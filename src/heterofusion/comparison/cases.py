"""Cases of a comparison (such as amounts of replay), and things that several of its methods share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from heterofusion.comparison.entries import Needs, check_parts_of_texts, check_variable, mapping, names_of, slug
from heterofusion.runtime.errors import UserError
from heterofusion.sweeps import MAKERS, Template, with_config

LABEL = "label"
SHARED_RECIPES = (LABEL, *MAKERS)  # recipes of what methods share
_MADE_KEYS = {"recipe", "flags"}


@dataclass(frozen=True)
class Case:
    """Conditions under which the methods are compared.

    Attributes:
        name: of the case; None where a file has none, and everything is compared once.
        seeds: of the runs that are reported.
        variables: what flags have in it, by name.
    """

    name: str | None
    seeds: Sequence[int]
    variables: Mapping[str, Any] = field(default_factory=dict)

    @property
    def parts(self) -> tuple[str, ...]:
        """Its name as that of a folder, if it has one."""
        return () if self.name is None else (slug(self.name),)


@dataclass(frozen=True)
class Made:
    """Something that is made before the searches, once for all methods that name it in their flags.

    Attributes:
        name: the variable that stands for its folder.
        recipe: one of `SHARED_RECIPES`.
        flags: its flags, with variables.
        needs: what these depend on, by name of the case.
    """

    name: str
    recipe: str
    flags: Mapping[str, Any]
    needs: Mapping[str | None, Needs]

    @property
    def by_case(self) -> bool:
        """Whether every case has its own."""
        return any(needs.case for needs in self.needs.values())

    def folder(self, folder: Path, case: Case, seed: int | None) -> Path:
        """Folder of its run.

        Args:
            folder: of the comparison.
            case: the case that it is made for.
            seed: the seed that it is made for; None only if it does not depend on one.
        """
        seeded = (f"seed={seed}",) if self.needs[case.name].seed else ()
        return folder.joinpath("made", self.name, *(case.parts if self.by_case else ()), *seeded)

    def output(self, folder: Path, case: Case, seed: int | None) -> Path:
        """Its output_dir, which `{name}` stands for; see `folder`."""
        return self.folder(folder, case, seed) / ("labels" if self.recipe == LABEL else "adapter")


def plan_cases(entries: Any, seeds: Sequence[int], search_seed: int, where: str) -> tuple[Case, ...]:
    """Check the section `cases`.

    Args:
        entries: the section; None gives one case without a name.
        seeds: of the cases that name none.
        search_seed: no case may have it.
        where: names the file in messages.

    Raises:
        UserError: something in it is not as it has to be; names it.
    """
    if entries is None:
        return (Case(None, tuple(seeds)),)
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{where}: cases must be a list of mappings, each with a name; leave it out to have none")
    cases: list[Case] = []
    for entry in entries:
        if not isinstance(entry, dict) or entry.get("name") in (None, ""):
            raise UserError(f"{where}: cases must be a list of mappings, each with a name; found {entry!r}")
        variables = {str(key): value for key, value in entry.items()}
        name = str(variables.pop("name"))
        place = f"{where}, case {name!r}"
        own = _seeds(variables.pop("seeds", None), seeds, search_seed, place)
        for variable in variables:
            check_variable(variable, place)
        for other in cases:
            if slug(str(other.name)) == slug(name):
                raise UserError(f"{where}: two cases are called {name!r}; give each its own name")
            lacking = sorted(set(other.variables) ^ set(variables))
            if lacking:
                raise UserError(
                    f"{place}: {lacking[0]} is a variable of only one of it and {other.name!r}; give it in every "
                    "case (null leaves the flag out)"
                )
        cases.append(Case(name, own, variables))
    return tuple(cases)


def _seeds(value: Any, default: Sequence[int], search_seed: int, place: str) -> tuple[int, ...]:
    if value is None:
        return tuple(default)
    if not isinstance(value, list) or not value or not all(type(seed) is int for seed in value):
        raise UserError(f"{place}: seeds is {value!r}; give a list of one or more integers")
    if len(set(value)) < len(value):
        raise UserError(f"{place}: seeds is {value}; they must all be different")
    if search_seed in value:
        raise UserError(
            f"{place}: --search_seed {search_seed} is one of its seeds {value}: hyper-parameters would be chosen by a "
            "run that is in the table; give another"
        )
    return tuple(value)


def find_search_case(name: Any, cases: Sequence[Case], where: str) -> Case | None:
    """The case in which hyper-parameters are searched; None if the file names none.

    Raises:
        UserError: it is none of the cases.
    """
    if name is None:
        return None
    known = [case.name for case in cases if case.name is not None]
    (found,) = names_of([name], known, "case", f"{where}: search_case")
    return next(case for case in cases if case.name == found)


def plan_made(
    entries: Any, cases: Sequence[Case], lists: Mapping[str, Sequence[Any]], folder: Path, where: str
) -> tuple[Made, ...]:
    """Check the section `made`.

    Args:
        entries: the section.
        cases: the cases, whose variables its flags may have.
        lists: the named lists.
        folder: `config:` in flags is relative to it.
        where: names the file in messages.

    Raises:
        UserError: something in it is not as it has to be; names it.
    """
    made: list[Made] = []
    for name, entry in mapping(entries, f"{where}, made").items():
        place = f"{where}, made {name!r}"
        check_variable(name, place)
        if name in cases[0].variables:
            raise UserError(f"{place} has the name of a variable of the cases; give it another")
        if not isinstance(entry, dict) or not set(entry) <= _MADE_KEYS or "recipe" not in entry:
            raise UserError(f"{place} must be a mapping of recipe and flags; found {entry!r}")
        if entry["recipe"] not in SHARED_RECIPES:
            raise UserError(f"{place}: recipe is {entry['recipe']!r}; it can be {', '.join(SHARED_RECIPES)}")
        flags = with_config(mapping(entry.get("flags"), f"{place}, flags"), folder, f"{place}, flags")
        needs = {case.name: find_needs(flags, case, made, lists, place) for case in cases}
        made.append(Made(name, entry["recipe"], flags, needs))
    return tuple(made)


def find_needs(
    flags: Any, case: Case, made: Sequence[Made], lists: Mapping[str, Sequence[Any]], where: str, adapter: bool = False
) -> Needs:
    """What flags depend on in a case.

    Args:
        flags: mappings and lists of such, with variables.
        case: the case.
        made: the shared things that they may name.
        lists: the named lists.
        where: names them in messages.
        adapter: whether `{adapter}` may stand in them.

    Raises:
        UserError: a variable or a list is not there.
    """
    things = {each.name: each for each in made}
    variables = {**dict.fromkeys(things, ""), **case.variables, "seed": 0, **({"adapter": ""} if adapter else {})}
    template = Template(variables, lists, where)
    template.fill(flags)
    used = [each for name, each in things.items() if name in template.used]
    names = {name for each in used for name in (each.name, *each.needs[case.name].made)}
    return Needs(
        case=bool(template.used & case.variables.keys()) or any(each.by_case for each in used),
        seed="seed" in template.used or any(each.needs[case.name].seed for each in used),
        made=tuple(name for name in things if name in names),
    )


def fill_flags(
    flags: Mapping[str, Any], variables: Mapping[str, Any], lists: Mapping[str, Sequence[Any]], where: str
) -> dict[str, Any]:
    """Flags with their variables filled in; those whose variables leave nothing (null, no values) are left out.

    Args:
        flags: the flags.
        variables: value by name.
        lists: the named lists.
        where: names them in messages.

    Raises:
        UserError: a variable or a list is not there, or does not fit where it stands.
    """
    check_parts_of_texts(flags, variables, where)
    filled = {}
    for name, value in Template(variables, lists, where).fill(dict(flags)).items():
        if isinstance(value, list):
            value = [item for item in value if item is not None]
        if value not in (None, []) or flags[name] in (None, []):
            filled[name] = value
    return filled
