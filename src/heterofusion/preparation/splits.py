"""Samples of a task, with no text in two splits.

A sample is drawn by the SHA-256 of seed, task and record, not by a generator: it depends neither on the order of the
records nor on the version of a library, a larger one holds the smaller, and a record that is added to the data pushes
out one other at most.
"""

import hashlib
import heapq
import logging
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from heterofusion.runtime.errors import UserError

logger = logging.getLogger(__name__)

CUT_SHARE = 10  # a validation split that is cut from train takes one in this many records at most


@dataclass(frozen=True)
class Example:
    """One record as prompt and answer.

    Args:
        text: What the prompt asks about: no two splits hold the same one.
        prompt: The whole prompt.
        completion: The answer, with its leading space.
    """

    text: str
    prompt: str
    completion: str


@dataclass(frozen=True)
class Sizes:
    """Most records in each sample of a task; None takes all."""

    replay: int = 300
    validation: int = 300
    test: int | None = None
    unlabelled: int = 0

    def __post_init__(self) -> None:
        for name, lowest in (("replay", 1), ("validation", 0), ("test", 1), ("unlabelled", 0)):
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise UserError(f"--num_{name} is {value}; it must be at least {lowest}")


@dataclass
class SourceTask:
    """A task as it was read.

    Args:
        name: Name of the task and of its files.
        kind: What it asks: NER, RE, ET or GLUE.
        examples: The usable records by split: `train`, `test` and, where the data has one, `validation`.
        counts: By split, how many records were `read` and how many were left out, by reason.
        record: What the manifest says of the source: its name, labels and hashes.
    """

    name: str
    kind: str
    examples: dict[str, list[Example]]
    counts: dict[str, Counter[str]]
    record: dict[str, Any] = field(default_factory=dict)


@dataclass
class PreparedTask:
    """A task ready to be written: its examples by file (`replay`, `train`, `validation`, `test`,
    `unlabelled`).

    `counts` has what became of the records of every split: those that were `read` are those left out, by reason, those
    `cut_for_validation` or `cut_for_unlabelled`, and those `kept`.
    """

    name: str
    kind: str
    files: dict[str, list[Example]]
    counts: dict[str, Counter[str]]
    record: dict[str, Any]


def make_splits(task: SourceTask, sizes: Sizes, seed: int) -> PreparedTask:
    """Draw the samples of a task.

    A text that is in test is taken out of validation and train, one that is in validation out of train. Records of
    validation and train that repeat another one with the same answer are taken out too; test stays as published.
    Without a validation split one is cut from train, of a tenth of it at most, and so are unlabelled prompts, if there
    are to be any. Replay is a sample of the rest of train.

    Args:
        task: The task as it was read.
        sizes: Most records in each sample.
        seed: Seed of the samples.

    Returns:
        The examples of every file in the order of the source, and what became of the records.

    Raises:
        ValueError: Nothing is left of train or of test.
    """
    counts = {split: Counter(found) for split, found in task.counts.items()}
    test = task.examples["test"]
    in_test = {text_key(example) for example in test}
    validation = _distinct(task.examples.get("validation", []), counts.get("validation", Counter()), in_test=in_test)
    in_validation = {text_key(example) for example in validation}
    train = _distinct(task.examples["train"], counts["train"], in_test=in_test, in_validation=in_validation)
    if "validation" in counts:
        counts["validation"]["kept"] = len(validation)
        validation = _sample(validation, sizes.validation, f"{seed} {task.name} validation")
    elif sizes.validation and len(train) > 1:
        validation, train = _cut(train, sizes.validation, f"{seed} {task.name}", "validation", counts["train"])
    unlabelled: list[Example] = []
    if sizes.unlabelled and len(train) > 1:
        unlabelled, train = _cut(train, sizes.unlabelled, f"{seed} {task.name}", "unlabelled", counts["train"])
    counts["train"]["kept"], counts["test"]["kept"] = len(train), len(test)
    for split, left in (("train", train), ("test", test)):
        if not left:
            found = ", ".join(f"{count} {reason}" for reason, count in sorted(counts[split].items()) if count)
            raise UserError(f"{task.name}: no record of {split} can be used ({found}): check the data of this task")

    files = {
        "replay": _sample(train, sizes.replay, f"{seed} {task.name} replay"),
        "train": train,
        "validation": validation,
        "test": _sample(test, sizes.test, f"{seed} {task.name} test"),
        "unlabelled": unlabelled,
    }
    if len(files["replay"]) < sizes.replay:
        logger.warning("%s: replay has %d records, not %d: train has no more", task.name, len(train), sizes.replay)
    if sizes.validation and not validation:
        logger.warning("%s: no validation file, since no record is left for one", task.name)
    return PreparedTask(task.name, task.kind, files, counts, task.record)


def _cut(
    train: list[Example], count: int, salt: str, name: str, counts: Counter[str]
) -> tuple[list[Example], list[Example]]:
    """Cut a sample from train, of a tenth of it at most; gives it and the rest."""
    sample = _sample(train, min(count, max(1, len(train) // CUT_SHARE)), f"{salt} {name}")
    keys = {text_key(example) for example in sample}
    rest = [example for example in train if text_key(example) not in keys]
    counts[f"cut_for_{name}"] = len(sample)
    counts[f"in_{name}"] += len(train) - len(rest) - len(sample)  # the same text with another answer goes too
    return sample, rest


def text_key(example: Example) -> str:
    """What makes two texts the same one: case and white space do not."""
    return " ".join(example.text.casefold().split())


def stable_number(salt: str, *parts: str) -> int:
    """A number that looks random and is the same everywhere.

    Args:
        salt: Seed and purpose.
        parts: What the number is of.
    """
    content = "\0".join((salt, *parts)).encode()
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big")


def _distinct(examples: list[Example], counts: Counter[str], **others: set[str]) -> list[Example]:
    """Those whose text is in none of the other splits, without repeats; `counts` says what was left out."""
    kept: list[Example] = []
    seen: set[tuple[str, str]] = set()
    for example in examples:
        key = text_key(example)
        reason = next((name for name, keys in others.items() if key in keys), None)
        if reason is None and (key, example.completion) in seen:
            reason = "repeated"
        if reason is not None:
            counts[reason] += 1
            continue
        seen.add((key, example.completion))
        kept.append(example)
    return kept


def _sample(examples: list[Example], count: int | None, salt: str) -> list[Example]:
    """At most `count` of the examples, in their order."""
    if count is None or count >= len(examples):
        return examples

    def rank(index: int) -> tuple[int, int]:
        example = examples[index]
        return stable_number(salt, example.text, example.completion), index

    return [examples[index] for index in sorted(heapq.nsmallest(count, range(len(examples)), key=rank))]
