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
        help="The fusion's target adapter (the anchor), which sources have to beat; not needed where --routing "
        "gives all tasks to sources.",
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
        help="Merge each adapter into its base before it answers: faster on a GPU, and rounded once more.",
    )

    def __post_init__(self) -> None:
        if not self.source_models or not self.source_adapters:
            raise UserError("--source_models or --source_adapters is missing: name at least one of each")
        if len(self.source_models) not in (1, len(self.source_adapters)):
            raise UserError(
                f"--source_models has {len(self.source_models)} values, but --source_adapters has "
                f"{len(self.source_adapters)}: give one base per adapter, or one for all"
            )
        if self.target_adapter is not None and not self.model_name_or_path:
            raise UserError(f"--target_adapter {self.target_adapter} needs its base: give --model_name_or_path")
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
        models = self.source_models * (len(self.source_adapters) if len(self.source_models) == 1 else 1)
        # a source may be on the anchor's base
        bases = [self.base(m, self.model_revision if m == self.model_name_or_path else None) for m in models]
        given = [*zip(self.names(), bases, self.source_adapters, strict=True)]
        if self.target_adapter is not None:
            given.append((ANCHOR, self.base(), self.target_adapter))
        found = {}
        for name, base, adapter in given:
            revision = self.target_revision if name == ANCHOR else None
            try:
                found[name] = find_expert(base, adapter, revision, name, generation, self.merge_adapters)
            except UserError as error:
                what = name if name == ANCHOR else f"source {name} (--source_models, --source_adapters)"
                raise UserError(f"{what}: {error}") from error
        return found


@dataclass
class LabelOutputArguments:
    """Where labels go, and what is kept of them."""

    output_dir: str = flag(help="Folder for the labels (one .jsonl file per task) and labels.json.")
    resume: bool = flag(
        False,
        help="Go on in an output_dir that is not empty: answers of the same models to the same prompts are kept.",
    )
    overwrite: bool = flag(
        False, help="Write into an output_dir that is not empty; what an earlier run wrote there goes."
    )
    top_k_logits: int = flag(
        0,
        help="Also store that many of a source's most probable tokens at every position of its labels, such as 10.",
        range="[0, inf)",
    )
    teacher_batch_size: int = flag(
        8, help="Labels per batch when --top_k_logits runs a source over them.", range="[1, inf)"
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.resume and self.overwrite:
            raise UserError("--resume and --overwrite exclude each other; choose one")


class LabelArguments(NamedTuple):
    """All flags of a labelling."""

    model: LabelModelArguments
    data: LabelDataArguments
    routing: RoutingArguments
    generation: GenerationArguments
    output: LabelOutputArguments


LABEL_ARGUMENTS = tuple(LabelArguments.__annotations__.values())
