"""Rows of results: the flags of an evaluation, and who answers which data set."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from heterofusion.data.replay import match_lists, nth
from heterofusion.evaluation.datasets import EvalDataArguments, check_file_names
from heterofusion.evaluation.results import made_by
from heterofusion.experts.answering import Answerer, ExpertAnswerer
from heterofusion.experts.expert import NO_ADAPTER, BaseArguments, Expert, ExpertRunner, find_expert
from heterofusion.experts.generation import GenerationArguments
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.files import display_name
from heterofusion.runtime.flags import flag

BASE_NAME = "base"


@dataclass
class EvalModelArguments(BaseArguments):
    """What is evaluated: a base model and adapters on it."""

    model_name_or_path: str = flag(help="Base model of the adapters: local folder or Hub id.")
    adapters: list[str] = flag(
        default_factory=lambda: [NO_ADAPTER],
        help="PEFT adapters to evaluate: local folders or Hub ids; the word none, the default, is the base alone.",
    )
    adapter_revision: list[str] | None = flag(None, help="Hub revision: one for all, or one per adapter.")
    merge_adapters: bool = flag(
        False,
        help="Merge adapters into the base first: two to four times faster on a GPU; bfloat16 rounds once more.",
    )
    adapter_per_dataset: bool = flag(
        False,
        help="Give each data set an adapter of its own, in one row: the first of --adapters answers the first of "
        "--dataset_name alone, and so on.",
    )

    def __post_init__(self) -> None:
        match_lists(self, "adapters", "adapter_revision")
        if self.merge_adapters and (self.load_in_4bit or self.load_in_8bit):
            raise UserError("--merge_adapters would round an adapter to the bits of a quantized base: leave it out")


@dataclass
class EvalOutputArguments:
    """Where results go, and how reports call them."""

    output_dir: str = flag(help="Folder for results.json and the predictions.")
    resume: bool = flag(False, help="Go on with the evaluation of the same settings that output_dir holds.")
    overwrite: bool = flag(False, help="Write over what an earlier evaluation left in output_dir.")
    names: list[str] | None = flag(
        None, help="Name of each row, and of its folder if there are several; by default the adapter's, or base."
    )
    labels: list[str] = flag(default_factory=list, help="Labels key=value by which reports group results.")

    def __post_init__(self) -> None:
        if self.resume and self.overwrite:
            raise UserError("--resume and --overwrite exclude each other; choose one")
        self.label_values()

    def label_values(self) -> dict[str, str]:
        """The labels as a dictionary."""
        pairs = [label.partition("=") for label in self.labels]
        if not all(key.strip() and sign for key, sign, _ in pairs):
            raise UserError(f"--labels is {self.labels}; write each as key=value, such as seed=0")
        return {key: value for key, _, value in pairs}

    def row_names(self, rows: Sequence[str]) -> list[str]:
        """Names of rows, one each."""
        names = self.names or [*rows]
        return names if len(names) == len(rows) == 1 else check_file_names(names, rows, "row", "names")


class EvalArguments(NamedTuple):
    """What every evaluation needs, in the order of the flags."""

    model: EvalModelArguments
    data: EvalDataArguments
    generation: GenerationArguments
    output: EvalOutputArguments


EVAL_ARGUMENTS = (EvalModelArguments, EvalDataArguments, GenerationArguments, EvalOutputArguments)


@dataclass(frozen=True)
class Row:
    """One row of results."""

    name: str
    answerers: Mapping[str, Answerer]  # by data set
    record: dict[str, Any]  # what results tell of it: `base_model`, `adapter`, `made_by`, ...


def expert_rows(arguments: EvalArguments, device: torch.device) -> list[Row]:
    """Adapters on one base: a row each or, with `--adapter_per_dataset`, one in which each answers its data set."""
    model, data, generation, output = arguments
    labels, runner = data.labels(), ExpertRunner(device)
    own = [BASE_NAME if name == NO_ADAPTER else Path(name).expanduser().resolve().name for name in model.adapters]
    names = output.row_names(["adapter_per_dataset"] if model.adapter_per_dataset else own)
    if model.adapter_per_dataset and len(own) != len(labels):
        counts = f"--adapters has {len(own)} values, but --dataset_name has {len(labels)}"
        raise UserError(f"--adapter_per_dataset: {counts}; give one adapter per data set, in the same order")
    experts = [
        find_expert(model.base(), adapter, nth(model.adapter_revision, i), own[i], generation, model.merge_adapters)
        for i, adapter in enumerate(model.adapters)
    ]
    answerers = [ExpertAnswerer(**vars(expert), runner=runner, generation=generation) for expert in experts]
    told = {"base_model": display_name(model.model_name_or_path), "models_at_inference": 1}
    if model.adapter_per_dataset:
        record = {
            **told,
            "adapter": None,
            "adapters": dict(zip(labels, map(adapter_record, experts), strict=True)),
            "made_by": made_by(*(expert.adapter for expert in experts)),
            "needs_task_id": True,
        }
        return [Row(names[0], dict(zip(labels, answerers, strict=True)), record)]
    rows = []
    for name, expert, answerer in zip(names, experts, answerers, strict=True):
        made = made_by(expert.adapter)
        record = {**told, "adapter": adapter_record(expert), "made_by": made, "needs_task_id": False}
        rows.append(Row(name, dict.fromkeys(labels, answerer), record))
    return rows


def adapter_record(expert: Expert) -> dict[str, str] | None:
    """What results call an adapter."""
    adapter = expert.adapter
    return {"name": display_name(adapter.given), "sha256": adapter.sha256} if adapter else None
