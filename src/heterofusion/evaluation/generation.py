"""Batched greedy generation: prompts in, answers out, in the order given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def _stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """Token ids that end an answer: those of the generation config and the tokenizer's own."""
    stops = model.generation_config.eos_token_id
    stops = [] if stops is None else [stops] if isinstance(stops, int) else list(stops)
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in stops:
        stops.append(tokenizer.eos_token_id)
    return stops


@torch.no_grad()
def generate_answers(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int = 64,
    batch_size: int = 32,
    progress: bool = True,
) -> list[str]:
    """Answers prompts by greedy decoding, in batches of prompts of similar length.

    The prompts are padded on the left and tokenized as they are, special tokens included; the model's mode
    (train or eval) and the tokenizer are left as they were.

    Args:
        model: A causal LM, with or without a PEFT adapter.
        tokenizer: Its tokenizer. Without a padding token its end-of-sequence token pads.
        prompts: The prompts.
        max_new_tokens: Most tokens in an answer.
        batch_size: Prompts per batch.
        progress: Whether to show a progress bar.

    Returns:
        One answer per prompt, in the order of the prompts: the new tokens as text, without special tokens.

    Raises:
        ValueError: If `prompts` is a string, holds something else than non-empty strings, if a number is not
            positive, or if the tokenizer has neither a padding nor an end-of-sequence token.
    """
    if isinstance(prompts, str):
        raise ValueError("prompts must be a sequence of strings, got one string; put it into a list")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not prompt:
            raise ValueError(f"prompts[{index}] must be a non-empty string, got {prompt!r}")
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if pad_id is None:
        raise ValueError("the tokenizer has neither a padding nor an end-of-sequence token; set tokenizer.pad_token")

    encoded = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]))
    answers = [""] * len(encoded)
    stops = _stop_ids(model, tokenizer)
    device = next(model.parameters()).device
    generate: Any = model.generate  # a method of both classes; typed as an attribute of PeftModel
    was_training = model.training
    model.eval()
    try:
        with tqdm(total=len(encoded), desc="Generating", unit="prompt", disable=not progress) as bar:
            for start in range(0, len(order), batch_size):
                batch = order[start : start + batch_size]
                width = len(encoded[batch[-1]])
                rows = [[pad_id] * (width - len(encoded[i])) + encoded[i] for i in batch]
                masks = [[0] * (width - len(encoded[i])) + [1] * len(encoded[i]) for i in batch]
                output = generate(
                    input_ids=torch.tensor(rows, device=device),
                    attention_mask=torch.tensor(masks, device=device),
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    num_beams=1,
                    temperature=None,
                    top_p=None,
                    top_k=None,
                    pad_token_id=pad_id,
                    eos_token_id=stops or None,
                )
                for index, row in zip(batch, output[:, width:].tolist(), strict=True):
                    end = next((at for at, token in enumerate(row) if token in stops), len(row))
                    answers[index] = str(tokenizer.decode(row[:end], skip_special_tokens=True))
                bar.update(len(batch))
    finally:
        model.train(was_training)
    return answers
