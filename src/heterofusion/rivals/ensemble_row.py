"""An ensemble as a row of an evaluation: `recipes/eval.py --ensemble gac|unite`."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from heterofusion.adapters.config import AdapterError
from heterofusion.data.replay import nth
from heterofusion.evaluation.rows import EvalArguments, EvalModelArguments, Row, adapter_record
from heterofusion.experts.answering import Questions
from heterofusion.experts.examples import Examples, Prompts
from heterofusion.experts.expert import BaseArguments, Expert, ExpertRunner, find_expert
from heterofusion.experts.generation import Answer, GenerationArguments, padding_id, stop_ids
from heterofusion.publish.record import make_record
from heterofusion.rivals.codec import AnswerCodec
from heterofusion.rivals.ensemble import EnsembleGenerator, Member
from heterofusion.rivals.voting import GaC, Union, UniTE
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.files import display_name
from heterofusion.runtime.flags import check_ranges, flag


@dataclass
class EnsembleArguments:
    """Models that answer together."""

    ensemble: str | None = flag(
        None,
        help="Let all of --adapters answer together, token by token, in one row of results: gac takes the mean of "
        "their next-token distributions, unite the mean over the union of their top tokens.",
        choices=["gac", "unite"],
    )
    ensemble_models: list[str] | None = flag(
        None,
        help="Base model of each of --adapters in an ensemble: local folders or Hub ids, --model_name_or_path "
        "among them; by default it is the base of all.",
    )
    unite_top_k: int = flag(
        10, help="Number of top tokens of each model that --ensemble unite takes.", range="[1, inf)"
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.ensemble is None and self.ensemble_models is not None:
            raise UserError("--ensemble_models is for ensembles; give --ensemble gac or unite, or leave it out")

    def settings(self) -> dict[str, Any]:
        """For results, without local paths."""
        models = self.ensemble_models and [display_name(name) for name in self.ensemble_models]
        return {**vars(self), "ensemble_models": models}

    def bases(self, model: EvalModelArguments) -> list[str]:
        """The base models of the members, one each."""
        count, models = len(model.adapters), self.ensemble_models
        if count < 2:
            raise UserError(f"--ensemble {self.ensemble} needs two members at least, but --adapters has {count}")
        if models is None:
            return [model.model_name_or_path] * count
        if len(models) != count or model.model_name_or_path not in models:
            raise UserError(
                f"--ensemble_models has {len(models)} values, but --adapters has {count}: give one base per adapter, "
                f"--model_name_or_path {model.model_name_or_path} among them"
            )
        return [*models]


def ensemble_rows(ensemble: EnsembleArguments, arguments: EvalArguments, device: torch.device) -> list[Row]:
    """One row: the adapters of the flags, each on its base, that answer together. Nothing is loaded yet."""
    model, data, generation, output = arguments
    method = str(ensemble.ensemble)
    bases = ensemble.bases(model)
    (name,) = output.row_names([method])
    revisions = [nth(model.adapter_revision, index) for index in range(len(bases))]
    experts = [
        find_member(model.base(base, model.model_revision), adapter, revision, generation, model.merge_adapters)
        for base, adapter, revision in zip(bases, model.adapters, revisions, strict=True)
    ]
    names = [display_name(expert.base.model_name_or_path) for expert in experts]
    record = {
        "base_model": display_name(model.model_name_or_path),
        "adapter": None,
        "members": [{"base_model": n, "adapter": adapter_record(e)} for n, e in zip(names, experts, strict=True)],
        # it costs nothing to make; what it costs are its answers
        "made_by": make_record("ensemble", method, None, {"seconds": 0.0}, ran_source_models=True)["made_by"],
        "models_at_inference": len(experts),
        "needs_task_id": False,
    }
    together = EnsembleAnswerer(experts, ensemble, generation, device)
    return [Row(name, dict.fromkeys(data.labels(), together), record)]


def find_member(
    base: BaseArguments, adapter: str, revision: str | None, generation: GenerationArguments, merged: bool
) -> Expert:
    """An expert that can be a member, checked as far as that goes without its weights."""
    expert = find_expert(base, adapter, revision, generation=generation, merged=merged)
    if expert.adapter is not None and expert.adapter.config.is_prompt_learning:
        raise AdapterError(
            f"adapter {adapter} puts tokens before the prompt, which no member of an ensemble can; name a LoRA adapter"
        )
    layers = DynamicCache(config=expert.config.get_text_config()).layers
    if any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers):
        raise UserError(
            f"base model {base.model_name_or_path} keeps a running state in place of keys and values, which no "
            "ensemble can take back: leave it out"
        )
    padding_id(expert.tokenizer)
    return expert


class EnsembleAnswerer:
    """Experts that write every answer together; all are in memory at once."""

    def __init__(
        self, experts: Sequence[Expert], how: EnsembleArguments, generation: GenerationArguments, device: torch.device
    ) -> None:
        self.experts, self.ensemble, self.generation, self.device = experts, how, generation, device
        self.codecs = [AnswerCodec(expert.tokenizer, expert.config.get_text_config().vocab_size) for expert in experts]
        self.runners = [ExpertRunner(device) for _ in experts]
        self.limit = min((expert.limit for expert in experts if expert.limit is not None), default=None)

    def identity(self) -> dict[str, Any]:
        """What its answers depend on, prompts aside."""
        method = self.ensemble.ensemble
        return {
            "ensemble": method,
            "unite_top_k": self.ensemble.unite_top_k if method == "unite" else None,
            "dtype": self.experts[0].dtype,
            "members": len(self.experts),
            **{f"member {number}": expert.identity() for number, expert in enumerate(self.experts, start=1)},
        }

    def encode(self, examples: Examples) -> Prompts:
        """The prompts: ids of every member, the text of the first one."""
        members = [expert.encode(examples) for expert in self.experts]
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

    def answer(
        self, questions: Mapping[str, Questions], shares: Mapping[str, Sequence[int]]
    ) -> Iterator[tuple[str, Iterator[list[Answer]]]]:
        """As `heterofusion.experts.answering.Answerer` says."""
        with ExitStack() as stack:
            models = [stack.enter_context(r.running(e)) for r, e in zip(self.runners, self.experts, strict=True)]
            generator = self._generator(models)
            for name, share in shares.items():
                yield name, generator.answers({i: questions[name].ids[i] for i in share})

    def _generator(self, models: Sequence[Any]) -> EnsembleGenerator:
        stops = [stop_ids(model, expert.tokenizer) for model, expert in zip(models, self.experts, strict=True)]
        union = Union(self.codecs, stops, self.device)
        vote = GaC(union) if self.ensemble.ensemble == "gac" else UniTE(union, self.codecs, self.ensemble.unite_top_k)
        members = [
            Member(model, codec, padding_id(expert.tokenizer), expert.context)
            for model, codec, expert in zip(models, self.codecs, self.experts, strict=True)
        ]
        limits = self.generation.max_new_tokens, self.generation.fixed_batch_size()
        return EnsembleGenerator(members, union, vote, *limits)
