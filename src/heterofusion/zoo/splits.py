"""The zoo's data as files: what the demo, its sweeps and its comparisons read."""

from __future__ import annotations

import pathlib

from heterofusion.zoo.chores import CHORES, make_chores
from heterofusion.zoo.language import TASKS, make_examples, write_dataset


def write_splits(folder: str | pathlib.Path, num_replay: int, num_validation: int, num_test: int, seed: int) -> None:
    """Writes folder/{replay,validation,test}/<task>.jsonl for every task; no sentence is in two of them.

    Validation examples are of the replay split, too: what the experts were trained on would flatter them.

    Args:
        folder: Where the three folders go.
        num_replay: Replay examples per task.
        num_validation: Validation examples per task.
        num_test: Test examples per task.
        seed: Seed of the examples.
    """
    for task in TASKS:
        records = make_examples(task, "replay", num_replay + num_validation, seed)
        parts = {
            "replay": records[:num_replay],
            "validation": records[num_replay:],
            "test": make_examples(task, "test", num_test, seed),
        }
        for split, examples in parts.items():
            write_dataset(pathlib.Path(folder) / split / f"{task}.jsonl", examples)


def write_unlabelled(folder: str | pathlib.Path, num_prompts: int, seed: int) -> None:
    """Writes prompts for experts to label, as folder/{unlabelled,foreign}/<task>.jsonl.

    `foreign` asks about the sentences of the other task of the same kind: prompts of another distribution than the
    test's. The completions are there for scoring only.

    Args:
        folder: Where the two folders go.
        num_prompts: Prompts per task.
        seed: Seed of the prompts.
    """
    for task in TASKS.values():
        other = next(each for each in TASKS.values() if each.kind == task.kind and each is not task)
        for split, text_of in (("unlabelled", None), ("foreign", other.name)):
            prompts = make_examples(task, "unlabelled", num_prompts, seed, text_of)
            write_dataset(pathlib.Path(folder) / split / f"{task.name}.jsonl", prompts)


def write_chores(folder: str | pathlib.Path, count: int, seed: int) -> None:
    """Writes training data of irrelevant experts, as folder/chores/<name>.jsonl.

    Args:
        folder: Where the folder goes.
        count: Examples per chore.
        seed: Seed of the examples.
    """
    for name in CHORES:
        write_dataset(pathlib.Path(folder) / "chores" / f"{name}.jsonl", make_chores(name, count, seed))
