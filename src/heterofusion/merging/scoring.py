"""Scores of merges on validation data: one base, on which adapters or dense updates are put in turn."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from heterofusion.adapters.lora import LoraAdapter
from heterofusion.evaluation.arguments import EvalDataArguments, EvalModelArguments, GenerationArguments
from heterofusion.evaluation.datasets import check_references, load_eval_sets
from heterofusion.evaluation.results import metric_record
from heterofusion.experts.examples import encode
from heterofusion.experts.generation import AnswerGenerator
from heterofusion.experts.models import Models, adapter_tokenizer, find_adapter, prompt_limit
from heterofusion.runtime.loading import check_token_ids

logger = logging.getLogger(__name__)

Scores = dict[str, dict[str, Any]]  # record of every data set, by label


class Scorer:
    """Validation data, read and encoded; the base is loaded when `load` is called.

    Args:
        model: the base.
        data: the data sets.
        generation: how answers are generated.
        first: the expert whose tokenizer, if it has one, goes with the merge.
        base_config: the base's config.
        device: where answers are generated.

    Raises:
        ValueError: a file, a record or a length is not what it has to be; names it.
    """

    def __init__(
        self,
        model: EvalModelArguments,
        data: EvalDataArguments,
        generation: GenerationArguments,
        first: LoraAdapter,
        base_config: Any,
        device: torch.device,
    ) -> None:
        self.generation = generation
        self.sets = {examples.label: examples for examples in load_eval_sets(data)}
        self.tokenizer = adapter_tokenizer(model, find_adapter(str(first.folder)))
        limit = prompt_limit(base_config, generation.max_new_tokens, generation.max_prompt_length)
        self.prompts = {label: encode(examples, self.tokenizer, limit) for label, examples in self.sets.items()}
        for label, prompts in self.prompts.items():
            check_references(self.sets[label], prompts)
            check_token_ids([Dataset.from_dict({"input_ids": prompts.ids})], base_config)
            if prompts.cut:
                logger.warning("%d prompts of %s were cut to %s tokens on the left", prompts.cut, label, limit)
        self.batch_size = generation.fixed_batch_size()
        self.models = Models(model, device)

    def load(self) -> None:
        """Load the base.

        Raises:
            ValueError: it cannot be loaded.
        """
        self.models.load()

    def adapter(self, folder: Path, labels: Iterable[str] | None = None) -> Scores:
        """Scores of an adapter on disk.

        Args:
            folder: of the adapter.
            labels: data sets; all by default.
        """
        with self.models.with_adapter(find_adapter(str(folder))) as model:
            return self._score(model, labels, "scoring")

    def dense(
        self, update: Callable[[str], Tensor], paths: Iterable[str], labels: Iterable[str] | None = None
    ) -> Scores:
        """Scores of the base with an update added to its weights for the time.

        Args:
            update: makes the update (out_features, in_features) of a module.
            paths: the modules.
            labels: data sets; all by default.
        """
        base = self.models.load()
        with added(base, update, paths):
            return self._score(base, labels, "scoring the dense update")

    def _score(self, model: Any, labels: Iterable[str] | None, what: str) -> Scores:
        labels = list(self.sets if labels is None else labels)
        generator = AnswerGenerator(
            model,
            self.tokenizer,
            self.generation.max_new_tokens,
            self.batch_size,
            self.generation.cache_implementation,
        )
        scores: Scores = {}
        total = sum(len(self.prompts[label].ids) for label in labels)
        with tqdm(total=total, desc=what, unit="prompt", leave=False) as bar:
            for label in labels:
                prompts = self.prompts[label]
                texts = [""] * len(prompts.ids)
                for batch in generator.answers(dict(enumerate(prompts.ids))):
                    for answer in batch:
                        texts[answer.index] = answer.text
                    bar.update(len(batch))
                record = metric_record(self.sets[label].metric, texts, prompts.references)
                scores[label] = {**record, "examples": len(texts), "sha256": self.sets[label].sha256}
        return scores


@contextlib.contextmanager
def added(base: PreTrainedModel, update: Callable[[str], Tensor], paths: Iterable[str]) -> Iterator[None]:
    """Let layers of a base have weights with an update added, rounded once to their dtype; their own come back after.

    The layers get new parameters: one that is tied to another stays as it is there, and nothing has to be subtracted.

    Args:
        base: its linear layers (or GPT-2's Conv1D) are changed.
        update: makes the update (out_features, in_features) of a module.
        paths: the modules.
    """
    own: dict[str, nn.Parameter] = {}
    try:
        for path in paths:
            layer: Any = base.get_submodule(path)
            weight: nn.Parameter = layer.weight
            delta = update(path).to(weight.device)
            new = weight.detach().float() + (delta.T if isinstance(layer, Conv1D) else delta)
            own[path] = weight
            layer.weight = nn.Parameter(new.to(weight.dtype), requires_grad=False)
        yield
    finally:
        for path, weight in own.items():
            layer = base.get_submodule(path)
            layer.weight = weight
