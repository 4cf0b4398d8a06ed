"""The metrics by their names, for others as `evaluate.Metric` classes too, and which one scores a data set."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import datasets
import evaluate

from heterofusion.evaluation.glue import GLUE_LABELS, score_glue
from heterofusion.evaluation.uie import KINDS, check_answers, score_answers
from heterofusion.runtime.errors import UserError

AUTO, UIE, EXACT_MATCH = "auto", "uie", "exact_match"
METRICS = (*KINDS, UIE, *GLUE_LABELS, EXACT_MATCH)


class _AnswerMetric(evaluate.Metric):
    """A metric of texts; constructed directly, it works without a network."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features(dict.fromkeys(("predictions", "references"), datasets.Value("string")))
        return evaluate.MetricInfo(description=str(self.__doc__), citation="", features=features)


class UIEF1(_AnswerMetric):
    """F1 of extraction answers: the dictionary of `score_answers`. `UIEF1("RE")` expects a head and a tail."""

    def _compute(self, predictions: Sequence[str], references: Sequence[str], **_: Any) -> dict[str, float | int]:
        kind = None if self.config_name == "default" else self.config_name  # "default" is evaluate's word for none
        return score_answers(predictions, references, kind)


class GLUEText(_AnswerMetric):
    """Scores of one GLUE task, such as `GLUEText("cola")`: the dictionary of `score_glue`."""

    def _compute(self, predictions: Sequence[str], references: Sequence[str], **_: Any) -> dict[str, float | int]:
        return score_glue(self.config_name, predictions, references)


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float | int]:
    """Share of answers that are the reference, case included, white space around both aside."""
    check_answers(predictions, references)
    hits = sum(a.strip() == b.strip() for a, b in zip(predictions, references, strict=True))
    return {EXACT_MATCH: hits / len(predictions), "num_examples": len(predictions)}


def score(metric: str, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float | int]:
    """Score answers by one of `METRICS`."""
    if metric == EXACT_MATCH:
        return exact_match(predictions, references)
    if metric in GLUE_LABELS:
        return score_glue(metric, predictions, references)
    return score_answers(predictions, references, None if metric == UIE else metric)


def primary_score(metric: str) -> str:
    """The score that stands for a metric in tables and means: a key of what `score` gives."""
    if metric in GLUE_LABELS:
        return "accuracy" if GLUE_LABELS[metric] else "pearson"  # STS-B has numbers in place of labels
    return EXACT_MATCH if metric == EXACT_MATCH else "f1"


def choose_metric(metric: str, rows: Iterable[Mapping[str, Any]], label: str) -> str:
    """The metric of a data set: the one that is asked for or, of `auto`, by the columns `kind` and `task`."""
    if metric != AUTO:
        return metric
    # as the recipes that prepare data write them: of GLUE the task is the metric, of others it names the data set
    kinds = ((row.get("kind"), row.get("task")) for row in rows)
    names = sorted({str(task if kind == "GLUE" else kind) for kind, task in kinds})
    if len(names) > 1:
        raise UserError(f"{label} mixes records of {' and '.join(names)}; split it by kind, or give --metric")
    if names[0] not in METRICS:
        raise UserError(f"{label}: no column `kind` that tells the metric (found: {names[0]}); give --metric")
    return names[0]
