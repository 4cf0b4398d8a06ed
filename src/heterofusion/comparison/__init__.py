"""Methods side by side under the same conditions: searched hyper-parameters, several seeds, one table."""

from heterofusion.comparison.collect import COMPARISON_FILE, collect, comparison_row
from heterofusion.comparison.data import check_apart, check_datasets
from heterofusion.comparison.making import finished_folders, lost_methods, make, run_unblocked
from heterofusion.comparison.plan import SECTIONS, Comparison, Method, plan_comparison
from heterofusion.comparison.runs import choose, final_runs, made_runs, search_runs

__all__ = [
    "COMPARISON_FILE",
    "SECTIONS",
    "Comparison",
    "Method",
    "check_apart",
    "check_datasets",
    "choose",
    "collect",
    "comparison_row",
    "final_runs",
    "finished_folders",
    "lost_methods",
    "made_runs",
    "make",
    "plan_comparison",
    "run_unblocked",
    "search_runs",
]
