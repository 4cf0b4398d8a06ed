"""Sweeps: one YAML file describes many runs of the recipes; they are planned, run over a pool of GPUs and resumed."""

from heterofusion.sweeps.pool import Pool, run_all
from heterofusion.sweeps.runs import MAKERS, RECIPES, Run, Step, read_sweep, with_config
from heterofusion.sweeps.template import Template

__all__ = ["MAKERS", "RECIPES", "Pool", "Run", "Step", "Template", "read_sweep", "run_all", "with_config"]
