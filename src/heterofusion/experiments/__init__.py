"""Experiments: runs of the recipes that are not made twice, the tables of their scores, and pictures."""

from heterofusion.experiments.runs import Run, RunArguments, Runs

__all__ = ["Run", "RunArguments", "Runs"]
