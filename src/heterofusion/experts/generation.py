"""Batched greedy generation: prompts in, answers out.

`AnswerGenerator` is the core: token ids in, one batch of answers after the other out, longest prompts first. It knows
nothing of references, metrics, files or processes. `generate_answers` is the short way from texts to texts.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import GenerationConfig, LogitsProcessorList

from heterofusion.runtime.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

FIRST_BATCH_SIZE = 64  # of automatic batch sizes


@dataclass(frozen=True)
class Answer:
    """One generated answer.

    Args:
        index: Key of its prompt.
        text: The new tokens up to the end of the answer, without special tokens.
        new_tokens: How many tokens were generated for it, the one that ended it included.
    """

    index: int
    text: str
    new_tokens: int


def longest_first(lengths: Mapping[int, int]) -> list[int]:
    """Keys in the order of generation: long prompts first, so that memory runs out in the first batch or in none.

    Args:
        lengths: Number of tokens by key.

    Returns:
        The keys; those of equal length in the order they came in.
    """
    return sorted(lengths, key=lambda index: -lengths[index])


def cut_prompt(ids: Sequence[int], length: int | None, bos_token_id: int | None = None) -> list[int]:
    """Cut a prompt on the left: its end holds the question.

    Args:
        ids: Token ids.
        length: Number of tokens that are kept at most; None keeps all.
        bos_token_id: A token that stays where the prompt begins with it.

    Returns:
        At most `length` token ids.
    """
    if length is None or len(ids) <= length:
        return list(ids)
    if ids[0] == bos_token_id:
        return [ids[0], *ids[len(ids) - length + 1 :]]
    return list(ids[len(ids) - length :])


class Batches:
    """How many prompts go through at a time: a fixed number, or as many as memory lets.

    Args:
        batch_size: Prompts per batch; None begins with 64 and halves it whenever memory runs out.
        max_new_tokens: Most tokens in an answer, for messages.

    Attributes:
        size: Prompts per batch, as it stands.

    Raises:
        ValueError: If a number is not positive.
    """

    def __init__(self, batch_size: int | None, max_new_tokens: int) -> None:
        for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        self.size = batch_size or FIRST_BATCH_SIZE
        self.automatic = batch_size is None
        self.max_new_tokens = max_new_tokens

    def run(
        self, lengths: Mapping[int, int], generate: Callable[[Sequence[int]], list[Answer]]
    ) -> Iterator[list[Answer]]:
        """Generate, one batch at a time.

        Args:
            lengths: Tokens of every prompt, by its key.
            generate: Gives the answers to the prompts with some keys; it may run out of memory.

        Yields:
            The answers of a batch. Longest prompts first; batches hold prompts of similar length.

        Raises:
            ValueError: If a prompt has no tokens, or memory does not suffice for a batch.
        """
        for index, length in lengths.items():
            if not length:
                raise UserError(f"prompt {index} has no tokens; a model needs one at least to begin with")
        order = longest_first(lengths)
        start = 0
        while start < len(order):
            batch = order[start : start + self.size]
            answers = self._try(batch, lengths[batch[0]], generate)
            if answers is None:
                continue
            start += len(batch)
            yield answers

    def _try(
        self, batch: Sequence[int], longest: int, generate: Callable[[Sequence[int]], list[Answer]]
    ) -> list[Answer] | None:
        """Generate for one batch: its answers, or None where it has to be tried again with a smaller one."""
        try:
            return generate(batch)
        except RuntimeError as error:
            if not (isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)):
                raise
        # outside of the handler: there, the traceback still holds the tensors of the failed batch
        clear_device_cache(garbage_collection=True)
        tried = len(batch)
        if not self.automatic:
            raise UserError(
                f"--batch_size {self.size} does not fit into memory with prompts of {longest} tokens; lower it, or "
                "give auto"
            )
        if tried == 1:
            raise UserError(
                f"one prompt of {longest} tokens and {self.max_new_tokens} new tokens do not fit into memory; lower "
                "--max_prompt_length or --max_new_tokens, or load the base with --load_in_4bit true"
            )
        self.size = max(1, min(self.size, tried) // 2)
        logger.info("out of memory with %d prompts a batch: going on with %d", tried, self.size)
        return None


class AnswerGenerator:
    """Answers prompts by greedy decoding, in batches padded on the left.

    Whatever the model's own generation config says of sampling, penalties, beams or lengths does not count; of it only
    the tokens that end an answer are taken. Model, mode and tokenizer are left as they were.

    Args:
        model: A causal LM, with or without a PEFT adapter.
        tokenizer: Its tokenizer. Without a padding token its end-of-sequence token pads.
        max_new_tokens: Most tokens in an answer.
        batch_size: Prompts per batch; None begins with 64 and halves it whenever memory runs out.
        cache_implementation: `"dynamic"`, or `"static"` for a key-value cache of one size, as long as the longest
            prompt needs; with it a GPU runs compiled decoding steps.

    Raises:
        ValueError: If a number is not positive, for another cache, or if the tokenizer has neither a padding nor an
            end-of-sequence token.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        max_new_tokens: int = 256,
        batch_size: int | None = None,
        cache_implementation: str = "dynamic",
    ) -> None:
        if cache_implementation not in ("dynamic", "static"):
            raise UserError(f"cache_implementation must be 'dynamic' or 'static', got {cache_implementation!r}")
        self.batches = Batches(batch_size, max_new_tokens)
        self.model: Any = model
        self.tokenizer: Any = tokenizer
        self.max_new_tokens = max_new_tokens
        self.pad_id = padding_id(tokenizer)
        self.stops = stop_ids(model, tokenizer)
        self.cache_implementation = cache_implementation

    @property
    def batch_size(self) -> int:
        """Prompts per batch, as it stands."""
        return self.batches.size

    @property
    def dtype(self) -> str:
        """The model's dtype, by torch's name without the prefix."""
        return str(self.model.dtype).removeprefix("torch.")

    def answers(self, prompts: Mapping[int, Sequence[int]]) -> Iterator[list[Answer]]:
        """Generate, one batch at a time.

        Args:
            prompts: Token ids by a key that the answers carry.

        Yields:
            The answers of a batch. Longest prompts first; batches hold prompts of similar length.

        Raises:
            ValueError: If a prompt has no tokens, or memory does not suffice for a batch.
        """
        lengths = {index: len(ids) for index, ids in prompts.items()}
        config = self._config(longest=max(lengths.values(), default=0))

        def generate(batch: Sequence[int]) -> list[Answer]:
            rows = self._generate([prompts[index] for index in batch], config)
            return [self._answer(index, row) for index, row in zip(batch, rows, strict=True)]

        yield from self.batches.run(lengths, generate)

    def _config(self, longest: int) -> GenerationConfig:
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=self.pad_id,
            bos_token_id=self.tokenizer.bos_token_id,
            eos_token_id=self.stops or None,
            cache_implementation=self.cache_implementation,
            # of all batches: a cache of another size is another graph to a compiler
            max_cache_len=longest + self.max_new_tokens if self.cache_implementation == "static" else None,
        )

    @torch.no_grad()
    def _generate(
        self,
        prompts: Sequence[Sequence[int]],
        config: GenerationConfig,
        processors: LogitsProcessorList | None = None,
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
                logits_processor=processors,
            )
        return output[:, width:].tolist()

    def _answer(self, index: int, row: Sequence[int]) -> Answer:
        end = next((at for at, token in enumerate(row) if token in self.stops), len(row))
        # no clean-up: it takes spaces away that the reference may have
        text = self.tokenizer.decode(row[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Answer(index, str(text), min(end + 1, len(row)))


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
    """The token that fills up batches: the tokenizer's padding token, else its end-of-sequence token.

    Raises:
        ValueError: It has neither.
    """
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if pad_id is None:
        raise UserError("the tokenizer has neither a padding nor an end-of-sequence token; set tokenizer.pad_token")
    return int(pad_id)


def stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """Token ids that end an answer: those of the generation config and the tokenizer's own."""
    stops = model.generation_config.eos_token_id
    stops = [] if stops is None else [stops] if isinstance(stops, int) else list(stops)
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in stops:
        stops.append(tokenizer.eos_token_id)
    return stops


def generate_answers(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int = 64,
    batch_size: int | None = 32,
    progress: bool = True,
) -> list[str]:
    """Answers prompts by greedy decoding, in batches of prompts of similar length.

    The prompts are tokenized as they are, special tokens included.

    Args:
        model: A causal LM, with or without a PEFT adapter.
        tokenizer: Its tokenizer. Without a padding token its end-of-sequence token pads.
        prompts: The prompts.
        max_new_tokens: Most tokens in an answer.
        batch_size: Prompts per batch; None as in `AnswerGenerator`.
        progress: Whether to show a progress bar.

    Returns:
        One answer per prompt, in the order of the prompts: the new tokens as text, without special tokens.

    Raises:
        ValueError: If `prompts` is a string, holds something else than non-empty strings, if a number is not
            positive, or if the tokenizer has neither a padding nor an end-of-sequence token.
    """
    if isinstance(prompts, str):
        raise UserError("prompts must be a sequence of strings, got one string; put it into a list")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not prompt:
            raise UserError(f"prompts[{index}] must be a non-empty string, got {prompt!r}")
    generator = AnswerGenerator(model, tokenizer, max_new_tokens, batch_size)
    encoded = {index: tokenizer(prompt)["input_ids"] for index, prompt in enumerate(prompts)}
    answers = [""] * len(encoded)
    for batch in show_progress(generator.answers(encoded), len(encoded), progress):
        for answer in batch:
            answers[answer.index] = answer.text
    return answers


def show_progress(batches: Iterable[list[Answer]], total: int, shown: bool) -> Iterator[list[Answer]]:
    """Pass batches on with a progress bar that counts prompts.

    Args:
        batches: What `AnswerGenerator.answers` yields.
        total: Number of prompts.
        shown: Whether to show the bar.

    Yields:
        The batches.
    """
    with tqdm(total=total, desc="Generating", unit="prompt", disable=not shown) as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch))
