"""What a labelling leaves: the records of labels, what `labels.json` tells of them, and a table of it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from heterofusion.data.labels import CONTROL_COLUMN
from heterofusion.data.markdown import markdown_table
from heterofusion.experts.examples import Prompts
from heterofusion.experts.generation import Answer
from heterofusion.labelling.routing import most_confident
from heterofusion.labelling.tasks import LabelTask, labelled_record


def summary(task: LabelTask, records: Sequence[Mapping[str, Any]], cut: int) -> dict[str, Any]:
    """What `labels.json` tells of a task's labels."""
    count, failures = len(records), sum(not record["format_ok"] for record in records)
    return {
        "metric": task.metric,
        "labels": count,
        "sources": dict(Counter(record["source"] for record in records)),
        "format_failures": failures,
        "format_failure_rate": failures / count if count else None,
        "mean_log_probability": sum(r["log_probability"] for r in records) / count if count else None,
        "prompts_cut": cut,
        "prompts_sha256": task.prompts.sha256 if task.prompts is not None else None,
        "replay_sha256": task.replay.sha256 if task.replay is not None else None,
    }


def label_records(
    task: LabelTask, texts: Mapping[str, Prompts], labels: Mapping[str, list[Answer]], control: str | None = None
) -> list[dict[str, Any]]:
    """The records of a task's file: each prompt with the label of its most confident source."""
    if task.prompts is None or not labels:
        return []
    is_well_formed = task.format_check()
    records = []
    for position in range(len(task.prompts.examples)):
        first = next(iter(texts.values())).texts[position]
        source = most_confident({name: rows[position] for name, rows in labels.items()}, first, is_well_formed)
        label, question = labels[source][position], texts[source].texts[position]
        records.append(
            {
                **labelled_record(task.prompts, position, label.text, question),
                **task.tags_of(position),
                "source": source,
                "log_probability": round(label.mean_log_probability, 6),
                "format_ok": is_well_formed(label, question),
                **({} if control is None else {CONTROL_COLUMN: control}),
            }
        )
    return records


def labels_table(record: Mapping[str, Any]) -> str:
    """Markdown table of `labels.json`: a row per task."""
    rows = []
    for name, task in record["tasks"].items():
        invented = task["invented"]
        sources = ", ".join(f"{source} {count}" for source, count in task["sources"].items())
        kept = f"{invented['kept']} of {invented['drawn']}" if invented else None
        told = (task["format_failure_rate"], task["mean_log_probability"], kept)
        rows.append([name, task["labels"], sources or None, *told])
    title = f"CONTROL {record['control']}: task" if record["control"] else "task"
    header = ["labels", "by source", "format failures", "log-probability per token", "invented inputs kept"]
    return markdown_table([title, *header], rows)
