"""Flags of a labelling: who labels, and where labels go. Those of the tasks and of the routing are with these."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from heterofusion.data.labels import ANCHOR
from heterofusion.evaluation.datasets import check_file_names
from heterofusion.evaluation.rows import BASE_NAME
from heterofusion.experts.expert import NO_ADAPTER, BaseArguments, Expert, find_expert
from heterofusion.experts.generation import GenerationArguments
from heterofusion.labelling.routing import RoutingArguments
from heterofusion.labelling.tasks import LabelDataArguments
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.flags import check_ranges, flag


@dataclass
class LabelModelArguments(BaseArguments):
    """The source experts, and the anchor that they have to beat."""

    model_name_or_path: str = flag("", help="Base model of --target_adapter: local folder or Hub id.")
    target_adapter: str | None = flag(
        None,
        help="The fusion's target adapter (the anchor), which is scored beside the sources and may label; it "
        "may be left out where --routing names all tasks and gives none of them to it.",
    )
    target_revision: str | None = flag(None, help="Hub revision of the target adapter.")
    source_models: list[str] = flag(
        default_factory=list, help="Base models of the sources, of any family: one for each adapter, or one for all."
    )
    source_adapters: list[str] = flag(
        default_factory=list,
        help=f"The source experts: local folders or Hub ids of adapters; the word {NO_ADAPTER} is a base alone.",
    )
    source_names: list[str] | None = flag(
        None, help="One name per source, for tables, labels and --routing; by default the adapter's own."
    )
    merge_adapters: bool = flag(
        False,
        help="Merge each adapter into its base before it answers, which is faster on a GPU; in bfloat16 the "
        "weights are rounded once more, so answers may differ.",
    )

    def __post_init__(self) -> None:
        count = len(self.source_adapters)
        for name in ("source_models", "source_adapters"):
            if not getattr(self, name) or not all(getattr(self, name)):
                raise UserError(f"--{name} is missing or has an empty name: name at least one")
        if len(self.source_models) not in (1, count):
            raise UserError(
                f"--source_models has {len(self.source_models)} values, but --source_adapters has {count}: give one "
                "base per adapter, or one for all"
            )
        if self.target_adapter is not None and not self.model_name_or_path:
            raise UserError(f"--target_adapter {self.target_adapter} needs its base: give --model_name_or_path")
        if self.merge_adapters and (self.load_in_4bit or self.load_in_8bit):
            raise UserError("--merge_adapters would round an adapter to the bits of a quantized base: leave it out")
        self.names()

    def names(self) -> list[str]:
        """The sources' names, one each."""
        names = self.source_names or [
            BASE_NAME if adapter == NO_ADAPTER else Path(adapter).expanduser().resolve().name
            for adapter in self.source_adapters
        ]
        for name in (ANCHOR, NO_ADAPTER):
            if name in names:
                raise UserError(f"{name!r} cannot be the name of a source; give --source_names, one per source")
        return check_file_names(names, self.source_adapters, "source", "source_names")

    def experts(self, generation: GenerationArguments) -> dict[str, Expert]:
        """The sources in order and, if there is one, the anchor; files are in order and adapters fit their bases."""
        found = {}
        bases = self.source_models * (len(self.source_adapters) if len(self.source_models) == 1 else 1)
        for name, model, adapter in zip(self.names(), bases, self.source_adapters, strict=True):
            # a source may be on the anchor's base
            base = self.base(model, self.model_revision if model == self.model_name_or_path else None)
            try:
                found[name] = find_expert(base, adapter, None, name, generation, self.merge_adapters)
            except UserError as error:
                told = str(error).replace("--model_name_or_path", "--source_models")
                raise UserError(f"source {name}: {told}") from error
        if self.target_adapter is not None:
            args = (self.target_adapter, self.target_revision, ANCHOR, generation, self.merge_adapters)
            try:
                found[ANCHOR] = find_expert(self.base(), *args)
            except UserError as error:
                raise UserError(f"{ANCHOR}: {error}") from error
        return found


@dataclass
class LabelOutputArguments:
    """Where labels go, and what is kept of them."""

    output_dir: str = flag(help="Folder for the labels (one .jsonl file per task) and labels.json.")
    resume: bool = flag(
        False,
        help="Go on in an output_dir that is not empty: answers that are there, by the same models to the same "
        "whole set of prompts of a task with the same settings, are not generated again.",
    )
    overwrite: bool = flag(
        False, help="Write into an output_dir that is not empty; what an earlier run wrote there goes."
    )
    top_k_logits: int = flag(
        0,
        help="Also store the most probable tokens of the source at every position of its labels: how many of "
        "them, such as 10; 0 stores none. One process does it.",
        range="[0, inf)",
    )
    teacher_batch_size: int = flag(
        8, help="Labels per batch when --top_k_logits runs a source over them.", range="[1, inf)"
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.resume and self.overwrite:
            raise UserError("--resume and --overwrite exclude each other; choose one")


LABEL_ARGUMENTS = (
    LabelModelArguments,
    LabelDataArguments,
    RoutingArguments,
    GenerationArguments,
    LabelOutputArguments,
)


class LabelArguments(NamedTuple):
    """All flags of a labelling, in the order of `LABEL_ARGUMENTS`."""

    model: LabelModelArguments
    data: LabelDataArguments
    routing: RoutingArguments
    generation: GenerationArguments
    output: LabelOutputArguments
