"""An ensemble as a row of an evaluation: `recipes/eval.py --ensemble gac|unite`."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from heterofusion.adapters.config import AdapterError
from heterofusion.evaluation.arguments import EnsembleArguments, EvalArguments
from heterofusion.evaluation.datasets import EvalSet, check_references
from heterofusion.evaluation.rows import AnswerSource, Lineup, adapter_name
from heterofusion.experts.examples import Prompts
from heterofusion.experts.expert import BaseArguments, Expert, ExpertRunner, find_expert
from heterofusion.experts.generation import GenerationArguments, padding_id, stop_ids
from heterofusion.publish.record import made_by
from heterofusion.rivals.codec import AnswerCodec
from heterofusion.rivals.ensemble import EnsembleGenerator, Member
from heterofusion.rivals.voting import GaC, Union, UniTE
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.files import display_name

logger = logging.getLogger(__name__)

KIND = "ensemble"  # in `made_by`


def ensemble_lineup(arguments: EvalArguments, device: torch.device) -> Lineup:
    """One row: the adapters of the flags, each on its base, that answer together. Nothing is loaded yet.

    Args:
        arguments: The flags.
        device: Where all of the models go.

    Raises:
        UserError: A flag does not apply to ensembles, or a member is not usable.
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
    experts = [
        find_member(model.base(base, model.model_revision), adapter, revision, generation, model.merge_adapters)
        for base, adapter, revision in zip(bases, model.adapters, model.revisions(), strict=True)
    ]
    row = EnsembleRow(name, display_name(model.model_name_or_path), experts, ensemble, generation, device)
    state = {
        "ensemble": method,
        "unite_top_k": ensemble.unite_top_k if method == "unite" else None,
        "members": len(experts),
        **{f"member {number}": expert.identity() for number, expert in enumerate(experts, start=1)},
    }
    return Lineup([row], state)


def find_member(
    base: BaseArguments, adapter: str, revision: str | None, generation: GenerationArguments, merged: bool
) -> Expert:
    """An expert that can be a member, checked as far as that goes without its weights."""
    expert = find_expert(base, adapter, revision, generation=generation, merged=merged)
    if expert.adapter is not None and expert.adapter.config.is_prompt_learning:
        raise AdapterError(
            f"adapter {adapter} puts tokens before the prompt, which no member of an ensemble can; name a LoRA "
            "adapter, or evaluate it alone"
        )
    layers = DynamicCache(config=expert.config.get_text_config()).layers
    if any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers):
        raise UserError(
            f"base model {base.model_name_or_path} keeps a running state in place of keys and values, which cannot be "
            "cropped where a text is tokenized anew; no ensemble can have it as a member"
        )
    padding_id(expert.tokenizer)
    return expert


class EnsembleRow:
    """Models that answer all data sets together, as a row of an evaluation."""

    def __init__(
        self,
        name: str,
        base_model: str,
        experts: Sequence[Expert],
        ensemble: EnsembleArguments,
        generation: GenerationArguments,
        device: torch.device,
    ) -> None:
        self.name, self.base_model = name, base_model
        self.experts, self.ensemble, self.generation, self.device = experts, ensemble, generation, device
        self.codecs = [AnswerCodec(expert.tokenizer, expert.config.get_text_config().vocab_size) for expert in experts]
        self.runners = [ExpertRunner(device) for _ in experts]  # all bases are in memory at once
        self.limit = min((expert.limit for expert in experts if expert.limit is not None), default=None)

    def encode(self, sets: Sequence[EvalSet]) -> dict[str, Prompts]:
        """The prompts of all data sets, by label: ids of every member, the text of the first one."""
        return {examples.label: self._encode(examples) for examples in sets}

    def _encode(self, examples: EvalSet) -> Prompts:
        members = [expert.encode(examples) for expert in self.experts]
        check_references(examples, members[0])
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
        """Load all bases."""
        for runner, expert in zip(self.runners, self.experts, strict=True):
            runner.load(expert.base)

    def answering(self, labels: Sequence[str]) -> Iterator[tuple[str, AnswerSource]]:
        """The ensemble, for each data set; its models are there until all are answered."""
        with ExitStack() as stack:
            pairs = zip(self.runners, self.experts, strict=True)
            generator = self._generator([stack.enter_context(runner.running(expert)) for runner, expert in pairs])
            for label in labels:
                yield label, generator
            run, needed = sum(generator.tokens_run), sum(generator.tokens_needed)
            logger.info("%s: all members ran %d tokens, %.2f times what was written", self.name, run, run / needed)

    def _generator(self, models: Sequence[Any]) -> EnsembleGenerator:
        stops = [stop_ids(model, expert.tokenizer) for model, expert in zip(models, self.experts, strict=True)]
        union = Union(self.codecs, stops, self.device)
        vote = GaC(union) if self.ensemble.ensemble == "gac" else UniTE(union, self.codecs, self.ensemble.unite_top_k)
        members = [
            Member(model, codec, padding_id(expert.tokenizer), expert.context)
            for model, codec, expert in zip(models, self.codecs, self.experts, strict=True)
        ]
        generation = self.generation
        return EnsembleGenerator(members, union, vote, generation.max_new_tokens, generation.fixed_batch_size())

    def record(self) -> dict[str, Any]:
        """What `results.json` tells of what answered; with `members`."""
        return {
            "base_model": self.base_model,
            "adapter": None,
            "members": [
                {
                    "base_model": display_name(expert.base.model_name_or_path),
                    "adapter": adapter_name(expert.adapter),
                }
                for expert in self.experts
            ],
            "fusion": None,
            # it costs nothing to make; what it costs are its answers
            "made_by": made_by(KIND, str(self.ensemble.ensemble), {"seconds": 0.0}, ran_source_models=True),
            "models_at_inference": len(self.experts),
            "needs_task_id": False,
        }
