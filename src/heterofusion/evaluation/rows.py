"""Rows of results: the flags of an evaluation, and who answers which data set."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from heterofusion.evaluation.datasets import EvalDataArguments, check_file_names
from heterofusion.evaluation.results import common_made_by, made_record
from heterofusion.experts.answering import Answerer, ExpertAnswerer
from heterofusion.experts.expert import NO_ADAPTER, BaseArguments, Expert, ExpertRunner, find_expert
from heterofusion.experts.generation import GenerationArguments
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.files import display_name
from heterofusion.runtime.flags import flag

BASE_NAME = "base"
PER_DATASET_NAME = "adapter_per_dataset"  # of the row, without --name


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
        if not self.adapters or not all(self.adapters):
            raise UserError(f"--adapters has an empty name; write {NO_ADAPTER} for the base model alone")
        if self.merge_adapters and (self.load_in_4bit or self.load_in_8bit):
            raise UserError("--merge_adapters would round an adapter to the bits of a quantized base: leave it out")
        if self.adapter_revision is not None and len(self.adapter_revision) not in (1, len(self.adapters)):
            count = len(self.adapter_revision)
            raise UserError(f"--adapter_revision has {count} values: give one for all, or one per adapter")

    def revisions(self) -> list[str | None]:
        """The Hub revisions of the adapters, one each."""
        revisions: list[str | None] = [None] if self.adapter_revision is None else [*self.adapter_revision]
        return revisions * len(self.adapters) if len(revisions) == 1 else revisions


@dataclass
class EvalOutputArguments:
    """Where results go, and how reports call them."""

    output_dir: str = flag(help="Folder for results.json and the predictions.")
    resume: bool = flag(False, help="Go on with the evaluation of the same settings that output_dir holds.")
    overwrite: bool = flag(False, help="Write over what an earlier evaluation left in output_dir.")
    name: str | None = flag(None, help="Name of the row, for one adapter; by default the adapter's, or base.")
    names: list[str] | None = flag(None, help="One name per adapter, for its folder and row; by default its own.")
    labels: list[str] = flag(default_factory=list, help="Labels key=value by which reports group results.")

    def __post_init__(self) -> None:
        if self.resume and self.overwrite:
            raise UserError("--resume and --overwrite exclude each other; choose one")
        self.label_values()

    def label_values(self) -> dict[str, str]:
        """The labels as a dictionary."""
        values: dict[str, str] = {}
        for label in self.labels:
            key, sign, value = label.partition("=")
            if not (key.strip() and sign):
                raise UserError(f"--labels has {label!r}; write key=value, such as seed=0")
            if key in values:
                raise UserError(f"--labels has the key {key!r} twice; give it once")
            values[key] = value
        return values

    def adapter_names(self, adapters: list[str]) -> list[str]:
        """Names of the adapters, one each, for folders and rows."""
        if self.name is not None and len(adapters) > 1:
            raise UserError(f"--name is for one adapter, but --adapters has {len(adapters)}; give --names, one each")
        names = self.names or [BASE_NAME if a == NO_ADAPTER else Path(a).expanduser().resolve().name for a in adapters]
        return check_file_names(names, adapters, "adapter", "names") if self.name is None else [self.name]

    def row_name(self, default: str, flag: str) -> str:
        """The name of a row into which a flag puts several adapters."""
        if self.names is not None:
            raise UserError(f"--names names adapters, but {flag} puts all of them into one row; give --name instead")
        return self.name or default


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
    labels = data.labels()
    if model.adapter_per_dataset:
        name = output.row_name(PER_DATASET_NAME, "--adapter_per_dataset")
        if len(model.adapters) != len(labels):
            raise UserError(
                f"--adapter_per_dataset: --adapters has {len(model.adapters)} values, but --dataset_name has "
                f"{len(labels)}; give one adapter per data set, in the same order"
            )
        names: list[str | None] = [None] * len(labels)
    else:
        names = [*output.adapter_names(model.adapters)]
    runner = ExpertRunner(device)
    experts = [
        find_expert(model.base(), adapter, revision, own, generation, model.merge_adapters)
        for adapter, revision, own in zip(model.adapters, model.revisions(), names, strict=True)
    ]
    answerers = [ExpertAnswerer(**vars(expert), runner=runner, generation=generation) for expert in experts]
    told = {"base_model": display_name(model.model_name_or_path), "models_at_inference": 1}
    if not model.adapter_per_dataset:
        return [
            Row(
                expert.name,
                dict.fromkeys(labels, answerer),
                {**told, "adapter": adapter_record(expert), **made_record(expert.adapter), "needs_task_id": False},
            )
            for expert, answerer in zip(experts, answerers, strict=True)
        ]
    record = {
        **told,
        "adapter": None,
        "adapters": {label: adapter_record(expert) for label, expert in zip(labels, experts, strict=True)},
        "fusion": None,
        "made_by": common_made_by([made_record(expert.adapter)["made_by"] for expert in experts]),
        "needs_task_id": True,
    }
    return [Row(name, dict(zip(labels, answerers, strict=True)), record)]


def adapter_record(expert: Expert) -> dict[str, str] | None:
    """What results call an adapter."""
    adapter = expert.adapter
    return {"name": display_name(adapter.given), "sha256": adapter.sha256} if adapter else None
