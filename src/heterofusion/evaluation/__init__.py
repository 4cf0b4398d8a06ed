"""Evaluation of greedy answers: F1 of extraction tasks, GLUE as verbalized question answering, exact match.

Imported here is what other programs use: the metrics and batched generation. `recipes/eval.py` runs `runner.py`.
"""

from heterofusion.evaluation.generation import Answer, AnswerGenerator, generate_answers
from heterofusion.evaluation.glue import GLUE_LABELS, GLUEText, parse_label, parse_similarity, score_glue
from heterofusion.evaluation.metrics import ExactMatch, primary_score, score
from heterofusion.evaluation.uie import UIEF1, normalize, parse_items, score_answers

__all__ = [
    "GLUE_LABELS",
    "UIEF1",
    "Answer",
    "AnswerGenerator",
    "ExactMatch",
    "GLUEText",
    "generate_answers",
    "normalize",
    "parse_items",
    "parse_label",
    "parse_similarity",
    "primary_score",
    "score",
    "score_answers",
    "score_glue",
]
