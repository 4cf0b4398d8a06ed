"""Rules of merging: one file per family, listed here by the names of `recipes/merge.py --method`."""

from heterofusion.merging.rules.breadcrumbs import Breadcrumbs
from heterofusion.merging.rules.dropping import Dare, DareTies, Della
from heterofusion.merging.rules.emr import Emr
from heterofusion.merging.rules.knots import KnotsDare, KnotsTies
from heterofusion.merging.rules.linear import Average, TaskArithmetic
from heterofusion.merging.rules.rule import Rule
from heterofusion.merging.rules.ties import Ties

RULES: dict[str, type[Rule]] = {
    "average": Average,
    "task_arithmetic": TaskArithmetic,
    "ties": Ties,
    "dare": Dare,
    "dare_ties": DareTies,
    "della": Della,
    "breadcrumbs": Breadcrumbs,
    "emr": Emr,
    "knots_ties": KnotsTies,
    "knots_dare": KnotsDare,
}
