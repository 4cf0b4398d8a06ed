"""Evaluation of greedy answers: F1 of extraction tasks, and GLUE as verbalized question answering."""

from heterofusion.evaluation.generation import generate_answers
from heterofusion.evaluation.glue import GLUE_LABELS, GLUEText, parse_label, parse_similarity, score_glue
from heterofusion.evaluation.uie import UIEF1, normalize, parse_items, score_answers

__all__ = [
    "GLUE_LABELS",
    "UIEF1",
    "GLUEText",
    "generate_answers",
    "normalize",
    "parse_items",
    "parse_label",
    "parse_similarity",
    "score_answers",
    "score_glue",
]
