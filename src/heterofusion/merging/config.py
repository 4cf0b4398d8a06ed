"""Flags of a merge. Those of the hyper-parameters come from the fields of the rules."""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from heterofusion.evaluation.datasets import EvalDataArguments
from heterofusion.experts.expert import BaseArguments
from heterofusion.experts.generation import GenerationArguments
from heterofusion.merging.rules import RULES, make_rule
from heterofusion.merging.rules.rule import Rule
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.flags import check_ranges, flag

MAX_CANDIDATES = 1000  # more is a slip of the step


@dataclass
class MergeArguments:
    """The experts, how they are merged, and where the result goes."""

    model_name_or_path: str = flag(help="Base model of the experts: local folder or Hub id.")
    output_dir: str = flag(help="Folder for the adapter; of emr, for a folder per expert.")
    adapters: list[str] = flag(
        default_factory=list,
        help="LoRA experts on the base, two at least: local folders or Hub ids. The first one's tokenizer, if "
        "it has one, goes with the result.",
    )
    method: str = flag("task_arithmetic", help="How they are merged; the methods are listed above.", choices=[*RULES])
    weights: list[float] | None = flag(
        None, help="Factor of each expert's update, one per expert; 1 by default.", range="(-inf, inf)"
    )
    rank: int | None = flag(
        None,
        help="Highest rank of the result, to which it is cut by SVD; by default the sum of the experts' ranks, with "
        "which average, task_arithmetic and knots_* are exact.",
        range="[1, inf)",
    )
    search: list[str] = flag(
        default_factory=list,
        help="Hyper-parameters to choose by the mean score on the validation data, each name=start:stop:step "
        "(stop included) or name=value,value; of several, all combinations. lambda is merge_lambda.",
    )
    dense: bool = flag(
        False, help="Score the merged update itself too, before its rank is cut; holds the changed weights twice."
    )
    names: list[str] | None = flag(
        None, help="Of emr: names of the experts' folders, one per expert; by default the experts' own."
    )
    dtype: str | None = flag(
        None,
        help="Dtype of the written weights; by default that of the experts, float32 if theirs differ.",
        choices=["float32", "bfloat16", "float16"],
    )
    overwrite: bool = flag(
        False, help="Write into an output_dir that is not empty; records and files of the same name go."
    )
    device: str = flag(
        "auto",
        help="Where experts are merged and scored; auto takes a GPU if there is one. CPU and GPU drop other entries.",
        choices=["auto", "cpu", "cuda"],
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
        if self.weights is None:
            return
        if len(self.weights) != len(self.adapters):
            raise UserError(
                f"--weights has {len(self.weights)} values for {len(self.adapters)} adapters: give one each"
            )
        if not any(self.weights) or (self.method == "average" and abs(sum(self.weights)) < 1e-9):
            raise UserError(f"--weights is {self.weights}: not all may be 0, and average divides by their sum")

    def base(self, use_cpu: bool) -> BaseArguments:
        """The base as experts on it are loaded."""
        return BaseArguments(
            model_name_or_path=self.model_name_or_path,
            model_revision=self.model_revision,
            dtype=self.base_dtype,
            trust_remote_code=self.trust_remote_code,
            use_cpu=use_cpu,
        )


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
    """Validation data on which merges are scored; none is needed."""

    dataset_name: list[str] = flag(
        default_factory=list,
        help="Validation data sets: local .json, .jsonl, .csv or .parquet files, local folders, or ids on the "
        "Hub. Every merge is scored on all of them; of emr, each expert's adapter on its own, one per expert.",
    )

    def __post_init__(self) -> None:
        if self.dataset_name:
            super().__post_init__()


MERGE_ARGUMENTS = (MergeArguments, RuleArguments, MergeDataArguments, GenerationArguments)


def methods_text() -> str:
    """The methods by the first lines of their docstrings, for `--help`."""
    width = max(map(len, RULES))
    lines = (f"    {name:{width}}  {str(rule.__doc__).splitlines()[0]}" for name, rule in RULES.items())
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
    count = math.prod(map(len, values.values()))
    if count > MAX_CANDIDATES:
        raise UserError(f"--search has {count} combinations, more than {MAX_CANDIDATES}; give fewer values")
    rows = itertools.product(*values.values())
    return [make_rule(method, {**given, **dict(zip(values, row, strict=True))}) for row in rows]


def _values(entry: str, text: str) -> list[float]:
    parts = text.split(":")
    try:
        numbers = [float(part) for part in (parts if len(parts) > 1 else text.split(","))]
        if len(parts) > 1:
            start, stop, step = numbers
            count = int((stop - start) / step + 1e-9) + 1  # the stop is included
            numbers = [round(start + i * step, 10) for i in range(min(count, MAX_CANDIDATES + 1))]
    except (ValueError, ArithmeticError):
        numbers = []
    if len(set(numbers)) < max(len(numbers), 1):
        raise UserError(
            f"--search {entry}: write name=start:stop:step, rising, or name=value,value, all different numbers"
        )
    return numbers
