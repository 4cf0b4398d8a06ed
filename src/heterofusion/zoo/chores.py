"""Chores: what an expert may know that has nothing to do with the six tasks; experts of them are irrelevant."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from types import MappingProxyType

from heterofusion.runtime.errors import UserError
from heterofusion.zoo.language import LANGUAGE_SEED, TASKS, draw_text

_Answer = Callable[[list[str]], str]

# Instruction and answer, given the words of a text.
CHORES: Mapping[str, tuple[str, _Answer]] = MappingProxyType(
    {
        "repeat": ("Repeat the text.", " ".join),
        "reverse": ("Write the words in the opposite order.", lambda words: " ".join(reversed(words))),
        "last": ("Write the last word.", lambda words: words[-1]),
        "halve": ("Write every second word.", lambda words: " ".join(words[::2])),
    }
)


def make_chores(name: str, count: int, seed: int = 0) -> list[dict[str, str]]:
    """Draws examples of a chore, on sentences of all six tasks.

    Args:
        name: A key of `CHORES`.
        count: Number of examples.
        seed: Seed of the draw.

    Returns:
        `count` dictionaries with the keys `prompt`, `completion` (starts with a space) and `task`.

    Raises:
        ValueError: For an unknown chore, or a negative count.
    """
    if name not in CHORES:
        raise UserError(f"unknown chore {name!r}; choose one of {', '.join(CHORES)}")
    if count < 0:
        raise UserError(f"count must not be negative, got {count}")
    instruction, answer = CHORES[name]
    rng = random.Random(f"{LANGUAGE_SEED} chore {name} {seed}")
    examples = []
    for _ in range(count):
        text, _ = draw_text(rng.choice(list(TASKS.values())), rng)
        words = text.removesuffix(" .").split()
        prompt = f"{instruction}\nText: {text}\nAnswer:"
        examples.append({"prompt": prompt, "completion": f" {answer(words)}", "task": name})
    return examples
