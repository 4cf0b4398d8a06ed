"""Evaluation of greedy answers: F1 of extraction tasks, GLUE as verbalized question answering, exact match."""
