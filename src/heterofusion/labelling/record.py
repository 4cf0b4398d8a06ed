"""What a labelling leaves: the records of labels, what `labels.json` tells of them, and a table of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from heterofusion.data.labels import CONTROL_COLUMN
from heterofusion.data.markdown import markdown_table
from heterofusion.experts.examples import Prompts
from heterofusion.experts.expert import Expert
from heterofusion.experts.generation import Answer as Label
from heterofusion.experts.soft import OwnLabel
from heterofusion.labelling.arguments import LabelArguments
from heterofusion.labelling.formats import format_check
from heterofusion.labelling.routing import Routing, most_confident
from heterofusion.labelling.tasks import LabelTask, labelled_record, tags_of
from heterofusion.publish.record import library_versions
from heterofusion.runtime.files import display_name
from heterofusion.runtime.ranks import cost_record


@dataclass(frozen=True)
class TaskLabels:
    """The labels of a task.

    Args:
        task: The task, with its prompts.
        records: One per prompt, as they are written.
        invented: Counts of `invented_prompts`; None where prompts were given.
        cut: How many prompts a source read without their beginning.
    """

    task: LabelTask
    records: list[dict[str, Any]]
    invented: dict[str, int] | None
    cut: int

    def summary(self) -> dict[str, Any]:
        """What `labels.json` tells of them."""
        count = len(self.records)
        failures = sum(not record["format_ok"] for record in self.records)
        prompts = self.task.prompts
        return {
            "metric": self.task.metric,
            "labels": count,
            "sources": dict(Counter(record["source"] for record in self.records)),
            "format_failures": failures,
            "format_failure_rate": failures / count if count else None,
            "mean_log_probability": sum(r["log_probability"] for r in self.records) / count if count else None,
            "prompts_cut": self.cut,
            "prompts_sha256": prompts.sha256 if prompts is not None else None,
            "replay_sha256": self.task.replay.sha256 if self.task.replay is not None else None,
            "invented": self.invented,
        }


def label_records(
    task: LabelTask, texts: Mapping[str, Prompts], labels: Mapping[str, list[Label]], control: str | None = None
) -> list[dict[str, Any]]:
    """The records of a task's file: each prompt with the label of its most confident source.

    Args:
        task: The task.
        texts: Its prompts, by source.
        labels: Their labels, by source.
        control: Kind of the control that the labels are of, if they are.
    """
    if task.prompts is None or not labels:
        return []
    references = [str(answer) for answer in _references(task)]
    is_well_formed = format_check(task.metric, references)
    records = []
    for position in range(len(task.prompts.examples)):
        first = next(iter(texts.values())).texts[position]
        source = most_confident({name: rows[position] for name, rows in labels.items()}, first, is_well_formed)
        label, asked = labels[source][position], texts[source].texts[position]
        records.append(
            {
                **labelled_record(task.prompts, position, label.text, asked),
                **tags_of(task, position),
                "source": source,
                "log_probability": round(label.mean_log_probability, 6),
                "format_ok": is_well_formed(label, asked),
                **({} if control is None else {CONTROL_COLUMN: control}),
            }
        )
    return records


def _references(task: LabelTask) -> list[str]:
    """The replay's answers."""
    if task.replay is None:
        return []
    answers = [answer for _, answer in task.replay.examples]
    return [
        answer
        if isinstance(answer, str)
        else next((m["content"] for m in answer[::-1] if m["role"] == "assistant"), "")
        for answer in answers
    ]


def own_labels(made: Sequence[TaskLabels]) -> dict[str, list[OwnLabel]]:
    """The labels of each source."""
    own: dict[str, list[OwnLabel]] = {}
    for labels in made:
        for line, record in enumerate(labels.records):
            own.setdefault(record["source"], []).append(OwnLabel(labels.task.name, line, record))
    return own


def labels_record(
    arguments: LabelArguments,
    made: Sequence[TaskLabels],
    routing: Routing,
    anchor: Expert | None,
    sources: Sequence[Expert],
    seconds: float,
    processes: int,
) -> dict[str, Any]:
    """What `labels.json` holds. Local paths are cut to their names.

    Args:
        arguments: The flags.
        made: The labels of all tasks.
        routing: Which source labelled which task.
        anchor: The anchor, if there is one.
        sources: The sources.
        seconds: Of generation, and of soft labels.
        processes: How many shared it.
    """
    data, generation, control = arguments.data, arguments.generation, routing.control
    return {
        "control": {"kind": control, "seed": data.seed if control == "shuffle" else None} if control else None,
        "tasks": {labels.task.name: labels.summary() for labels in made},
        "labels": sum(len(labels.records) for labels in made),
        "routing": routing.record({labels.task.name: labels.task.metric for labels in made}),
        "anchor": anchor.record() if anchor is not None else None,
        "sources": [source.record() for source in sources],
        "settings": {
            "max_new_tokens": generation.max_new_tokens,
            "prompts": [name if data.own_prompts else display_name(name) for name in data.prompts],
            "max_prompts": data.max_prompts,
            "self_prompt": data.self_prompt,
            "self_prompt_model": data.self_prompt_model if data.self_prompt else None,
            "temperature": data.temperature,
            "top_p": data.top_p,
            "seed": data.seed,
            "dataset_seed": data.dataset_seed,
            "top_k_logits": arguments.output.top_k_logits,
        },
        "processes": processes,
        "cost": cost_record(seconds),
        "versions": library_versions(),
    }


def labels_table(record: Mapping[str, Any]) -> str:
    """Markdown table of `labels.json`: a row per task."""
    rows = []
    for name, task in record["tasks"].items():
        invented = task["invented"]
        sources = ", ".join(f"{source} {count}" for source, count in task["sources"].items())
        rows.append(
            [
                name,
                task["labels"],
                sources or None,
                task["format_failure_rate"],
                task["mean_log_probability"],
                f"{invented['kept']} of {invented['drawn']}" if invented else None,
            ]
        )
    control = record["control"]
    header = [
        f"CONTROL {control['kind']}: task" if control else "task",
        "labels",
        "by source",
        "format failures",
        "log-probability per token",
        "invented inputs kept",
    ]
    return markdown_table(header, rows)
