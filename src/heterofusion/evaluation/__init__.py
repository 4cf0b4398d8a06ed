"""Evaluation of extraction models: greedy answers and their F1."""

from heterofusion.evaluation.generation import generate_answers
from heterofusion.evaluation.uie import UIEF1, normalize, parse_items, score_answers

__all__ = ["UIEF1", "generate_answers", "normalize", "parse_items", "score_answers"]
