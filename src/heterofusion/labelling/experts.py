"""The anchor and the sources of a labelling, found and checked."""

from __future__ import annotations

from heterofusion.data.labels import ANCHOR
from heterofusion.experts.expert import BaseArguments, Expert, find_expert
from heterofusion.experts.generation import GenerationArguments
from heterofusion.labelling.arguments import LabelModelArguments
from heterofusion.runtime.errors import UserError


def find_experts(args: LabelModelArguments, generation: GenerationArguments) -> tuple[Expert | None, list[Expert]]:
    """The anchor, if there is one, and the sources in order; adapters fit their bases."""
    anchor = None
    if args.target_adapter is not None:
        base = args.how(args.model_name_or_path, args.model_revision)
        anchor = _find(ANCHOR, base, args.target_adapter, generation, args.merge_adapters, args.target_revision)
    revisions = {args.model_name_or_path: args.model_revision}  # a source may be on the anchor's base
    sources = [
        _find(name, args.how(base, revisions.get(base)), adapter, generation, args.merge_adapters)
        for name, base, adapter in zip(args.names(), args.bases(), args.source_adapters, strict=True)
    ]
    return anchor, sources


def _find(
    name: str,
    base: BaseArguments,
    adapter: str,
    generation: GenerationArguments,
    merged: bool,
    revision: str | None = None,
) -> Expert:
    try:
        return find_expert(base, adapter, revision, name, generation, merged)
    except UserError as error:
        if name == ANCHOR:
            raise UserError(f"{name}: {error}") from error
        raise UserError(f"source {name}: {str(error).replace('--model_name_or_path', '--source_models')}") from error
