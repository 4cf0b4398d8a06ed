"""Flags of a merge. Those of the hyper-parameters come from the fields of the rules."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from heterofusion.evaluation.datasets import EvalDataArguments
from heterofusion.experts.generation import GenerationArguments
from heterofusion.merging.rules import RULES, make_rule
from heterofusion.merging.rules.rule import Rule
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.flags import check_ranges, flag


@dataclass
class MergeArguments:
    """The experts, how they are merged, and where the result goes."""

    model_name_or_path: str = flag(help="Base model of the experts: local folder or Hub id.")
    output_dir: str = flag(help="Folder for the adapter; of emr, for a folder per expert.")
    adapters: list[str] = flag(
        default_factory=list,
        help="LoRA experts on the base, two at least: local folders or Hub ids. The first one's tokenizer is kept.",
    )
    method: str = flag("task_arithmetic", help="How they are merged; the methods are listed above.", choices=[*RULES])
    weights: list[float] | None = flag(None, help="Factor of each expert's update; 1 by default.", range="(-inf, inf)")
    rank: int | None = flag(
        None,
        help="Highest rank of the result, to which it is cut by SVD; by default the sum of the experts' ranks.",
        range="[1, inf)",
    )
    search: list[str] = flag(
        default_factory=list,
        help="Hyper-parameters to choose by the mean score on the data, each name=start:stop:step (stop included) or "
        "name=value,value; of several, all combinations. lambda is merge_lambda.",
    )
    dense: bool = flag(
        False, help="Score the merged update itself too, before its rank is cut; holds the changed weights twice."
    )
    names: list[str] | None = flag(None, help="Of emr: a name of each expert's folder; by default its own.")
    dtype: str | None = flag(
        None,
        help="Dtype of the written weights; by default that of the experts, float32 if theirs differ.",
        choices=["float32", "bfloat16", "float16"],
    )
    overwrite: bool = flag(False, help="Write into an output_dir that is not empty; files of the same name go.")
    device: str = flag(
        "auto",
        help="Where experts are merged and scored; auto takes a GPU if there is one. CPU and GPU drop other entries.",
        choices=["auto", "cpu"],
    )
    model_revision: str | None = flag(None, help="Hub revision of the base model.")
    base_dtype: str | None = flag(
        None,
        help="Dtype of the base for scoring; by default bfloat16 on a GPU that has it, else float32.",
        choices=["auto", "float32", "bfloat16", "float16"],
    )
    trust_remote_code: bool = flag(False, help="Run model code from the Hub for the base.")

    def __post_init__(self) -> None:
        check_ranges(self)
        if len(self.adapters) < 2:
            raise UserError(f"--adapters names {len(self.adapters)}: give two experts at least")
        weights = self.weights or [1.0] * len(self.adapters)
        if len(weights) != len(self.adapters):
            raise UserError(f"--weights has {len(weights)} values for {len(self.adapters)} adapters: give one each")
        if not any(weights) or (self.method == "average" and abs(sum(weights)) < 1e-9):
            raise UserError(f"--weights is {weights}: not all may be 0, and average divides by their sum")


def _rule_flags() -> list[tuple[str, Any, Any]]:
    """Every hyper-parameter as an optional flag, whose help tells its default of each method that has it."""
    found: dict[str, tuple[Any, list[str]]] = {}
    for method, rule in RULES.items():
        for item in dataclasses.fields(rule):  # type: ignore[arg-type]
            found.setdefault(item.name, (item, []))[1].append(f"{method} {item.default}")
    return [
        (name, item.type | None, flag(None, help=f"{item.metadata['help']} By default: {', '.join(defaults)}."))
        for name, (item, defaults) in found.items()
    ]


RuleArguments = dataclasses.make_dataclass(
    "RuleArguments", _rule_flags(), namespace={"__doc__": "Hyper-parameters; each method takes its own."}
)


@dataclass
class MergeDataArguments(EvalDataArguments):
    """Validation data, if merges are scored."""

    def __post_init__(self) -> None:
        if self.dataset_name:
            super().__post_init__()


MERGE_ARGUMENTS = (MergeArguments, RuleArguments, MergeDataArguments, GenerationArguments)


def methods_text() -> str:
    """The methods by the first lines of their docstrings, for `--help`."""
    lines = (f"    {name:15}  {str(rule.__doc__).splitlines()[0]}" for name, rule in RULES.items())
    return "\n".join(["Methods:", *lines])


def search_candidates(entries: Sequence[str], method: str, given: Mapping[str, Any]) -> list[Rule]:
    """All combinations of `name=start:stop:step` and `name=value,value`; the given values alone without any."""
    values: dict[str, list[float]] = {}
    for entry in entries:
        key, _, text = entry.partition("=")
        name = "merge_lambda" if key == "lambda" else key
        if name == "seed" or name in given or name in values:
            raise UserError(f"--search {entry}: {name} is given too, or is a seed; leave it out")
        values[name] = _values(entry, text)
    names = sorted(values, key="merge_lambda".__eq__)  # innermost: those that differ in it alone share a merge
    rows = itertools.product(*(values[name] for name in names))
    return [make_rule(method, {**given, **dict(zip(names, row, strict=True))}) for row in rows]


def _values(entry: str, text: str) -> list[float]:
    try:
        if ":" in text:
            start, stop, step = map(float, text.split(":"))
            count = int((stop - start) / step + 1e-9) + 1  # the stop is included
            numbers = [round(start + i * step, 10) for i in range(count)]
        else:
            numbers = [float(part) for part in text.split(",")]
    except (ValueError, ArithmeticError):
        numbers = []
    if not numbers:
        raise UserError(f"--search {entry}: write name=start:stop:step, rising, or name=value,value")
    return list(dict.fromkeys(numbers))
