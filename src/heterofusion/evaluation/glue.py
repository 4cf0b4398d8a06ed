"""Scores of GLUE as verbalized question answering: greedy answers against the words that stand for the labels.

An answer is right if it is the label and nothing else; case, white space, and quotes or punctuation around it do not
count. An answer that is no label of the task does not parse: it is wrong in every score, and the share of such answers
is a score of its own.
"""

import re
from collections.abc import Sequence
from typing import Any

from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef

from heterofusion.evaluation.uie import check_answers
from heterofusion.runtime.errors import UserError

# The names GLUE gives its labels, in the order of its label numbers, as words. STS-B has a number from 0 to 5 instead.
GLUE_LABELS: dict[str, tuple[str, ...]] = {
    "cola": ("unacceptable", "acceptable"),
    "mnli": ("entailment", "neutral", "contradiction"),
    "mrpc": ("not equivalent", "equivalent"),
    "qnli": ("entailment", "not entailment"),
    "qqp": ("not duplicate", "duplicate"),
    "rte": ("entailment", "not entailment"),
    "sst2": ("negative", "positive"),
    "stsb": (),
    "wnli": ("not entailment", "entailment"),
}
MAX_SIMILARITY = 5.0  # of STS-B

_F1_OF = {"mrpc": "equivalent", "qqp": "duplicate"}
_EDGES = " .,;:!?\"'`\u201c\u201d\u2018\u2019\u00ab\u00bb()[]*"  # with curly quotes and guillemets
_NUMBER = re.compile(r"[0-9]+(\.[0-9]+)?")


def parse_label(text: str, labels: Sequence[str]) -> str | None:
    """The label that an answer is, whatever its case, white space and surrounding punctuation."""
    words = " ".join(text.lower().split()).strip(_EDGES)
    return words if words in labels else None


def parse_similarity(text: str) -> float | None:
    """The number from 0 to 5 that an answer is."""
    number = text.strip().rstrip(".")
    if not _NUMBER.fullmatch(number) or float(number) > MAX_SIMILARITY:
        return None
    return float(number)


def score_glue(task: str, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float | int]:
    """Scores of answers of a GLUE task; what `GLUEText(task).compute` returns.

    `accuracy` of the labels' words; for CoLA also `matthews_correlation`, for MRPC and QQP `f1` of `equivalent` and
    `duplicate`; for STS-B `pearson` and `spearman` alone. What is undefined is 0. `format_failure_rate` is the share
    of predictions that are no label, or no number from 0 to 5; `num_examples` their number.
    """
    if task not in GLUE_LABELS:
        raise UserError(f"{task!r} is no GLUE task; choose one of {', '.join(GLUE_LABELS)}")
    check_answers(predictions, references)
    labels = GLUE_LABELS[task]
    parse: Any = (lambda text: parse_label(text, labels)) if labels else parse_similarity
    expected = [parse(reference) for reference in references]
    if None in expected:
        index = expected.index(None)
        wanted = f"one of {', '.join(labels)}" if labels else "a number from 0 to 5"
        raise UserError(f"references[{index}] is {references[index]!r}; an answer of {task} must be {wanted}")
    found = [parse(prediction) for prediction in predictions]
    scores = _label_scores(task, found, expected) if labels else _similarity_scores(found, expected)
    return {**scores, "format_failure_rate": found.count(None) / len(found), "num_examples": len(found)}


def _label_scores(task: str, found: list[str | None], expected: list[str]) -> dict[str, float]:
    scores = {"accuracy": sum(a == b for a, b in zip(found, expected, strict=True)) / len(found)}
    if task == "cola":
        # An answer that does not parse is a class of its own: never right, and no vote for the other label either.
        answers = [label or "" for label in found]
        varied = len(set(answers)) > 1 and len(set(expected)) > 1
        scores["matthews_correlation"] = float(matthews_corrcoef(expected, answers)) if varied else 0.0
    if task in _F1_OF:
        wanted = [label == _F1_OF[task] for label in expected]
        # An answer that does not parse is wrong: taken for the other label, it cannot raise F1 by saying nothing.
        got = [label == _F1_OF[task] if label else not right for right, label in zip(wanted, found, strict=True)]
        scores["f1"] = float(f1_score(wanted, got, zero_division=0.0))
    return scores


def _similarity_scores(found: list[float | None], expected: list[float]) -> dict[str, float]:
    # The middle of the scale says nothing; any other number in place of an answer would be a guess, good or bad.
    answers = [MAX_SIMILARITY / 2 if number is None else number for number in found]
    if len(set(answers)) == 1 or len(set(expected)) == 1:
        return {"pearson": 0.0, "spearman": 0.0}
    measures = {"pearson": pearsonr, "spearman": spearmanr}
    return {name: float(measure(answers, expected).statistic) for name, measure in measures.items()}
