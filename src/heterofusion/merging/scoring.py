"""Scores of merges on validation data: one base, on which adapters or dense updates are put in turn."""

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from heterofusion.evaluation.datasets import EvalDataArguments, check_references, load_eval_sets
from heterofusion.evaluation.results import metric_record
from heterofusion.experts.expert import BaseArguments, ExpertRunner, find_expert
from heterofusion.experts.generation import AnswerGenerator, GenerationArguments

logger = logging.getLogger(__name__)

Scores = dict[str, dict[str, Any]]  # record of every data set, by label


class Scorer:
    """Validation data, read and encoded; the base is loaded when `load` is called.

    Args:
        base: the base.
        data: the data sets.
        generation: how answers are generated.
        first: folder of the expert whose tokenizer, if it has one, goes with the merge.
        device: where answers are generated.
    """

    def __init__(
        self,
        base: BaseArguments,
        data: EvalDataArguments,
        generation: GenerationArguments,
        first: Path,
        device: torch.device,
    ) -> None:
        self.base, self.generation = base, generation
        self.sets = {examples.label: examples for examples in load_eval_sets(data)}
        expert = find_expert(base, str(first), generation=generation)
        self.tokenizer = expert.tokenizer
        self.prompts = {label: expert.encode(examples) for label, examples in self.sets.items()}
        for label, prompts in self.prompts.items():
            check_references(self.sets[label], prompts)
            if prompts.cut:
                logger.warning("%d prompts of %s were cut to %s tokens on the left", prompts.cut, label, expert.limit)
        self.runner = ExpertRunner(device)

    def load(self) -> PreTrainedModel:
        """Load the base."""
        return self.runner.load(self.base)

    def adapter(self, folder: Path, labels: Iterable[str] | None = None) -> Scores:
        """Scores of an adapter on disk, on some of the data sets or on all."""
        with self.runner.running(find_expert(self.base, str(folder), generation=self.generation)) as model:
            return self._score(model, labels)

    def dense(
        self, update: Callable[[str], Tensor], paths: Iterable[str], labels: Iterable[str] | None = None
    ) -> Scores:
        """Scores of the base with updates (out_features, in_features) of some modules added for the time."""
        with added(self.load(), update, paths) as model:
            return self._score(model, labels)

    def _score(self, model: Any, labels: Iterable[str] | None) -> Scores:
        generation = self.generation
        generator = AnswerGenerator(
            model,
            self.tokenizer,
            generation.max_new_tokens,
            generation.fixed_batch_size(),
            generation.cache_implementation,
        )
        scores: Scores = {}
        for label in list(self.sets if labels is None else labels):
            prompts = self.prompts[label]
            texts = [""] * len(prompts.ids)
            with tqdm(total=len(texts), desc=f"scoring {label}", unit="prompt", leave=False) as bar:
                for batch in generator.answers(dict(enumerate(prompts.ids))):
                    for answer in batch:
                        texts[answer.index] = answer.text
                    bar.update(len(batch))
            record = metric_record(self.sets[label].metric, texts, prompts.references)
            scores[label] = {**record, "examples": len(texts), "sha256": self.sets[label].sha256}
        return scores


@contextlib.contextmanager
def added(base: PreTrainedModel, update: Callable[[str], Tensor], paths: Iterable[str]) -> Iterator[PreTrainedModel]:
    """Let layers of a base have weights with an update added, rounded once to their dtype; their own come back after.

    The layers get new parameters: one that is tied to another stays as it is there, and nothing has to be subtracted.
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
        yield base
    finally:
        for path, weight in own.items():
            layer = base.get_submodule(path)
            layer.weight = weight
