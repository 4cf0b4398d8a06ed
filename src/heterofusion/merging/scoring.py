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
from heterofusion.experts.answering import ExpertAnswerer, Questions
from heterofusion.experts.expert import BaseArguments, Expert, ExpertRunner, find_expert
from heterofusion.experts.generation import GenerationArguments

logger = logging.getLogger(__name__)

Scores = dict[str, dict[str, Any]]  # record of every data set, by label


class Scorer:
    """Validation data, read and encoded; the base is loaded when `load` is called."""

    def __init__(
        self,
        base: BaseArguments,
        data: EvalDataArguments,
        generation: GenerationArguments,
        first: Path,  # folder of the expert whose tokenizer, if it has one, goes with the merge
        device: torch.device,
    ) -> None:
        self.base, self.generation = base, generation
        self.sets = {examples.label: examples for examples in load_eval_sets(data)}
        self.expert = find_expert(base, str(first), generation=generation)
        self.prompts = {label: self.expert.encode(examples) for label, examples in self.sets.items()}
        for label, prompts in self.prompts.items():
            check_references(self.sets[label], prompts)
            if prompts.cut:
                limit = self.expert.limit
                logger.warning("%d prompts of %s were cut to %s tokens on the left", prompts.cut, label, limit)
        self.runner = ExpertRunner(device)

    def load(self) -> PreTrainedModel:
        """Load the base."""
        return self.runner.load(self.base)

    def adapter(self, folder: Path, labels: Iterable[str]) -> Scores:
        """Scores of an adapter on disk on some of the data sets."""
        return self._score(find_expert(self.base, str(folder), generation=self.generation), labels)

    def dense(self, update: Callable[[str], Tensor], paths: Iterable[str], labels: Iterable[str]) -> Scores:
        """Scores of the base with updates (out_features, in_features) of some modules added for the time."""
        with added(self.load(), update, paths):
            return self._score(self.expert.without_adapter(), labels)

    def _score(self, expert: Expert, labels: Iterable[str]) -> Scores:
        questions = {
            label: Questions(
                Path(), self.prompts[label].ids, self.prompts[label].lengths, self.generation.max_new_tokens
            )
            for label in labels
        }
        shares = {label: range(len(asked.ids)) for label, asked in questions.items()}
        answerer = ExpertAnswerer(expert, self.runner, self.generation)
        scores: Scores = {}
        for label, batches in answerer.answer(questions, shares):
            bar = tqdm(batches, desc=f"scoring {label}", unit="batch", leave=False)
            answers = {answer.index: answer.text for batch in bar for answer in batch}
            texts = [answers[index] for index in shares[label]]
            record = metric_record(self.sets[label].metric, texts, self.prompts[label].references)
            scores[label] = {**record, "examples": len(texts), "sha256": self.sets[label].sha256}
        return scores


@contextlib.contextmanager
def added(base: PreTrainedModel, update: Callable[[str], Tensor], paths: Iterable[str]) -> Iterator[None]:
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
        yield
    finally:
        for path, weight in own.items():
            layer = base.get_submodule(path)
            layer.weight = weight
