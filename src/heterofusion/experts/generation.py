"""Batched generation, the one of the house: token ids in, one batch of answers after the other out.

Greedy or seeded sampling, with the log-probability of every greedy answer. A base's own generation config does not
count but for the tokens that end an answer, and what is sampled depends on the seed and a prompt's key alone.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from peft import PeftModel
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from heterofusion.runtime.errors import UserError
from heterofusion.runtime.flags import check_ranges, flag

logger = logging.getLogger(__name__)

AUTO = "auto"
FIRST_BATCH_SIZE = 64  # of automatic batch sizes


@dataclass
class GenerationArguments:
    """How answers are generated; always greedily."""

    max_new_tokens: int = flag(256, help="Number of tokens in an answer at most.", range="[1, inf)")
    batch_size: str = flag(
        AUTO, help="Prompts per batch and process; auto starts at 64 and halves it when memory runs out."
    )
    max_prompt_length: int | None = flag(
        None,
        help="Number of tokens that longer prompts are cut to, on the left; by default the model's context "
        "length minus max_new_tokens.",
        range="[2, inf)",
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.batch_size != AUTO and not re.fullmatch(r"[1-9][0-9]*", self.batch_size):
            raise UserError(f"--batch_size is {self.batch_size!r}: give an integer of at least 1, or {AUTO}")

    def fixed_batch_size(self) -> int | None:
        """The batch size that was asked for, None for `auto`."""
        return None if self.batch_size == AUTO else int(self.batch_size)


@dataclass(frozen=True)
class Answer:
    """One generated answer; `new_tokens` and `log_probability` (in nats) include the token that ended it."""

    index: int  # the key of its prompt
    text: str  # up to the end of the answer, without special tokens
    new_tokens: int
    log_probability: float = field(default=0.0, compare=False)  # of all its tokens together; 0 where it was sampled
    ended: bool = True  # by itself; else it was cut after the most tokens

    @property
    def mean_log_probability(self) -> float:
        """Per token, which is comparable between answers of one model."""
        return self.log_probability / max(1, self.new_tokens)

    @property
    def confidence(self) -> float:
        """Log-probability per byte, the end counted as one: comparable between tokenizers, unlike one per token."""
        return self.log_probability / (len(self.text.encode("utf-8", "replace")) + 1)


@dataclass(frozen=True)
class Sampling:
    """Sampling in place of greedy decoding."""

    seed: int
    temperature: float
    top_p: float  # tokens are drawn from the smallest set with this probability mass

    def uniforms(self, indices: Sequence[int], steps: int) -> torch.Tensor:
        """Numbers in [0, 1) that depend on the seed and a prompt's key alone. (prompts, steps)"""
        rows = [np.random.default_rng([self.seed, index]).random(steps) for index in indices]
        return torch.tensor(np.stack(rows), dtype=torch.float32)


def longest_first(lengths: Mapping[int, int]) -> list[int]:
    """Keys in the order of generation: long prompts first, so that memory runs out in the first batch or in none."""
    return sorted(lengths, key=lambda index: -lengths[index])


def cut_prompt(ids: Sequence[int], length: int | None, bos_token_id: int | None = None) -> list[int]:
    """At most `length` tokens of a prompt, cut on the left: its end holds the question. A first BOS token stays."""
    if length is None or len(ids) <= length:
        return list(ids)
    if ids[0] == bos_token_id:
        return [ids[0], *ids[len(ids) - length + 1 :]]
    return list(ids[len(ids) - length :])


class Batches:
    """How many prompts go through at a time: a fixed number, or 64, halved whenever memory runs out."""

    def __init__(self, batch_size: int | None, max_new_tokens: int) -> None:
        self.size = batch_size or FIRST_BATCH_SIZE
        self.automatic = batch_size is None
        self.max_new_tokens = max_new_tokens

    def run(
        self, lengths: Mapping[int, int], generate: Callable[[Sequence[int]], list[Answer]]
    ) -> Iterator[list[Answer]]:
        """The answers, a batch at a time, the longest prompts first; `generate` may run out of memory."""
        order = longest_first(lengths)
        start = 0
        while start < len(order):
            batch = order[start : start + self.size]
            answers = None
            try:
                answers = generate(batch)
            except RuntimeError as error:
                if not (isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)):
                    raise
            if answers is None:
                clear_device_cache(garbage_collection=True)  # no traceback holds the tensors of the failed batch now
                self._shrink(len(batch), lengths[batch[0]])
            else:
                start += len(batch)
                yield answers

    def _shrink(self, tried: int, longest: int) -> None:
        if tried == 1 or not self.automatic:
            raise UserError(
                f"{tried} prompts of {longest} tokens and {self.max_new_tokens} new tokens do not fit into memory; "
                "lower --batch_size, --max_prompt_length or --max_new_tokens, or give --load_in_4bit true"
            )
        self.size = tried // 2
        logger.info("out of memory with %d prompts a batch: going on with %d", tried, self.size)


@dataclass
class AnswerGenerator:
    """Answers prompts in batches padded on the left. Model, mode and tokenizer are left as they were."""

    model: Any  # a causal LM, with or without a PEFT adapter
    tokenizer: Any  # without a padding token its end-of-sequence token pads
    max_new_tokens: int = 256
    batch_size: int | None = None  # None begins with 64 and halves it whenever memory runs out
    sampling: Sampling | None = None  # None decodes greedily
    # Whether texts are decoded after their prompt, so that both can be joined as they are: some decoders drop the
    # space before a first word.
    in_context: bool = False

    def __post_init__(self) -> None:
        self.batches = Batches(self.batch_size, self.max_new_tokens)
        self.pad_id, self.stops = padding_id(self.tokenizer), stop_ids(self.model, self.tokenizer)

    def answers(self, prompts: Mapping[int, Sequence[int]]) -> Iterator[list[Answer]]:
        """Answer token ids by a key that the answers carry and that seeds what is sampled; longest prompts first."""
        lengths = {index: len(ids) for index, ids in prompts.items()}
        config = GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=self.pad_id,
            bos_token_id=self.tokenizer.bos_token_id,
            eos_token_id=self.stops or None,
        )

        def generate(batch: Sequence[int]) -> list[Answer]:
            greedy, choice = RecordGreedy(), self.sampling
            drawn = choice and SampleTokens(choice.uniforms(batch, self.max_new_tokens), choice)
            rows = self._generate([prompts[index] for index in batch], config, drawn or greedy)
            told = [[0.0]] * len(batch) if drawn else torch.stack(greedy.steps, dim=1).tolist()
            return [self._answer(i, prompts[i], row, p) for i, row, p in zip(batch, rows, told, strict=True)]

        yield from self.batches.run(lengths, generate)

    @torch.no_grad()
    def _generate(
        self, prompts: Sequence[Sequence[int]], config: GenerationConfig, choice: LogitsProcessor
    ) -> list[list[int]]:
        """New token ids of each prompt, as many as of the longest answer."""
        width = max(len(ids) for ids in prompts)
        device = next(self.model.parameters()).device
        rows = [[self.pad_id] * (width - len(ids)) + list(ids) for ids in prompts]
        masks = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]
        with _in_evaluation(self.model, config):
            output = self.model.generate(
                input_ids=torch.tensor(rows, device=device),  # (prompts, width)
                attention_mask=torch.tensor(masks, device=device),
                generation_config=config,
                logits_processor=LogitsProcessorList([choice]),
            )
        return output[:, width:].tolist()

    def _answer(self, index: int, prompt: Sequence[int], row: Sequence[int], told: Sequence[float]) -> Answer:
        end = next((at for at, token in enumerate(row) if token in self.stops), len(row))
        new_tokens = min(end + 1, len(row))
        text = self._decode(row[:end])
        if self.in_context:
            before, both = self._decode(prompt), self._decode([*prompt, *row[:end]])
            text = both[len(before) :] if both.startswith(before) else text
        return Answer(index, text, new_tokens, sum(told[:new_tokens]), end < len(row))

    def _decode(self, ids: Sequence[int]) -> str:
        # no clean-up: it takes spaces away that the reference may have
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class SampleTokens(LogitsProcessor):
    """Draws the next token of every row by inverting its cumulative distribution, and leaves no other."""

    def __init__(self, uniforms: torch.Tensor, how: Sampling) -> None:
        self.uniforms, self.step, self.how = uniforms, 0, how  # (rows, steps)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores that are 0 for the token drawn and minus infinity for all others. (rows, vocabulary)"""
        probabilities, order = (scores.float() / self.how.temperature).softmax(-1).sort(-1, descending=True)
        mass = probabilities.cumsum(-1)
        inside = mass - probabilities < self.how.top_p  # the first is always inside
        total = (probabilities * inside).sum(-1, keepdim=True)
        self.uniforms = self.uniforms.to(scores.device)  # once
        drawn = self.uniforms[:, self.step].unsqueeze(1) * total
        self.step += 1
        place = torch.searchsorted(mass, drawn, right=True).minimum(inside.sum(-1, keepdim=True) - 1)
        chosen = order.gather(-1, place)
        return torch.full_like(scores, -torch.inf).scatter_(-1, chosen, 0.0)  # type: ignore[return-value]


class RecordGreedy(LogitsProcessor):
    """Keeps the log-probability of the likeliest token of every row, one number a token, and changes no score."""

    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []  # (rows,) each

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """The scores as they are. (rows, vocabulary)"""
        self.steps.append(scores.float().amax(-1) - scores.float().logsumexp(-1))
        return scores


@contextlib.contextmanager
def _in_evaluation(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Evaluation mode, and a generation config in place of the model's, whose values fill any gap in one's own."""
    holder: Any = model.get_base_model() if isinstance(model, PeftModel) else model  # PEFT passes its own on to it
    own, was_training = holder.generation_config, model.training
    holder.generation_config = config
    model.eval()
    try:
        yield
    finally:
        holder.generation_config = own
        model.train(was_training)


def padding_id(tokenizer: Any) -> int:
    """The token that fills up batches: the tokenizer's padding token, else its end-of-sequence token."""
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if pad_id is None:
        raise UserError("the tokenizer has neither a padding nor an end-of-sequence token; set tokenizer.pad_token")
    return int(pad_id)


def stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """Token ids that end an answer: those of the generation config and the tokenizer's own."""
    stops = model.generation_config.eos_token_id
    ids = [*(stops if isinstance(stops, list) else [stops]), tokenizer.eos_token_id]
    return [*dict.fromkeys(token for token in ids if token is not None)]
