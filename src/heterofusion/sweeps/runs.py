"""A sweep file becomes runs: per run a folder, and the flags of the recipes that it goes through.

output_dir: outputs/alpha            # by default outputs/<name of the file>
lists: {tasks: [a, b, c]}            # for `for_each`, see `Template`
sweep: {seed: [0, 1], alpha_init: [0.1, 0.3]}   # all combinations; a list of such mappings is one after the other
label: {...}                         # flags of recipes/label.py, which runs first; what trains on its labels names
                                     # their files in the output_dir that is given here
train: {...}                         # of the recipe that makes an adapter: train, expert, merge or distill,
eval: {...}                          # and of recipes/eval.py; each may be missing. `eval` scores what was made,
                                     # unless it names others
references:                          # rows to compare with: evaluations with some flags of `eval` replaced
  - {name: anchor, adapters: [ANCHOR]}
"""

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from heterofusion.cli_before import check_flags
from heterofusion.evaluation.rows import EVAL_ARGUMENTS, EvalOutputArguments
from heterofusion.experts.expert import NO_ADAPTER
from heterofusion.labelling.arguments import LABEL_ARGUMENTS
from heterofusion.merging.config import MERGE_ARGUMENTS
from heterofusion.rivals.distillation import DISTILL_ARGUMENTS
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.flags import as_text, read_yaml
from heterofusion.sweeps.template import Template
from heterofusion.training.config import EXPERT_ARGUMENTS
from heterofusion.training.config import FUSION_ARGUMENTS as ARGUMENTS

RECIPES: Mapping[str, tuple[type, ...]] = {  # in the order in which a run goes through them
    "label": LABEL_ARGUMENTS,
    "expert": EXPERT_ARGUMENTS,
    "train": ARGUMENTS,
    "merge": MERGE_ARGUMENTS,
    "distill": DISTILL_ARGUMENTS,
    "eval": EVAL_ARGUMENTS,
}
MAKERS = tuple(recipe for recipe in RECIPES if recipe not in ("label", "eval"))  # they make an adapter
_KEYS = {"output_dir", "lists", "sweep", "references", *RECIPES}
_FOLDERS = {"label": "labels", "eval": "eval", **dict.fromkeys(MAKERS, "adapter")}
_ROWS = {"train": "fused", "expert": "expert", "merge": "merged", "distill": "distilled", "label": "labels"}


@dataclass(frozen=True)
class Step:
    """One recipe of a run.

    Attributes:
        recipe: a key of `RECIPES`.
        flags: its flags, as a YAML file of it would hold them.
        folder: its output_dir.
    """

    recipe: str
    flags: dict[str, Any]
    folder: Path


@dataclass(frozen=True)
class Run:
    """One run of a sweep.

    Attributes:
        experiment: name of the sweep file.
        name: what is scored; the row of the results in a report.
        variables: the values of the sweep that it is of, by name.
        folder: where its steps, their flags and their logs lie.
        steps: the recipes, in order.
    """

    experiment: str
    name: str
    variables: dict[str, str]
    folder: Path
    steps: tuple[Step, ...] = field(repr=False)

    @property
    def title(self) -> str:
        """Experiment, name and variables, for messages."""
        return f"{self.experiment}: {self.name} {_variables_text(self.variables)}".rstrip()


def read_sweep(path: str | Path) -> list[Run]:
    """Read a sweep file.

    Args:
        path: a YAML file; `${NAME}` is the environment variable of that name.

    Returns:
        Its runs; references that come out the same for several of them are one run.

    Raises:
        UserError: names the file and what in it is not as it has to be.
    """
    full = Path(path).expanduser().absolute()
    where = f"sweep {full}"
    content = read_yaml(full, where, "a mapping")
    unknown = [key for key in content if key not in _KEYS]
    if unknown:
        raise UserError(f"{where} has unknown keys: {', '.join(unknown)}; known are {', '.join(sorted(_KEYS))}")
    steps = [recipe for recipe in RECIPES if recipe in content]
    if not steps:
        raise UserError(f"{where} runs nothing; give it at least one of {', '.join(RECIPES)}")
    for recipe in steps:
        if not isinstance(content[recipe], dict):
            raise UserError(f"{where}: {recipe} must be a mapping of flags")
        content[recipe] = with_config(content[recipe], full.parent, f"{where}, {recipe}")
    made = [recipe for recipe in steps if recipe in MAKERS]
    if len(made) > 1:
        raise UserError(f"{where} has {' and '.join(made)}; a sweep makes one kind of adapter, give each its own file")
    folder = Path(str(content.get("output_dir") or Path("outputs") / full.stem)).expanduser()
    runs: dict[Path, Run] = {}
    lists = _lists(content.get("lists") or {}, where)
    for variables, names in _combinations(content.get("sweep") or {}, where):
        template = Template(variables, lists, where)
        runs_of_point = [_main_run(content, steps, template, names, full.stem, folder)]
        runs_of_point += [
            _reference(reference, content, Template(variables, lists, where), names, full.stem, folder)
            for reference in _references(content, where)
        ]
        for run in runs_of_point:
            if run.folder in runs and runs[run.folder] != run:
                raise UserError(f"{where}: two runs have the folder {run.folder}; give them other names")
            runs[run.folder] = run
    for run in runs.values():
        for step in run.steps:
            check_step(step, f"{where}, {step.recipe} of {run.name} {_variables_text(run.variables)}".rstrip())
    return list(runs.values())


def with_config(flags: Mapping[str, Any], folder: Path, where: str) -> dict[str, Any]:
    """Flags over those of the YAML file that they name as `config`, relative to a folder."""
    if "config" not in flags:
        return dict(flags)
    config = folder / str(flags["config"])
    rest = {key: value for key, value in flags.items() if key != "config"}
    return {**read_yaml(config, f"{where}, config {config}", "a mapping of flags"), **rest}


def _lists(lists: Any, where: str) -> dict[str, list[Any]]:
    if not isinstance(lists, dict) or not all(isinstance(items, list) for items in lists.values()):
        raise UserError(f"{where}: lists must be a mapping of names to lists")
    return lists


def _combinations(sweep: Any, where: str) -> Iterator[tuple[dict[str, Any], dict[str, str]]]:
    """Per run of the sweep its variables, and the names of the values that it stands for."""
    grids = sweep if isinstance(sweep, list) else [sweep]
    for grid in grids:
        if not isinstance(grid, dict) or not all(isinstance(values, list) and values for values in grid.values()):
            raise UserError(f"{where}: sweep must map variables to lists of values, or be a list of such mappings")
        for values in itertools.product(*grid.values()):
            variables: dict[str, Any] = {}
            names: dict[str, str] = {}
            for variable, value in zip(grid, values, strict=True):
                if isinstance(value, dict):  # several variables that change together, under one name
                    if "name" not in value:
                        raise UserError(f"{where}: a mapping among the values of {variable} has no name")
                    variables |= {key: item for key, item in value.items() if key != "name"}
                    value = value["name"]
                if isinstance(value, list):
                    raise UserError(f"{where}: a list among the values of {variable}; make it a mapping with a name")
                variables[variable] = value
                names[variable] = as_text(value)
            yield variables, names


def _main_run(
    content: dict[str, Any], recipes: list[str], template: Template, names: dict[str, str], stem: str, folder: Path
) -> Run:
    """The run that a point of the sweep stands for."""
    flags = {recipe: template.fill(content[recipe]) for recipe in recipes}
    made_as = next((_ROWS[recipe] for recipe in (*MAKERS, "label") if recipe in recipes), "fused")
    name = str(flags.get("eval", {}).get("name") or made_as)
    place = _folder(folder, name, names)
    steps = []
    made = None
    for recipe, values in flags.items():
        if recipe == "eval":
            values = _eval_flags(values, name, stem, names, made)
        output = Path(str(values.get("output_dir") or place / _FOLDERS[recipe]))
        steps.append(Step(recipe, {**values, "output_dir": str(output)}, output))
        made = output if recipe in MAKERS else made
    return Run(stem, name, names, place, tuple(steps))


def _references(content: dict[str, Any], where: str) -> list[dict[str, Any]]:
    references = content.get("references") or []
    if not isinstance(references, list) or not all(isinstance(item, dict) and item.get("name") for item in references):
        raise UserError(f"{where}: references must be a list of mappings, each with a name")
    if references and "eval" not in content:
        raise UserError(f"{where} has references but no eval section, whose flags they take")
    return references


def _reference(
    reference: dict[str, Any], content: dict[str, Any], template: Template, names: dict[str, str], stem: str,
    folder: Path,
) -> Run:  # fmt: skip
    """An evaluation for comparison; it is of the variables alone that its flags need."""
    flags = template.fill({**content["eval"], **reference})
    name = str(flags.pop("name"))
    needed = {variable: value for variable, value in names.items() if variable in template.used}
    place = _folder(folder, name, needed)
    flags = _eval_flags(flags, name, stem, needed, None)
    output = place / _FOLDERS["eval"]
    return Run(stem, name, needed, place, (Step("eval", {**flags, "output_dir": str(output)}, output),))


def _eval_flags(
    flags: dict[str, Any], name: str, experiment: str, variables: Mapping[str, str], adapter: Path | None
) -> dict[str, Any]:
    """Flags of an evaluation with what makes its result a row of a report."""
    labels = [f"experiment={experiment}", *(f"{key}={value}" for key, value in variables.items())]
    made = {} if adapter is None else {"adapters": [str(adapter)]}
    row = {} if "names" in flags else {"name": name}  # several adapters have names of their own
    return {**made, **flags, **row, "labels": [*labels, *listed(flags.get("labels"))]}


def _folder(folder: Path, name: str, variables: Mapping[str, str]) -> Path:
    parts = [_safe(name), *([_safe(_variables_text(variables))] if variables else [])]
    return folder.joinpath(*parts)


def _variables_text(variables: Mapping[str, str]) -> str:
    return ",".join(f"{name}={value}" for name, value in variables.items())


def _safe(name: str) -> str:
    return re.sub(r"[^\w.,=+-]", "_", name).lstrip(".") or "_"


def check_step(step: Step, where: str) -> None:
    """Check the flags of a step as far as that goes without starting it; the stages of a sequence one by one.

    Args:
        step: the step.
        where: names it in messages.

    Raises:
        UserError: an unknown or missing flag, or a value that it cannot have.
    """
    check_flags(RECIPES[step.recipe], step.flags, where)
    if step.recipe == "eval":
        _check_names(step.flags, where)


def _check_names(flags: Mapping[str, Any], where: str) -> None:
    """Check that an evaluation has as many names as adapters, and one per data set where each answers its own."""
    output = EvalOutputArguments(flags["output_dir"], name=flags.get("name"), names=flags.get("names"))
    adapters, data = listed(flags.get("adapters", NO_ADAPTER)), listed(flags.get("dataset_name"))
    if flags.get("adapter_per_dataset") and len(adapters) != len(data):
        raise UserError(f"{where}: adapter_per_dataset has {len(adapters)} adapters for {len(data)} data sets")
    try:
        if flags.get("ensemble") or flags.get("adapter_per_dataset"):
            output.row_name("", "--ensemble" if flags.get("ensemble") else "--adapter_per_dataset")
        else:
            output.adapter_names(adapters)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def listed(value: Any) -> list[str]:
    """The values of a flag as texts: YAML has a single one without a list, or none at all."""
    return [] if value is None else list(map(str, value)) if isinstance(value, list) else [str(value)]
