"""The ten ways to merge, by the names of `recipes/merge.py --method`.

A rule is a frozen dataclass: its fields are its hyper-parameters and become flags, its docstring has the formula and
the paper; the first line of it is shown by `--help`.
"""

from collections.abc import Mapping
from typing import Any

from heterofusion.merging.rules.emr import Emr
from heterofusion.merging.rules.knots import KnotsDare, KnotsTies
from heterofusion.merging.rules.linear import Average, TaskArithmetic
from heterofusion.merging.rules.rule import Rule
from heterofusion.merging.rules.sparse import Breadcrumbs, Dare, DareTies, Della, Ties
from heterofusion.runtime.errors import UserError

RULES: dict[str, type[Rule]] = {
    "average": Average, "task_arithmetic": TaskArithmetic, "ties": Ties, "dare": Dare, "dare_ties": DareTies,
    "della": Della, "breadcrumbs": Breadcrumbs, "emr": Emr, "knots_ties": KnotsTies, "knots_dare": KnotsDare,
}  # fmt: skip


def make_rule(method: str, values: Mapping[str, Any]) -> Rule:
    """A rule with some of its hyper-parameters given, the others those of its authors."""
    known = vars(RULES[method]())
    for name in values.keys() - known:
        listed = ", ".join(f"--{name}" for name in known) or "none"
        raise UserError(f"--{name} {values[name]}: the hyper-parameters of {method} are {listed}; leave it out")
    return RULES[method](**values)
