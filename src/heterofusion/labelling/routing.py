"""Which source labels which task: by its score on the replay beside the anchor's, or by a map that the user gives.

A source that does not know a task gives labels that harm; so it labels a task only if its own answers to the task's
replay prompts score better than the anchor's, by a margin, and it is not far behind the best source. Of several that
are left, every prompt takes the most confident.
A task that no source serves may go to the anchor itself, if it is good enough at it: that keeps what it can do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from heterofusion.data.labels import ANCHOR
from heterofusion.data.markdown import markdown_table
from heterofusion.evaluation.arguments import NO_ADAPTER
from heterofusion.experts.generation import Answer as Label
from heterofusion.labelling.formats import FormatCheck
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.flags import read_yaml

_ROUNDING = 1e-9  # of scores that are fractions


@dataclass(frozen=True)
class Routing:
    """The routing of all tasks.

    Args:
        tasks: Their names, in order.
        sources: Names of all sources, in order.
        margin: What a source had to be better by.
        share: Of the best source's gain over the anchor, what a source had to reach.
        scores: By model (`anchor` and the sources) and task; tasks of the map have none.
        chosen: The sources that label a task, in order, or the anchor; empty where nobody does.
        mapped: Tasks whose sources the user named.
        anchor_from: The anchor's score from which it labels a task that no source serves; None if it does not.
        control: Kind of the control that takes the place of the chosen sources; None without.
        replaced: With a control, who labels a task.
    """

    tasks: list[str]
    sources: list[str]
    margin: float
    share: float
    scores: dict[str, dict[str, float]]
    chosen: dict[str, list[str]]
    mapped: list[str]
    anchor_from: float | None = None
    control: str | None = None
    replaced: dict[str, list[str]] | None = None

    @property
    def labelled_by(self) -> dict[str, list[str]]:
        """Who labels a task: those that were chosen, or their control."""
        return self.chosen if self.replaced is None else self.replaced

    @property
    def models(self) -> list[str]:
        """Names of all models that were scored or label something, the anchor first."""
        shown = ANCHOR in self.scores or any(ANCHOR in names for names in self.labelled_by.values())
        return [*([ANCHOR] if shown else []), *self.sources]

    @property
    def unserved(self) -> list[str]:
        """Tasks that get no labels."""
        return [task for task in self.tasks if not self.chosen[task]]

    def record(self, metrics: Mapping[str, str | None]) -> dict[str, Any]:
        """What `routing.json` holds.

        Args:
            metrics: By task; what a score is.
        """
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
        rows = []
        for name in self.models:
            cells = []
            for task in self.tasks:
                value = self.scores.get(name, {}).get(task)
                text = "-" if value is None else f"{value:.3f}"
                named = "map" if self.control is None else "control"
                cells.append(f"**{named if value is None else text}**" if name in self.labelled_by[task] else text)
            rows.append([name, *cells])
        return markdown_table(["" if self.control is None else f"CONTROL {self.control}", *self.tasks], rows)

    def reason(self, task: str) -> str:
        """Why nobody labels a task, and what to do."""
        if task in self.mapped:
            return "--routing says so"
        best = max(self.sources, key=lambda source: self.scores[source][task])
        found, needed = self.scores[best][task], self.scores[ANCHOR][task]
        if found <= needed:
            why = f"no source is better at it than the anchor ({needed:.3f}; {best} has {found:.3f})"
        else:
            why = (
                f"the best source, {best}, has {found:.3f}, the anchor {needed:.3f}; lower --routing_margin "
                f"{self.margin:g}, or name the source in --routing"
            )
        return why if self.anchor_from is None else f"{why}; the anchor is below --anchor_min_score {self.anchor_from}"


def read_map(path: str, tasks: Sequence[str], sources: Sequence[str]) -> dict[str, list[str]]:
    """Read the YAML file of `--routing`.

    Args:
        path: The file: a mapping of tasks to the name of a source or of the anchor, a list of names, or none.
        tasks: Known tasks.
        sources: Known sources.

    Returns:
        The sources of each task that the file names, in order, the anchor last.

    Raises:
        UserError: It cannot be read, or names a task or a source that is not there.
    """
    where = f"--routing {path}"
    content = read_yaml(path, where, "a mapping of tasks to sources")
    known = [*sources, ANCHOR]
    chosen: dict[str, list[str]] = {}
    for task, value in content.items():
        if task not in tasks:
            raise UserError(f"{where} names the task {task!r}, which is none of {', '.join(tasks)}; correct it")
        names = [] if value in (None, NO_ADAPTER) else value if isinstance(value, list) else [value]
        names = [str(name) if isinstance(name, int) else name for name in names]  # a name such as 7
        for name in names:
            if name not in known:
                raise UserError(
                    f"{where} gives the task {task!r} to {name!r}, which is no source; choose among "
                    f"{', '.join(known)}, or write {NO_ADAPTER}"
                )
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

    Args:
        tasks: Names of the tasks.
        sources: Names of the sources.
        scores: By model (`anchor` and the sources) and task, for tasks that the map leaves out.
        margin: A source has to be better than the anchor by so much, and better in any case.
        mapped: Sources of the tasks that the user's map names.
        anchor_from: The anchor labels other tasks that no source serves, where its score is at least so much; None if
            it labels none.
        share: A source needs this share of the gain over the anchor that the best source has: one that is just better
            than an anchor that knows nothing would spoil what another one knows, confident as it may be.
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


def most_confident(labels: Mapping[str, Label], prompt: str, is_well_formed: FormatCheck) -> str:
    """The source whose label a prompt takes: a well-formed one if there is one, of these the most confident.

    Args:
        labels: By source, in order; the first of equals is taken.
        prompt: Text of the prompt.
        is_well_formed: Of the task.
    """
    return max(labels, key=lambda source: (is_well_formed(labels[source], prompt), labels[source].confidence))
