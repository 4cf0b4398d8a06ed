"""Methods side by side under the same conditions: searched hyper-parameters, several seeds, one table."""

from heterofusion.comparison.collect import COMPARISON_FILE, collect, comparison_row
from heterofusion.comparison.data import check_apart
from heterofusion.comparison.plan import SECTIONS, Comparison, Method, plan_comparison
from heterofusion.comparison.runs import choose, final_runs, search_runs

__all__ = [
    "COMPARISON_FILE",
    "SECTIONS",
    "Comparison",
    "Method",
    "check_apart",
    "choose",
    "collect",
    "comparison_row",
    "final_runs",
    "plan_comparison",
    "search_runs",
]
