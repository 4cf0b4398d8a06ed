"""Flags of a merge. Those of the hyper-parameters come from the fields of the rules."""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from heterofusion.evaluation.datasets import EvalDataArguments
from heterofusion.experts.expert import BaseArguments
from heterofusion.experts.generation import GenerationArguments
from heterofusion.merging.rules import RULES
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
        help="Highest rank of the result; by default the sum of the experts' ranks, with which average, "
        "task_arithmetic and knots_* are exact. Less, and what other methods have beyond it, is cut by SVD.",
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
        help="Where experts are merged and scored; auto takes a GPU if there is one. What is dropped at random "
        "is drawn there, so CPU and GPU draw differently.",
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
        if self.names is not None and not self.per_task:
            raise UserError(f"--names: {self.method} writes one adapter, into --output_dir; leave it out")
        if self.weights is not None and self.per_task:
            raise UserError(f"--weights: {self.method} has none, it scales by itself; leave it out")
        for name in ("names", "weights"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.adapters):
                raise UserError(
                    f"--{name} has {len(values)} values, but --adapters has {len(self.adapters)}: give one each"
                )
        if self.weights is not None and not any(self.weights):
            raise UserError(f"--weights is {self.weights}: give numbers that are not all 0")
        if self.weights is not None and self.method == "average" and abs(sum(self.weights)) < 1e-9:
            raise UserError(f"--weights is {self.weights}: average divides by their sum, which is 0")

    @property
    def per_task(self) -> bool:
        """Whether the method gives an adapter per expert."""
        return RULES[self.method].per_task

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
    """Every hyper-parameter as an optional flag, whose help says of which methods it is, with their defaults."""
    kinds: dict[str, Any] = {}
    helps: dict[str, dict[str, list[str]]] = {}
    for method, rule in RULES.items():
        for item in dataclasses.fields(rule):  # type: ignore[arg-type]
            kinds[item.name] = item.type
            text = f"{item.metadata['help']} In {item.metadata['range']}."
            helps.setdefault(item.name, {}).setdefault(text, []).append(f"{method} {item.default}")
    flags = []
    for name, texts in helps.items():
        told = " ".join(f"{text} By default: {', '.join(uses)}." for text, uses in texts.items())
        flags.append((name, kinds[name] | None, field(default=None, metadata={"help": told})))
    return flags


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


def methods_text() -> str:
    """The methods by the first lines of their docstrings, for `--help`."""
    width = max(map(len, RULES))
    lines = (f"    {name:{width}}  {str(rule.__doc__).splitlines()[0]}" for name, rule in RULES.items())
    return "\n".join(["Methods:", *lines])


def make_rule(method: str, values: Mapping[str, Any]) -> Rule:
    """A rule with some of its hyper-parameters given, the others those of its authors."""
    known = [item.name for item in dataclasses.fields(RULES[method])]  # type: ignore[arg-type]
    listed = "the hyper-parameters " + ", ".join(f"--{name}" for name in known) if known else "no hyper-parameters"
    for name, value in values.items():
        if name not in known:
            raise UserError(f"--{name} {value}: {method} has {listed}; leave it out")
    return RULES[method](**values)


def hyperparameters(rule: Rule) -> dict[str, float]:
    """The values of a rule, its seed aside."""
    return {name: value for name, value in vars(rule).items() if name != "seed"}


def search_candidates(entries: Sequence[str], method: str, given: Mapping[str, Any]) -> list[Rule]:
    """All combinations of `name=start:stop:step` and `name=value,value`, the last name's changing fastest."""
    own = [*hyperparameters(RULES[method]())]
    values: dict[str, list[float]] = {}
    for entry in entries:
        key, sign, text = entry.partition("=")
        name = "merge_lambda" if key == "lambda" else key
        if not sign:
            raise UserError(
                f"--search has {entry!r}: write name=start:stop:step or name=value,value, such as lambda=0.1,0.2"
            )
        if name not in own:
            raise UserError(f"--search {entry}: {method} has {', '.join(own) or 'no hyper-parameters'}")
        if name in given or name in values:
            raise UserError(f"--search {entry}: --{name} is given too; leave one out")
        values[name] = _values(entry, text)
    if not values:
        return []
    count = math.prod(map(len, values.values()))
    if count > MAX_CANDIDATES:
        raise UserError(f"--search has {count} combinations, more than {MAX_CANDIDATES}; give fewer values")
    return [
        make_rule(method, {**given, **dict(zip(values, row, strict=True))})
        for row in itertools.product(*values.values())
    ]


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
        raise UserError(f"--search {entry}: give start:stop:step, rising, or value,value, all different numbers")
    return numbers


MERGE_ARGUMENTS = (MergeArguments, RuleArguments, MergeDataArguments, GenerationArguments)
