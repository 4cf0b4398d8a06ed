"""Which source labels which task: by its score on the replay beside the anchor's, or by a map that the user gives.

A source that does not know a task gives labels that harm; so it labels a task only if its own answers to the task's
replay prompts score better than the anchor's, by a margin, and it is not far behind the best source. Of several that
are left, every prompt takes the most confident.
A task that no source serves may go to the anchor itself, if it is good enough at it: that keeps what it can do.

A control takes the place of the sources that were chosen: the same tasks and prompts, answered by somebody who was not
chosen for what it knows. Tasks that the anchor labels stay its own in any control: they are not what the sources
contribute.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from heterofusion.data.labels import ANCHOR, LABEL_CONTROLS
from heterofusion.data.markdown import markdown_table
from heterofusion.experts.expert import NO_ADAPTER
from heterofusion.experts.generation import Answer
from heterofusion.labelling.tasks import FormatCheck
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.flags import check_ranges, flag, read_yaml

_ROUNDING = 1e-9  # of scores that are fractions


@dataclass
class RoutingArguments:
    """Which source labels which task."""

    routing: str | None = flag(
        None,
        help="YAML file that says so instead of the scores: a mapping of tasks to a source, a list of sources, "
        f"{ANCHOR}, or none. Tasks that it leaves out are measured.",
    )
    routing_margin: float = flag(
        0.1,
        help="How much better than the anchor's a source's score has to be for it to label a task.",
        range="[0, 1]",
    )
    routing_share: float = flag(
        0.5,
        help="Share of the best source's gain over the anchor that a source has to reach to label a task beside it.",
        range="[0, 1]",
    )
    anchor_labels: bool = flag(
        False,
        help="Let the anchor itself label measured tasks that no source serves and that it is good at "
        "(--anchor_min_score), which keeps what it can do.",
    )
    anchor_min_score: float = flag(
        0.5, help="The anchor's score from which it labels a task, with --anchor_labels.", range="[0, 1]"
    )
    control: str | None = flag(
        None,
        help="Let somebody who does not know answer in place of the chosen sources: bases (their bases without "
        "adapters), shuffle (sources that were chosen for other tasks; --seed draws) or anchor (the anchor itself).",
        choices=[*LABEL_CONTROLS],
    )

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class Routing:
    """The routing of all tasks."""

    tasks: list[str]
    sources: list[str]
    margin: float  # what a source had to be better by
    share: float  # of the best source's gain over the anchor, what a source had to reach
    scores: dict[str, dict[str, float]]  # by model (`anchor` and the sources) and task; tasks of the map have none
    chosen: dict[str, list[str]]  # the sources that label a task, in order, or the anchor; empty where nobody does
    mapped: list[str]  # tasks whose sources the user named
    anchor_from: float | None = None  # the anchor's score from which it labels a task that no source serves
    control: str | None = None  # which control takes the place of the chosen sources
    replaced: dict[str, list[str]] | None = None  # with a control, who labels a task

    @property
    def labelled_by(self) -> dict[str, list[str]]:
        """Who labels a task: those that were chosen, or their control."""
        return self.chosen if self.replaced is None else self.replaced

    @property
    def models(self) -> list[str]:
        """Names of all models that were scored or label something, the anchor first."""
        shown = ANCHOR in self.scores or any(ANCHOR in names for names in self.labelled_by.values())
        return [*([ANCHOR] if shown else []), *self.sources]

    def record(self, metrics: Mapping[str, str | None]) -> dict[str, Any]:
        """What `routing.json` holds; `metrics` say what the scores are."""
        return {
            "control": self.control,
            "margin": self.margin,
            "share": self.share,
            "anchor_min_score": self.anchor_from,
            "sources": self.sources,
            "tasks": {
                task: {
                    "metric": metrics[task],
                    "scores": {name: row[task] for name, row in self.scores.items() if task in row},
                    "chosen": self.chosen[task],
                    "labelled_by": self.labelled_by[task],
                    "by": "map" if task in self.mapped else "scores",
                }
                for task in self.tasks
            },
        }

    def table(self) -> str:
        """Markdown table: a row per model, a column per task, bold where a model labels the task."""
        named = "map" if self.control is None else "control"

        def cell(name: str, task: str) -> str:
            value = self.scores.get(name, {}).get(task)
            chosen = name in self.labelled_by[task]
            text = (named if chosen else "-") if value is None else f"{value:.3f}"
            return f"**{text}**" if chosen else text

        rows = [[name, *(cell(name, task) for task in self.tasks)] for name in self.models]
        return markdown_table(["" if self.control is None else f"CONTROL {self.control}", *self.tasks], rows)

    def reason(self, task: str) -> str:
        """Why nobody labels a task, and what to do."""
        if task in self.mapped:
            return "--routing says so"
        best = max(self.sources, key=lambda source: self.scores[source][task])
        found, needed = self.scores[best][task], self.scores[ANCHOR][task]
        why = f"no source is better at it than the anchor ({needed:.3f}; {best} has {found:.3f})"
        if found > needed:
            why += f" by --routing_margin {self.margin:g}: lower it, or name the source in --routing"
        elif self.anchor_from is None:
            why += "; --anchor_labels true lets the anchor answer, which keeps what it can do"
        return why if self.anchor_from is None else f"{why}; the anchor is below --anchor_min_score {self.anchor_from}"


def read_map(path: str, tasks: Sequence[str], sources: Sequence[str]) -> dict[str, list[str]]:
    """The sources of each task that the YAML file of `--routing` names, in order, the anchor last."""
    where = f"--routing {path}"
    known = [*sources, ANCHOR]
    chosen: dict[str, list[str]] = {}
    for task, value in read_yaml(path, where, "a mapping of tasks to sources").items():
        if task not in tasks:
            raise UserError(f"{where} names the task {task!r}, which is none of {', '.join(tasks)}; correct it")
        names = [] if value in (None, NO_ADAPTER) else value if isinstance(value, list) else [value]
        names = [str(name) if isinstance(name, int) else name for name in names]  # a name such as 7
        for name in names:
            if name not in known:
                raise UserError(f"{where}: {task!r}: {name!r} is no source; name {', '.join(known)} or {NO_ADAPTER}")
        chosen[task] = [name for name in known if name in names]
    return chosen


def route(
    tasks: Sequence[str],
    sources: Sequence[str],
    scores: dict[str, dict[str, float]],
    margin: float,
    mapped: Mapping[str, list[str]],
    anchor_from: float | None = None,
    share: float = 0.0,
) -> Routing:
    """Choose who labels every task.

    A source has to be better than the anchor, by the margin at least, and to have the given share of the best source's
    gain over it: one that is just better than an anchor that knows nothing would spoil what another one knows.
    """
    chosen = {}
    for task in tasks:
        if task in mapped:
            chosen[task] = [*mapped[task]]
            continue
        needed = scores[ANCHOR][task]
        gains = {source: scores[source][task] - needed for source in sources}
        least = max(margin, share * max(gains.values(), default=0.0)) - _ROUNDING
        chosen[task] = [source for source in sources if gains[source] > 0 and gains[source] >= least]
        if not chosen[task] and anchor_from is not None and needed >= anchor_from - _ROUNDING:
            chosen[task] = [ANCHOR]
    return Routing([*tasks], [*sources], margin, share, scores, chosen, [t for t in tasks if t in mapped], anchor_from)


def most_confident(labels: Mapping[str, Answer], prompt: str, is_well_formed: FormatCheck) -> str:
    """The source whose label a prompt takes: the first of the most confident among well-formed ones, if there are."""
    return max(labels, key=lambda source: (is_well_formed(labels[source], prompt), labels[source].confidence))


# ---- controls ---------------------------------------------------------------------------------------------------


def with_control(routing: Routing, kind: str, seed: int) -> Routing:
    """A routing with a control in the place of the sources that were chosen."""
    sources = {task: [name for name in names if name != ANCHOR] for task, names in routing.chosen.items()}
    served = {task: names for task, names in sources.items() if names}
    if not served:
        raise UserError(f"--control {kind} takes the place of sources, but no source labels any task; leave it out")
    if kind == "shuffle":
        others = exchange(served, seed)
    else:  # with `bases` they are the same sources, whose bases alone then answer
        others = {task: [ANCHOR] if kind == "anchor" else names for task, names in served.items()}
    replaced = {
        task: [*dict.fromkeys([*others.get(task, []), *(name for name in names if name == ANCHOR)])]
        for task, names in routing.chosen.items()
    }
    return replace(routing, control=kind, replaced=replaced)


def exchange(served: Mapping[str, Sequence[str]], seed: int) -> dict[str, list[str]]:
    """Give every task the sources of another one, of which none is its own: a seeded choice among all such ways."""
    tasks = [*served]
    costs = np.random.default_rng(seed).random((len(tasks), len(tasks)))  # (task, task whose sources it gets)
    own = [[bool(set(served[task]) & set(served[other])) for other in tasks] for task in tasks]
    costs[np.array(own, dtype=bool).reshape(costs.shape)] = np.inf
    try:
        _, others = linear_sum_assignment(costs)
    except ValueError as error:  # no assignment is finite
        raise UserError(
            f"--control shuffle: the sources of {', '.join(tasks)} cannot be exchanged so that every task gets only "
            "sources that were not chosen for it; choose --control bases or anchor, or give more tasks and sources"
        ) from error
    return {task: [*served[tasks[other]]] for task, other in zip(tasks, others, strict=True)}
