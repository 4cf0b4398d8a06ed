"""Whether a label is an answer that the task's metric can read."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from heterofusion.evaluation.glue import GLUE_LABELS, parse_label, parse_similarity
from heterofusion.evaluation.metrics import UIE
from heterofusion.evaluation.uie import KINDS, normalize, parse_items, score_answers
from heterofusion.experts.generation import Answer as Label

FormatCheck = Callable[[Label, str], bool]


def format_check(metric: str | None, references: Sequence[str]) -> FormatCheck:
    """What tells well-formed labels of a task from others.

    Whatever the task, a label must not be empty and must have ended by itself. Of an extraction task every item must
    be `type: span` (of RE `relation: head, tail`) with a type that the replay's answers have or the prompt names; of a
    GLUE task it must be one of the task's labels.

    Args:
        metric: Of the task, one of `heterofusion.evaluation.metrics.METRICS`; None for other data.
        references: The replay's answers, where there are any.

    Returns:
        A function of a label and the text of its prompt.
    """
    if metric is not None and metric in GLUE_LABELS:
        labels = GLUE_LABELS[metric]
        return lambda label, prompt: (
            label.ended and (parse_label(label.text, labels) if labels else parse_similarity(label.text)) is not None
        )
    if metric in (*KINDS, UIE):
        kind = None if metric == UIE else metric
        known = frozenset(_type(item) for reference in references for item in parse_items(reference))
        return lambda label, prompt: label.ended and _is_extraction(label.text, prompt, kind, known)
    return lambda label, prompt: label.ended and bool(label.text.strip())


def _is_extraction(text: str, prompt: str, kind: str | None, known: frozenset[str]) -> bool:
    if score_answers([text], [text], kind)["format_failure_rate"]:
        return False
    types = {_type(item) for item in parse_items(text)}
    asked = normalize(prompt)
    return all(name in known or name in asked for name in types)


def _type(item: str) -> str:
    return item.partition(":")[0]
