"""What uie/prepare.py and glue/prepare.py share: samples with no text in two splits, a manifest, a table.

A sample is drawn by the SHA-256 of seed, task and example, not by a generator: it depends neither on the order of the
examples nor on a library's version, a larger one holds the smaller, and one more example pushes out one at most.
"""

import hashlib
import heapq
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from heterofusion.data.markdown import markdown_table
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.files import (
    check_output_dir,
    file_sha256,
    read_json_object,
    staging_folder,
    write_json,
    write_lines,
)
from heterofusion.runtime.flags import check_ranges, flag
from heterofusion.runtime.program import release_logging

logger = logging.getLogger("heterofusion.recipes.prepare")

MANIFEST = "manifest.json"
FILES = ("replay", "train", "validation", "test", "unlabelled")
CUT_SHARE = 10  # what is cut from train is one in this many examples at most


@dataclass
class PrepareArguments:
    """What is written."""

    output_dir: str = flag(help="Folder for the files.")
    seed: int = flag(42, help="Seed of the samples and of the choice between wordings.")
    num_replay: int = flag(300, help="Examples of train in a replay file, at most.", range="[1, inf)")
    num_validation: int = flag(
        300,
        help="Examples in a validation file, at most: of the published split, else a tenth of train at most.",
        range="[0, inf)",
    )
    num_test: int | None = flag(None, help="Examples in a test file, at most; all by default.", range="[1, inf)")
    num_unlabelled: int = flag(
        0, help="Prompts for recipes/label.py, cut from train, a tenth of it at most.", range="[0, inf)"
    )
    overwrite: bool = flag(
        False, help="Write into an output_dir that is not empty; files that its manifest.json lists go."
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        check_output_dir(self.output_dir, resuming=False, overwrite=self.overwrite, resume_flag=None)


@dataclass(frozen=True)
class Example:
    """One row as prompt and answer (with its leading space); no two splits hold the same `text`."""

    text: str
    prompt: str
    completion: str

    @property
    def key(self) -> str:
        """What makes two texts the same one: case and white space do not."""
        return " ".join(self.text.casefold().split())


@dataclass
class PreparedTask:
    """A task as it was read (`examples` by split), or ready to be written (`examples` by file, see `FILES`)."""

    name: str
    kind: str
    examples: dict[str, list[Example]]
    counts: dict[str, Counter[str]]  # by split: rows `read`, those left out, by reason, and those `kept`
    record: dict[str, Any]  # what the manifest says of the source: its name, labels and hashes


def make_splits(task: PreparedTask, args: PrepareArguments) -> PreparedTask:
    """Draw the samples of a task that was read with `train`, `test` and, where the data has one, `validation`.

    A text that is in test is taken out of validation and train, one that is in validation out of train, and repeats
    out of both; test stays as published. Replay is a sample of what is left of train.
    """
    salt = f"{args.seed} {task.name}"
    counts = {split: Counter(found) for split, found in task.counts.items()}
    test = task.examples["test"]
    in_test = {example.key for example in test}
    validation = _distinct(task.examples.get("validation", []), counts.get("validation", Counter()), in_test=in_test)
    in_validation = {example.key for example in validation}
    train = _distinct(task.examples["train"], counts["train"], in_test=in_test, in_validation=in_validation)
    if "validation" in counts:
        counts["validation"]["kept"] = len(validation)
        validation = _sample(validation, args.num_validation, f"{salt} validation")
    else:
        validation, train = _cut(train, args.num_validation, salt, "validation", counts["train"])
    unlabelled, train = _cut(train, args.num_unlabelled, salt, "unlabelled", counts["train"])
    for split, left in (("train", train), ("test", test)):
        counts[split]["kept"] = len(left)
        if not left:
            found = ", ".join(f"{count} {reason}" for reason, count in sorted(counts[split].items()) if count)
            raise UserError(f"{task.name}: no record of {split} can be used ({found}): check the data of this task")
    files = {
        "replay": _sample(train, args.num_replay, f"{salt} replay"),
        "train": train,
        "validation": validation,
        "test": _sample(test, args.num_test, f"{salt} test"),
        "unlabelled": unlabelled,
    }
    if len(train) < args.num_replay:
        logger.warning("%s: replay has %d records, not %d: train has no more", task.name, len(train), args.num_replay)
    if args.num_validation and not validation:
        logger.warning("%s: no validation file, since no record is left for one", task.name)
    return replace(task, examples=files, counts=counts)


def stable_number(salt: str, *parts: str) -> int:
    """A number that looks random and is the same everywhere."""
    return int.from_bytes(hashlib.sha256("\0".join((salt, *parts)).encode()).digest()[:8], "big")


def _distinct(examples: list[Example], counts: Counter[str], **others: set[str]) -> list[Example]:
    """Those whose text is in none of the other splits, without repeats; `counts` says what was left out."""
    kept: dict[tuple[str, str], Example] = {}
    for example in examples:
        repeated = "repeated" if (example.key, example.completion) in kept else None
        reason = next((name for name, keys in others.items() if example.key in keys), repeated)
        if reason is None:
            kept[example.key, example.completion] = example
        else:
            counts[reason] += 1
    return list(kept.values())


def _cut(
    train: list[Example], count: int, salt: str, name: str, counts: Counter[str]
) -> tuple[list[Example], list[Example]]:
    """Cut a sample from train; gives it and the rest, without other answers to the same texts."""
    if not count or len(train) < 2:
        return [], train
    sample = _sample(train, min(count, max(1, len(train) // CUT_SHARE)), f"{salt} {name}")
    keys = {example.key for example in sample}
    rest = [example for example in train if example.key not in keys]
    counts[f"cut_for_{name}"] = len(sample)
    counts[f"in_{name}"] += len(train) - len(rest) - len(sample)
    return sample, rest


def _sample(examples: list[Example], count: int | None, salt: str) -> list[Example]:
    """At most `count` of the examples, in their order."""
    if count is None or count >= len(examples):
        return examples

    def rank(index: int) -> tuple[int, int]:
        return stable_number(salt, examples[index].text, examples[index].completion), index

    return [examples[index] for index in sorted(heapq.nsmallest(count, range(len(examples)), key=rank))]


def _write(tasks: Sequence[PreparedTask], args: PrepareArguments, layout: str) -> None:
    """Write `replay/NAME.jsonl`, `train/`, `validation/`, `test/`, `unlabelled/` and `manifest.json`.

    All is written beside its place and then moved there, the manifest last: where it stands, its files are complete.
    """
    folder = Path(args.output_dir).absolute()
    with staging_folder(folder, ".preparing-") as staging:
        entries = {}
        for task in tasks:
            written = {}
            for name, examples in task.examples.items():
                if examples:  # a data set that is empty is refused by what reads it
                    path = staging / name / f"{task.name}.jsonl"
                    write_lines(path, (_row(task, name, example) for example in examples))
                    written[f"{name}/{path.name}"] = {"records": len(examples), "sha256": file_sha256(path)}
            splits = {
                split: {name: count for name, count in counts.items() if count or name in ("read", "kept")}
                for split, counts in task.counts.items()
            }
            entries[task.name] = {"kind": task.kind, **task.record, "splits": splits, "files": written}
        sizes = {name: getattr(args, name) for name in ("seed", *(f"num_{file}" for file in FILES if file != "train"))}
        manifest = {"heterofusion": version("heterofusion"), "layout": layout, **sizes, "tasks": entries}
        write_json(staging / MANIFEST, manifest)
        _remove_old(folder)
        for path in sorted(staging.rglob("*.jsonl")):
            target = folder / path.relative_to(staging)
            target.parent.mkdir(exist_ok=True)
            os.replace(path, target)
        os.replace(staging / MANIFEST, folder / MANIFEST)


def _remove_old(folder: Path) -> None:
    """Remove what the manifest of a folder lists, and nothing that no preparation writes."""
    if (folder / MANIFEST).exists():
        tasks = read_json_object(folder / MANIFEST).get("tasks", {})
        (folder / MANIFEST).unlink()
        for name in (name for task in tasks.values() for name in task["files"]):
            if re.fullmatch(rf"({'|'.join(FILES)})/[^/]+\.jsonl", name):
                (folder / name).unlink(missing_ok=True)


def _row(task: PreparedTask, name: str, example: Example) -> dict[str, str]:
    answer = {} if name == "unlabelled" else {"completion": example.completion}
    return {"prompt": example.prompt, **answer, "task": task.name, "kind": task.kind}


def _table(tasks: Sequence[PreparedTask]) -> str:
    """A row per task: rows read (train + validation + test), those left out by reason, and those in every file."""
    totals: list[Counter[str]] = [sum(task.counts.values(), Counter()) for task in tasks]
    reasons = [name for name in sorted(set().union(*totals)) if name not in ("read", "kept")]
    files = [name for name in FILES if any(task.examples[name] for task in tasks)]
    rows = [
        [
            task.name,
            " + ".join(str(task.counts[name]["read"]) for name in FILES if name in task.counts),
            *(total[name] for name in reasons),
            *(len(task.examples[name]) for name in files),
        ]
        for task, total in zip(tasks, totals, strict=True)
    ]
    return markdown_table(["task", "read", *(name.replace("_", " ") for name in reasons), *files], rows)


def prepare(read: Iterable[PreparedTask], args: PrepareArguments, layout: str) -> None:
    """Split and write tasks as they are read, and print their table."""
    tasks = []
    for task in tqdm(read, desc="Reading", delay=3):
        tasks.append(make_splits(task, args))
    _write(tasks, args, layout)
    release_logging()
    print(f"{_table(tasks)}\nwritten to {args.output_dir}")
