"""The metrics, as `evaluate.Metric` classes over plain functions, and which one scores a data set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import datasets
import evaluate

from heterofusion.evaluation.glue import GLUE_LABELS, check_task, score_glue
from heterofusion.evaluation.uie import KINDS, check_answers, check_kind, score_answers
from heterofusion.runtime.errors import UserError

AUTO = "auto"
UIE = "uie"
EXACT_MATCH = "exact_match"
METRICS = (*KINDS, UIE, *GLUE_LABELS, EXACT_MATCH)

_GLUE_KIND = "GLUE"  # what recipes/glue/prepare.py writes into the column `kind`; `task` then names the GLUE task


class _AnswerMetric(evaluate.Metric):
    """A metric of texts; constructed directly, it works without a network."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=str(self.__doc__),
            citation="",
            inputs_description="predictions: list of str, the generated answers; references: list of str, as many.",
            features=datasets.Features({"predictions": text, "references": text}),
        )


class UIEF1(_AnswerMetric):
    """F1 of extraction answers: the dictionary of `score_answers`. `UIEF1("RE")` expects a head and a tail."""

    def _kind(self) -> str | None:
        return None if self.config_name == "default" else self.config_name  # "default" is evaluate's word for none

    def _info(self) -> evaluate.MetricInfo:
        check_kind(self._kind())
        return super()._info()

    def _compute(self, predictions: Sequence[str], references: Sequence[str], **_: Any) -> dict[str, float | int]:
        return score_answers(predictions, references, self._kind())


class GLUEText(_AnswerMetric):
    """Scores of one GLUE task, such as `GLUEText("cola")`: the dictionary of `score_glue`."""

    def _info(self) -> evaluate.MetricInfo:
        check_task(self.config_name)
        return super()._info()

    def _compute(self, predictions: Sequence[str], references: Sequence[str], **_: Any) -> dict[str, float | int]:
        return score_glue(self.config_name, predictions, references)


class ExactMatch(_AnswerMetric):
    """Share of answers that are the reference, case included, white space around both aside."""

    def _compute(self, predictions: Sequence[str], references: Sequence[str], **_: Any) -> dict[str, float | int]:
        check_answers(predictions, references)
        hits = sum(a.strip() == b.strip() for a, b in zip(predictions, references, strict=True))
        return {EXACT_MATCH: hits / len(predictions), "num_examples": len(predictions)}


def check_metric(metric: str) -> None:
    """Refuse a metric that is not there."""
    if metric not in METRICS:
        raise UserError(f"--metric {metric!r} is not known; choose one of {AUTO}, {', '.join(METRICS)}")


def score(metric: str, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float | int]:
    """Score answers."""
    check_metric(metric)
    # The functions behind the metrics are not called directly: what is published is what `evaluate` gives. An id of
    # its own keeps processes that score at the same time out of each other's cache files.
    if metric in GLUE_LABELS:
        computed = GLUEText(metric, keep_in_memory=True).compute
    elif metric == EXACT_MATCH:
        computed = ExactMatch(keep_in_memory=True).compute
    else:
        computed = UIEF1(None if metric == UIE else metric, keep_in_memory=True).compute
    # pyarrow takes only strings here; what is no string was refused when the records were read
    return dict(computed(predictions=list(predictions), references=list(references)))


def primary_score(metric: str) -> str:
    """The score that stands for a metric in tables and means: a key of what `score` gives."""
    check_metric(metric)
    if metric in GLUE_LABELS:
        return "accuracy" if GLUE_LABELS[metric] else "pearson"  # STS-B has numbers in place of labels
    return EXACT_MATCH if metric == EXACT_MATCH else "f1"


def choose_metric(metric: str, rows: Iterable[Mapping[str, Any]], label: str) -> str:
    """The metric of a data set."""
    if metric != AUTO:
        check_metric(metric)
        return metric
    names = sorted({_metric_of(row.get("kind"), row.get("task")) for row in rows})
    if names == [_metric_of(None, None)]:
        raise UserError(f"{label}: its records have no column `kind` that tells the metric; give --metric")
    if len(names) > 1:
        raise UserError(f"{label} mixes records of {' and '.join(names)}; split it by kind, or give --metric")
    if names[0] not in METRICS:
        raise UserError(f"{label}: its records are of {names[0]}, for which there is no metric; give --metric")
    return names[0]


def _metric_of(kind: Any, task: Any) -> str:
    # of GLUE the task is the metric, of the others the kind: their task names the data set
    if kind == _GLUE_KIND:
        return str(task) if task in GLUE_LABELS else f"the GLUE task {task!r}"
    return kind if kind in KINDS else f"the kind {kind!r}"
