"""Labels as they are generated: the answer, how sure its model was of it, and whether it came to an end.

`LabelGenerator` is the batched generation of the evaluation with two things more: the log-probability of each answer,
taken from the scores that generation computes anyway (one number per token is kept, never a row of the vocabulary),
and seeded sampling that gives the same text whatever the batch a prompt is in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from heterofusion.experts.generation import Answer, AnswerGenerator


@dataclass(frozen=True)
class Label(Answer):
    """One generated answer, with what is known of it.

    Args:
        log_probability: Of all its tokens together, the one that ended it included, in nats.
        ended: Whether it ended by itself; else it was cut after the most tokens.
    """

    log_probability: float = 0.0
    ended: bool = True

    @property
    def mean_log_probability(self) -> float:
        """Per token, which is comparable between answers of one model."""
        return self.log_probability / max(1, self.new_tokens)

    @property
    def confidence(self) -> float:
        """Log-probability per byte of the answer, its end counted as one: comparable between tokenizers.

        A mean over tokens would depend on how many of them a vocabulary cuts the text into.
        """
        return self.log_probability / (len(self.text.encode("utf-8", "replace")) + 1)


@dataclass(frozen=True)
class Sampling:
    """Sampling in place of greedy decoding.

    Args:
        seed: Of all draws.
        temperature: What logits are divided by.
        top_p: Tokens are drawn from the smallest set with this probability mass.
    """

    seed: int
    temperature: float
    top_p: float

    def uniforms(self, indices: Sequence[int], steps: int) -> torch.Tensor:
        """Numbers in [0, 1) for some prompts; they depend on the seed and a prompt's key alone. (prompts, steps)"""
        rows = [np.random.default_rng([self.seed, index]).random(steps) for index in indices]
        return torch.tensor(np.stack(rows), dtype=torch.float32)


class SampleTokens(LogitsProcessor):
    """Draws the next token of every row by inverting its cumulative distribution, and leaves no other.

    Args:
        uniforms: One number per row and step. (rows, steps)
        temperature: What logits are divided by.
        top_p: Mass of the set that is drawn from.
    """

    def __init__(self, uniforms: torch.Tensor, temperature: float, top_p: float) -> None:
        self.uniforms = uniforms
        self.temperature = temperature
        self.top_p = top_p
        self.step = 0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores that are 0 for the token drawn and minus infinity for all others. (rows, vocabulary)"""
        probabilities, order = (scores.float() / self.temperature).softmax(-1).sort(-1, descending=True)
        mass = probabilities.cumsum(-1)
        inside = mass - probabilities < self.top_p  # the first is always inside
        total = (probabilities * inside).sum(-1, keepdim=True)
        self.uniforms = self.uniforms.to(scores.device)  # once
        drawn = self.uniforms[:, self.step].unsqueeze(1) * total
        self.step += 1
        place = torch.searchsorted(mass, drawn, right=True).minimum(inside.sum(-1, keepdim=True) - 1)
        chosen = order.gather(-1, place)
        return torch.full_like(scores, -torch.inf).scatter_(-1, chosen, 0.0)  # type: ignore[return-value]


class RecordGreedy(LogitsProcessor):
    """Keeps the log-probability of the likeliest token of every row, which greedy decoding takes."""

    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """The scores as they are. (rows, vocabulary)"""
        scores32 = scores.float()
        self.steps.append(scores32.amax(-1) - scores32.logsumexp(-1))
        return scores

    def rows(self) -> list[list[float]]:
        """Log-probabilities, row by row."""
        return torch.stack(self.steps, dim=1).tolist()  # (rows, steps)


class LabelGenerator(AnswerGenerator):
    """Answers prompts as `AnswerGenerator` does, and tells of every answer what a `Label` holds.

    Texts are read in the context of their prompt: a decoder that drops the space before a first word keeps it here, so
    that prompt and text can be joined as they are.

    Args:
        model: A causal LM, with or without a PEFT adapter.
        tokenizer: Its tokenizer.
        max_new_tokens: Most tokens in an answer.
        batch_size: Prompts per batch; None begins with 64 and halves it whenever memory runs out.
        cache_implementation: As for `AnswerGenerator`.
        sampling: How to sample; None decodes greedily. The log-probability of what was sampled is not taken.

    Raises:
        ValueError: As for `AnswerGenerator`.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        max_new_tokens: int = 256,
        batch_size: int | None = None,
        cache_implementation: str = "dynamic",
        sampling: Sampling | None = None,
    ) -> None:
        super().__init__(model, tokenizer, max_new_tokens, batch_size, cache_implementation)
        self.sampling = sampling

    def answers(self, prompts: Mapping[int, Sequence[int]]) -> Iterator[list[Label]]:  # type: ignore[override]
        """Generate, one batch at a time.

        Args:
            prompts: Token ids by a key that the labels carry; it also seeds what is sampled.

        Yields:
            The labels of a batch, longest prompts first.

        Raises:
            ValueError: If a prompt has no tokens, or memory does not suffice for a batch.
        """
        lengths = {index: len(ids) for index, ids in prompts.items()}
        config = self._config(longest=max(lengths.values(), default=0))

        def generate(batch: Sequence[int]) -> list[Answer]:
            processor = self._processor(batch)
            rows = self._generate([prompts[index] for index in batch], config, LogitsProcessorList([processor]))
            told = processor.rows() if isinstance(processor, RecordGreedy) else [[]] * len(batch)
            return [
                self._label(index, prompts[index], row, log_probabilities)
                for index, row, log_probabilities in zip(batch, rows, told, strict=True)
            ]

        for batch in self.batches.run(lengths, generate):
            yield [label for label in batch if isinstance(label, Label)]

    def _processor(self, batch: Sequence[int]) -> SampleTokens | RecordGreedy:
        if self.sampling is None:
            return RecordGreedy()
        uniforms = self.sampling.uniforms(batch, self.max_new_tokens)
        return SampleTokens(uniforms, self.sampling.temperature, self.sampling.top_p)

    def _label(self, index: int, prompt: Sequence[int], row: Sequence[int], told: Sequence[float]) -> Label:
        answer = self._answer(index, row)
        ended = any(token in self.stops for token in row)
        body = list(row[: answer.new_tokens - ended])
        return Label(
            index,
            self._in_context(prompt, body, answer.text),
            answer.new_tokens,
            sum(told[: answer.new_tokens]),
            ended,
        )

    def _in_context(self, prompt: Sequence[int], body: Sequence[int], alone: str) -> str:
        before, both = self._decode(prompt), self._decode([*prompt, *body])
        return both[len(before) :] if both.startswith(before) else alone

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
