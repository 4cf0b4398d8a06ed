"""Sweeps: one YAML file describes many runs of the recipes; they are planned, run over a pool of GPUs and resumed."""

from heterofusion.sweeps.pool import Pool, is_finished, run_all
from heterofusion.sweeps.runs import MAKERS, RECIPES, Run, Step, check_step, read_sweep, with_config
from heterofusion.sweeps.template import Template

__all__ = [
    "MAKERS",
    "RECIPES",
    "Pool",
    "Run",
    "Step",
    "Template",
    "check_step",
    "is_finished",
    "read_sweep",
    "run_all",
    "with_config",
]
