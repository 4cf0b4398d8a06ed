"""An ensemble as a row of an evaluation: `recipes/eval.py --ensemble gac|unite`."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from datasets import Dataset
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from heterofusion.adapters.config import AdapterError
from heterofusion.evaluation.arguments import EnsembleArguments, EvalArguments, EvalModelArguments, GenerationArguments
from heterofusion.evaluation.datasets import EvalSet, check_references
from heterofusion.evaluation.rows import AnswerSource, Lineup, adapter_hash, adapter_name, base_state
from heterofusion.experts.examples import Prompts, encode
from heterofusion.experts.generation import padding_id, stop_ids
from heterofusion.experts.models import (
    Adapter,
    Models,
    adapter_tokenizer,
    check_adapters,
    find_adapter,
    prompt_limit,
)
from heterofusion.publish.record import made_by
from heterofusion.rivals.codec import AnswerCodec
from heterofusion.rivals.ensemble import EnsembleGenerator, Member
from heterofusion.rivals.voting import GaC, Union, UniTE
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.files import display_name
from heterofusion.runtime.loading import check_token_ids

logger = logging.getLogger(__name__)

KIND = "ensemble"  # in `made_by`


def ensemble_lineup(arguments: EvalArguments, device: torch.device) -> Lineup:
    """One row: the adapters of the flags, each on its base, that answer together.

    Args:
        arguments: The flags.
        device: Where all of the models go.

    Returns:
        The row; nothing is loaded yet.

    Raises:
        AdapterError: An adapter is not usable, or does not fit its base.
        ValueError: A flag is not what it has to be, or does not apply to ensembles.
    """
    model, _, generation, output, ensemble = arguments
    method = str(ensemble.ensemble)
    bases = ensemble.bases(model)
    if model.adapter_per_dataset:
        raise UserError("--adapter_per_dataset and --ensemble exclude each other; choose one")
    if generation.cache_implementation != "dynamic":
        raise UserError(
            f"--cache_implementation {generation.cache_implementation} cannot be cropped, as --ensemble needs it; "
            "leave it out"
        )
    name = output.row_name(method, f"--ensemble {method}")
    parts = [
        _part(replace(model, model_name_or_path=base, adapters=[given], adapter_revision=None), revision, device)
        for base, given, revision in zip(bases, model.adapters, model.revisions(), strict=True)
    ]
    state = {
        "ensemble": method,
        "unite_top_k": ensemble.unite_top_k if method == "unite" else None,
        "members": len(parts),
        **{
            f"member {number}": {**base_state(part.args), "adapter": adapter_hash(part.adapter)}
            for number, part in enumerate(parts, start=1)
        },
    }
    return Lineup([EnsembleRow(name, parts, model, ensemble, generation)], state)


@dataclass
class Part:
    """What becomes a member of an ensemble.

    Args:
        args: Its base and how it is loaded.
        adapter: None for the base alone.
        config: The base's.
        models: Loads the base and puts the adapter on it.
        tokenizer: Of the adapter, else of the base.
        codec: Of the tokenizer.
    """

    args: EvalModelArguments
    adapter: Adapter | None
    config: PretrainedConfig
    models: Models
    tokenizer: Any
    codec: AnswerCodec

    @property
    def context(self) -> int | None:
        """Most tokens of prompt and answer."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)


def _part(args: EvalModelArguments, revision: str | None, device: torch.device) -> Part:
    """Check one member as far as that goes without its weights."""
    adapter = find_adapter(args.adapters[0], revision)
    config = check_adapters(args, [adapter])
    if adapter is not None and adapter.config.is_prompt_learning:
        raise AdapterError(
            f"adapter {adapter.given} puts tokens before the prompt, which no member of an ensemble can; name a LoRA "
            "adapter, or evaluate it alone"
        )
    layers = DynamicCache(config=config.get_text_config()).layers
    if any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers):
        raise UserError(
            f"base model {args.model_name_or_path} keeps a running state in place of keys and values, which cannot be "
            "cropped where a text is tokenized anew; no ensemble can have it as a member"
        )
    tokenizer = adapter_tokenizer(args, adapter)
    padding_id(tokenizer)
    codec = AnswerCodec(tokenizer, config.get_text_config().vocab_size)
    return Part(args, adapter, config, Models(args, device), tokenizer, codec)


class EnsembleRow:
    """Models that answer all data sets together, as a row of an evaluation.

    Args:
        name: Of the row.
        parts: The members.
        model: The flags that all members share.
        ensemble: The method.
        generation: How answers are generated.
    """

    def __init__(
        self,
        name: str,
        parts: Sequence[Part],
        model: EvalModelArguments,
        ensemble: EnsembleArguments,
        generation: GenerationArguments,
    ) -> None:
        self.name = name
        self.parts = parts
        self.model = model
        self.ensemble = ensemble
        self.generation = generation
        self.limit: int | None = None

    def encode(self, sets: Sequence[EvalSet]) -> dict[str, Prompts]:
        """The prompts of all data sets, by label: ids of every member, the text of the first one.

        Args:
            sets: The data sets.

        Raises:
            ValueError: As `heterofusion.experts.examples.encode`, or an answer leaves no room for a prompt.
        """
        generation = self.generation
        limits = [
            prompt_limit(part.config, generation.max_new_tokens, generation.max_prompt_length) for part in self.parts
        ]
        self.limit = min((limit for limit in limits if limit is not None), default=None)
        return {examples.label: self._encode(examples, limits) for examples in sets}

    def _encode(self, examples: EvalSet, limits: Sequence[int | None]) -> Prompts:
        members = []
        for part, limit in zip(self.parts, limits, strict=True):
            prompts = encode(examples, part.tokenizer, limit)
            check_references(examples, prompts)
            check_token_ids([Dataset.from_dict({"input_ids": prompts.ids})], part.config)
            members.append(prompts)
        texts = zip(*(prompts.texts for prompts in members), strict=True)
        split = sum(len({*row}) > len({text.rstrip(" ") for text in row}) for row in texts)
        if split:
            logger.warning(
                "in %d of %d prompts of %s the space before the answer is part of the prompt for some members only, "
                "as their tokenizers differ; these begin the answer after one space, or after two",
                split,
                len(members[0].texts),
                examples.label,
            )
        return Prompts(
            texts=members[0].texts,
            ids=[[*ids] for ids in zip(*(prompts.ids for prompts in members), strict=True)],
            lengths=[max(lengths) for lengths in zip(*(prompts.lengths for prompts in members), strict=True)],
            references=members[0].references,
            cut=max(prompts.cut for prompts in members),
        )

    def load(self) -> None:
        """Load all bases.

        Raises:
            ValueError: One cannot be loaded.
        """
        for part in self.parts:
            part.models.load()

    def answering(self, labels: Sequence[str]) -> Iterator[tuple[str, AnswerSource]]:
        """The ensemble, for each data set; its models are there until all are answered.

        Args:
            labels: Of the data sets.

        Raises:
            AdapterError: An adapter does not fit its base.
            ValueError: A base cannot be loaded.
        """
        with ExitStack() as stack:
            models = [stack.enter_context(part.models.with_adapter(part.adapter)) for part in self.parts]
            generator = self._generator(models)
            for label in labels:
                yield label, generator
            run, needed = sum(generator.tokens_run), sum(generator.tokens_needed)
            logger.info("%s: all members ran %d tokens, %.2f times what was written", self.name, run, run / needed)

    def _generator(self, models: Sequence[Any]) -> EnsembleGenerator:
        codecs = [part.codec for part in self.parts]
        stops = [stop_ids(model, part.tokenizer) for model, part in zip(models, self.parts, strict=True)]
        union = Union(codecs, stops, self.parts[0].models.device)
        vote = GaC(union) if self.ensemble.ensemble == "gac" else UniTE(union, codecs, self.ensemble.unite_top_k)
        members = [
            Member(model, part.codec, padding_id(part.tokenizer), part.context)
            for model, part in zip(models, self.parts, strict=True)
        ]
        generation = self.generation
        return EnsembleGenerator(members, union, vote, generation.max_new_tokens, generation.fixed_batch_size())

    def record(self) -> dict[str, Any]:
        """What `results.json` tells of what answered; with `members`."""
        return {
            "base_model": display_name(self.model.model_name_or_path),
            "adapter": None,
            "members": [
                {"base_model": display_name(part.args.model_name_or_path), "adapter": adapter_name(part.adapter)}
                for part in self.parts
            ],
            "fusion": None,
            # it costs nothing to make; what it costs are its answers
            "made_by": made_by(KIND, str(self.ensemble.ensemble), {"seconds": 0.0}, ran_source_models=True),
            "models_at_inference": len(self.parts),
            "needs_task_id": False,
        }
