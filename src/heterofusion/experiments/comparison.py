"""Many methods under the same conditions: hyper-parameters searched with equal budgets, seeds, controls and costs.

A script adds methods, each with the recipe that makes it and a function that gives its flags for a case and a seed.
Hyper-parameters are chosen by validation data, in one case and with a seed that no reported run has; then every method
runs once for each case and seed with what was best, and is scored on the test data.
"""

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from heterofusion.data.markdown import markdown_table
from heterofusion.experiments.page import Page
from heterofusion.experiments.pictures import draw_curves, draw_ranking
from heterofusion.experiments.runs import Run, RunArguments, Runs, content_sha256
from heterofusion.experiments.tables import (
    COSTS_ARE,
    GAINS_ARE,
    NO_SEED,
    SCORES_ARE,
    Gain,
    Row,
    case_table,
    gain_table,
    score_frame,
    score_table,
)
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.flags import flag

Flags = dict[str, Any]
_TRAINED_ON = ("dataset_name", "prompts", "source_labels")


@dataclass
class ExperimentArguments(RunArguments):
    """Data and settings of all runs. Data has the layout of recipes/uie/prepare.py."""

    data: str = flag("", help="Folder with replay/TASK.jsonl, validation/TASK.jsonl, test/TASK.jsonl.")
    tasks: list[str] = flag(default_factory=list, help="Tasks; in recipes/paper.py the first is the anchor's.")
    fuse_config: str = flag("", help="YAML file with the flags of every fusion.")
    eval_config: str = flag("", help="YAML file with the flags of every evaluation.")
    max_steps: int | None = flag(None, help="Optimizer steps, in place of the configs'.")

    def files(self, split: str, tasks: Sequence[str] = ()) -> list[str]:
        """The files of a split, of all tasks by default."""
        return [f"{self.data}/{split}/{task}.jsonl" for task in tasks or self.tasks]


@dataclass
class ComparisonArguments(ExperimentArguments):
    """What is compared, and how often."""

    model_name_or_path: str = flag("", help="Base of the target.")
    target_adapter: str = flag("", help="The anchor: the target's adapter.")
    target_task: str = flag("", help="Task of the anchor.")
    source_models: list[str] = flag(default_factory=list, help="Base of each source.")
    source_adapters: list[str] = flag(default_factory=list, help="The sources, of any family.")
    source_tasks: list[str] = flag(default_factory=list, help="Task of each source.")
    tuning_config: str = flag("", help="YAML file with the flags of every other training.")
    validation_max_examples: int = flag(0, help="Validation examples of a task; 0: all.")
    seeds: list[int] = flag(default_factory=lambda: [0, 1, 2], help="Seeds of the reported runs.")
    search_seed: int = flag(100, help="Seed of the runs that hyper-parameters are chosen by.")
    search_budget: int = flag(6, help="Validation runs of each method with hyper-parameters.")
    title: str = flag("Methods side by side", help="Heading of the report.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("model_name_or_path", "target_adapter", "source_adapters", "data", "tasks"):
            if not getattr(self, name):
                raise UserError(f"--{name} is missing; see --help")
        if not len(self.source_models) == len(self.source_tasks) == len(self.source_adapters):
            raise UserError("--source_models, --source_tasks and --source_adapters need one value for each source")

    @property
    def tuning(self) -> Flags:
        """Flags of direct tuning and distillation of the anchor."""
        flags = {"config": self.tuning_config, "model_name_or_path": self.model_name_or_path, "lora_dropout": 0.0}
        return {**flags, "init_adapter": self.target_adapter, "max_steps": self.max_steps}

    @property
    def fusion(self) -> Flags:
        """Flags of a fusion."""
        flags = {"config": self.fuse_config, "model_name_or_path": self.model_name_or_path}
        adapters = {"target_adapter": self.target_adapter, "source_adapters": self.source_adapters}
        return {**flags, **adapters, "max_steps": self.max_steps}

    def comparison(self, cases: Mapping[str, Sequence[int]], search_case: str = "") -> "Comparison":
        """A comparison whose first rows are the anchor, and the experts that are each asked about their own task."""
        scored = {"config": self.eval_config, "model_name_or_path": self.model_name_or_path}
        limit = [self.validation_max_examples] if self.validation_max_examples else None
        validation = {**scored, "dataset_name": self.files("validation"), "max_examples": limit}
        test = {**scored, "dataset_name": self.files("test")}
        table = Comparison(Runs(self), validation, test, cases, self.search_budget, self.search_seed, search_case)
        anchor = [{"adapters": [self.target_adapter]}]
        about = "the target adapter before anything is done"
        table.add(Method("anchor", "References", about, scored=lambda _: anchor))
        models, adapters = [self.model_name_or_path, *self.source_models], [self.target_adapter, *self.source_adapters]
        parts = [
            {"model_name_or_path": model, "adapters": [adapter], "dataset_name": [f"{self.data}/test/{task}.jsonl"]}
            for model, adapter, task in zip(models, adapters, [self.target_task, *self.source_tasks], strict=True)
            if task in self.tasks
        ]
        about = "the anchor and the sources, each on its own base and asked about its own task"
        table.add(Method("source experts", "References", about, scored=lambda _: parts))
        return table


@dataclass(eq=False)
class Method:
    """A row of the table."""

    name: str
    group: str = ""  # heading of the rows that it stands among
    about: str = ""
    recipe: str | None = None  # what makes its adapter; None if there is nothing to make
    flags: Callable[[str, int], Flags] = lambda case, seed: {}
    search: Mapping[str, Sequence[Any]] = field(default_factory=dict)  # values of the flags that are searched
    like: str | None = None  # the method whose recipe, flags and chosen values it takes; `flags` replace some
    # flags of recipes/eval.py, given what was made; several evaluations of disjoint data make one row
    scored: Callable[[Any], list[Flags]] = lambda made: [{"adapters": [made]}]
    cases: Sequence[str] = ()  # those that it is run in; all by default


@dataclass
class Comparison:
    """Methods, and what they are compared by."""

    runs: Runs
    validation: Flags  # of the evaluations that hyper-parameters are chosen by
    test: Flags  # of those that are reported
    cases: Mapping[str, Sequence[int]]  # seeds of the reported runs by case; one without a name if nothing is varied
    budget: int  # validation runs of each method with hyper-parameters
    search_seed: int = 100
    search_case: str = ""
    methods: dict[str, Method] = field(default_factory=dict)
    tried: dict[str, list[tuple[Flags, Run]]] = field(default_factory=dict)  # values and their evaluation
    chosen: dict[str, Flags] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    def add(self, method: Method) -> None:
        """Add a row."""
        count = math.prod(map(len, method.search.values()))
        if method.search and count != self.budget:
            raise UserError(
                f"the search of {method.name!r} has {count} combinations, but every method gets --search_budget "
                f"{self.budget} validation runs: give it as many"
            )
        if method.like is not None:
            model, replaced = self.methods[method.like], method.flags
            method.recipe, method.like = model.recipe, model.like or model.name
            method.cases = method.cases or model.cases
            method.flags = lambda case, seed: {**model.flags(case, seed), **replaced(case, seed)}
        self.methods[method.name] = method

    def run(self) -> pd.DataFrame:
        """Search, run all methods, and give the frame of their scores; what did not finish is in `missing`."""
        if self.search_seed in itertools.chain(*self.cases.values()):
            raise UserError(
                f"--search_seed {self.search_seed} is one of the reported seeds: hyper-parameters would be chosen by "
                "a run that is in the table; give another"
            )
        self._search()
        planned = {}
        for method in self.methods.values():
            searched = self.methods[method.like or method.name]
            if searched.search and searched.name not in self.chosen:
                self.missing.append(f"{method.name}: the search of {searched.name} did not finish")
                continue
            for case in method.cases or self.cases:
                planned[method, case] = {seed: self._reported(method, case, seed) for seed in self.cases[case]}
        self._check_apart([run for made in planned.values() for _, scored in made.values() for run in scored])
        self.runs.wait()
        rows = []
        for (method, case), made in planned.items():
            if len(made) > 1 and len({tuple(scored) for _, scored in made.values()}) == 1:  # no seed matters
                made = {NO_SEED: next(iter(made.values()))}
            for seed, (maker, scored) in made.items():
                if all(run.is_finished for run in scored):
                    rows.append(self._row(method, case, seed, maker, scored))
                else:
                    self.missing.append(", ".join(filter(None, (method.name, case, f"seed {seed}"))))
        return score_frame(rows)

    def _search(self) -> None:
        """Try all values of all methods, side by side, and choose the best of each."""
        for method in [method for method in self.methods.values() if method.search]:
            tried = self.tried[method.name] = []
            for values in itertools.product(*method.search.values()):
                settings = dict(zip(method.search, values, strict=True))
                flags = {**method.flags(self.search_case, self.search_seed), **settings}
                made = self.runs.run(str(method.recipe), f"search {method.name} {describe(settings)}", **flags)
                for scored in method.scored(made):
                    title = f"validate {method.name} {describe(settings)}"
                    tried.append((settings, self.runs.run("eval", title, **{**self.validation, **scored})))
        if self.tried:
            self.runs.wait()
        for name, tried in self.tried.items():
            if self.runs.options.dry_run:
                self.chosen[name] = tried[0][0]
            elif all(run.is_finished for _, run in tried):
                self.chosen[name] = max(tried, key=_score)[0]

    def _reported(self, method: Method, case: str, seed: int) -> tuple[Run | None, list[Run]]:
        """What makes a method in a case with a seed, and the evaluations of what was made."""
        title, made = " ".join(filter(None, (method.name, case, f"seed {seed}"))), None
        if method.recipe is not None:
            flags = {**method.flags(case, seed), **self.chosen.get(method.like or method.name, {})}
            made = self.runs.run(method.recipe, title, **flags)
        scored = [{**self.test, **flags} for flags in method.scored(made)]
        return made, [self.runs.run("eval", f"test {title}", **flags) for flags in scored]

    def _row(self, method: Method, case: str, seed: int, made: Run | None, scored: Sequence[Run]) -> Row:
        shared = list(made.needs) if made else []
        searching = [run.needs[0] for _, run in self.tried.get(method.name, ()) if run.needs]
        return Row(
            method.name, [run.results() or {} for run in scored], seed, {"case": case}, method.group,
            sum(run.seconds for run in searching) if searching else None,
            sum(run.seconds for run in shared) if shared else None,
            any(run.recipe == "distill" or _asked_sources(run) for run in shared),
        )  # fmt: skip

    def _check_apart(self, reported: Sequence[Run]) -> None:
        """Refuse test data that hyper-parameters are chosen by or that is trained on, by the content of the files."""
        test = _files(reported, ("dataset_name",))
        validation = _files([run for tried in self.tried.values() for _, run in tried], ("dataset_name",))
        training = _files([run for run in self.runs.all.values() if run.recipe != "eval"], _TRAINED_ON)
        for left, right, what in (
            (test, validation, "hyper-parameters are chosen by test data"),
            (test, training, "something is trained on test data"),
            (validation, training, "hyper-parameters are chosen by data that is trained on"),
        ):
            if common := sorted(left.keys() & right.keys()):
                raise UserError(f"{what}: {left[common[0]]}; give it other data")

    def report(self, title: str, gains: Sequence[Gain], normalize_by: str) -> None:
        """Run all and write the page; in the end an error if something did not finish."""
        frame = self.run()
        if not frame.empty:
            page = Page(self.runs.options.output_dir, title)
            self.write(page, frame, [gain for gain in gains if gain.row in self.methods], normalize_by)
            print(f"written to {page.write()}")
        self.runs.finish()

    def write(self, page: Page, frame: pd.DataFrame, gains: Sequence[Gain], normalize_by: str) -> None:
        """Tables, pictures, gains, what the rows are, and what was tried."""
        page.frames.append(frame)
        rows = {name for gain in gains for name in (gain.row, *gain.rivals)}
        if len(self.cases) > 1:
            page.add("## Mean scores in all cases", SCORES_ARE, case_table(frame))
            page.add_picture(draw_curves(frame, "case", sorted(rows)), "cases", "Mean score over the cases")
        if gains:
            page.add("## Gains", GAINS_ARE, gain_table(frame, gains))
        page.add("## Tables", SCORES_ARE, COSTS_ARE)
        for number, (case, part) in enumerate(frame.groupby("case", sort=False), start=1):
            page.add(*([f"### {case}"] if case else []), score_table(part, normalize_by=normalize_by))
            page.add_picture(draw_ranking(part), f"methods-{number}", f"Mean score of each method {case}".strip())
        about = [f"- **{method.name}**: {method.about}" for method in self.methods.values() if method.about]
        page.add("## What the rows are", "\n".join(about))
        if self.tried:
            told = f"Every method got {self.budget} validation runs, on other data; controls take what was chosen for"
            page.add("## Hyper-parameters", f"{told} what they are the control of.", self._search_table())
        if self.missing:
            page.add("## Missing", "\n".join(f"- {text}" for text in self.missing))

    def _search_table(self) -> str:
        lines = []
        for name, tried in self.tried.items():
            scores = [f"{describe(values)}: {_score((values, run)):.3f}" for values, run in tried if run.is_finished]
            chosen, search = self.chosen.get(name, {}), self.methods[name].search
            ends = {key: (min(values), max(values)) for key, values in search.items() if len(values) > 2}
            edge = any(value in ends.get(key, ()) for key, value in chosen.items())
            lines.append([name, describe(chosen) + " (at the edge)" * edge or "-", ", ".join(scores)])
        return markdown_table(["", "chosen", "mean score on the validation data"], lines)


def _score(tried: tuple[Flags, Run]) -> float:
    return float((tried[1].results() or {})["mean"])


def describe(settings: Mapping[str, Any]) -> str:
    """`learning_rate 0.001`."""
    return " ".join(f"{name} {value}" for name, value in settings.items())


def _files(runs: Sequence[Run], flags: Sequence[str]) -> dict[str, str]:
    """Names of the files that flags name, by the hash of their content."""
    names = [str(name) for run in runs for flag in flags for name in run.flags.get(flag, ())]
    return {content_sha256(Path(name).absolute()): name for name in names if Path(name).is_file()}


def _asked_sources(run: Run) -> bool:
    """Whether labels were asked of models of the sources."""
    path = run / "labels.json"
    tasks = json.loads(path.read_text(encoding="utf-8"))["tasks"] if path.is_file() else {}
    return any(source != "anchor" for task in tasks.values() for source in task["sources"])
