"""The zoo's own small training loop: AdamW, warmup and cosine, one process, no surprises."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from heterofusion.zoo.corpus import pretraining_documents

IGNORED = -100


def encode_example(tokenizer: Any, example: Mapping[str, str]) -> tuple[list[int], list[int]]:
    """Token ids and labels of one prompt with its answer.

    Args:
        tokenizer: The tokenizer of the model to train.
        example: A dictionary with `prompt` and `completion`.

    Returns:
        Two lists of one length: the ids of prompt, answer and end-of-sequence token; the labels, which are the ids
        for answer and end and -100 for the prompt.
    """
    prompt = tokenizer(example["prompt"])["input_ids"]
    answer = tokenizer(example["completion"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return prompt + answer, [IGNORED] * len(prompt) + answer


def collate(rows: Sequence[tuple[list[int], list[int]]], pad_id: int) -> dict[str, torch.Tensor]:
    """Pads examples on the right into one batch.

    Args:
        rows: (ids, labels) pairs as `encode_example` returns them.
        pad_id: Id of the padding token.

    Returns:
        `input_ids`, `attention_mask` and `labels`, each of shape (rows, longest row).
    """
    width = max(len(ids) for ids, _ in rows)
    return {
        "input_ids": torch.tensor([ids + [pad_id] * (width - len(ids)) for ids, _ in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows]),
        "labels": torch.tensor([labels + [IGNORED] * (width - len(labels)) for _, labels in rows]),
    }


def example_batches(
    tokenizer: Any, examples: Sequence[Mapping[str, str]], batch_size: int, seed: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Endless batches of examples, shuffled anew in every pass.

    Args:
        tokenizer: The tokenizer of the model to train.
        examples: Dictionaries with `prompt` and `completion`, at least one.
        batch_size: Examples per batch; the rest of a pass is carried into the next.
        seed: Seed of the order.

    Yields:
        Batches as `collate` makes them.
    """
    rows = [encode_example(tokenizer, example) for example in examples]
    rng = random.Random(seed)
    queue: list[int] = []
    while True:
        while len(queue) < batch_size:
            queue += rng.sample(range(len(rows)), len(rows))
        batch, queue = queue[:batch_size], queue[batch_size:]
        yield collate([rows[index] for index in batch], tokenizer.pad_token_id)


def text_batches(tokenizer: Any, block_size: int, batch_size: int, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """Endless batches of pretraining text, documents packed into blocks without padding.

    Args:
        tokenizer: The tokenizer of the model to train.
        block_size: Tokens per block.
        batch_size: Blocks per batch.
        seed: Seed of the text.

    Yields:
        `input_ids` and `labels`, both of shape (batch_size, block_size).
    """
    documents = pretraining_documents(seed)
    stream: list[int] = []
    wanted = block_size * batch_size
    while True:
        while len(stream) < wanted:
            texts = [next(documents) for _ in range(256)]
            for ids in tokenizer(texts)["input_ids"]:
                stream += [*ids, tokenizer.eos_token_id]
        ids = torch.tensor(stream[:wanted]).view(batch_size, block_size)
        stream = stream[wanted:]
        yield {"input_ids": ids, "labels": ids}


def train(
    model: torch.nn.Module,
    batches: Iterator[Mapping[str, torch.Tensor]],
    steps: int,
    learning_rate: float,
    weight_decay: float = 0.0,
    warmup: float = 0.05,
    description: str = "Training",
    progress: bool = True,
) -> list[float]:
    """Trains the parameters that require a gradient.

    Args:
        model: The model; it returns a loss for a batch with labels.
        batches: At least `steps` batches.
        steps: Optimizer steps, one batch each.
        learning_rate: Peak learning rate; it rises over the warmup and falls to a twentieth along a cosine.
        weight_decay: AdamW's weight decay.
        warmup: Share of the steps that warm up.
        description: What the progress bar says.
        progress: Whether to show the bar.

    Returns:
        The loss of every step.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, betas=(0.9, 0.98))
    rise = max(1, round(warmup * steps))

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    losses: list[float] = []
    model.train()
    with tqdm(range(steps), desc=description, disable=not progress, mininterval=2.0) as bar:
        for _ in bar:
            loss = model(**next(batches)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            if len(losses) % 20 == 0:
                bar.set_postfix(loss=f"{sum(losses[-20:]) / 20:.3f}")
    model.eval()
    return losses
