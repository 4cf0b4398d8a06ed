"""Make replay, train, validation and test files of GLUE, as verbalized question answering.

    python recipes/glue/prepare.py --output_dir data/glue
    python recipes/glue/prepare.py --output_dir data/glue --dataset_path GLUE --tasks cola rte

Reads nyu-mll/glue on the Hub, or a local folder laid out like it. GLUE's test split has no labels: the validation
split is the test here, and validation is cut from train. Writes output_dir/{replay,train,validation,test}/cola.jsonl
and so on, prompts with their answers, and manifest.json. The same data, flags and seed give the same files.
"""

import hashlib
import json
import logging
import re
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# what libraries warn of while they are imported must not stand beside an error
logging.getLogger().addHandler(logging.NullHandler())

from datasets import ClassLabel, Dataset

from heterofusion.data.files import Records, load_records
from heterofusion.data.formats import check_string, type_name
from heterofusion.evaluation.glue import GLUE_LABELS, MAX_SIMILARITY
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.files import file_sha256
from heterofusion.runtime.flags import flag
from heterofusion.runtime.program import command, parse_arguments, set_up_logging

sys.path.append(str(Path(__file__).resolve().parents[1]))  # what this shares with uie/prepare.py
from _prepared import Example, PrepareArguments, PreparedTask, prepare

HUB_NAME = "nyu-mll/glue"
SUFFIXES = (".parquet", ".jsonl", ".json")
PAPER_TASKS = ("cola", "mrpc", "qnli", "rte", "sst2")

_PAIR = {"sentence1": "Sentence 1", "sentence2": "Sentence 2"}
_INFERENCE = {"sentence1": "Premise", "sentence2": "Hypothesis"}
# How a task is asked: the question, and the columns that hold the sentences, each with its name in the prompt.
QUESTIONS: dict[str, tuple[str, dict[str, str]]] = {
    "cola": ("Is this sentence acceptable English grammar?", {"sentence": "Sentence"}),
    "mnli": (
        "Does the premise entail the hypothesis, contradict it, or leave it open?",
        {"premise": "Premise", "hypothesis": "Hypothesis"},
    ),
    "mrpc": ("Do the two sentences say the same thing?", _PAIR),
    "qnli": (
        "Can the answer to the question be inferred from the sentence?",
        {"question": "Question", "sentence": "Sentence"},
    ),
    "qqp": ("Do the two questions ask the same thing?", {"question1": "Question 1", "question2": "Question 2"}),
    "rte": ("Does the premise entail the hypothesis?", _INFERENCE),
    "sst2": ("Does this piece of a film review speak well or badly of the film?", {"sentence": "Review"}),
    "stsb": (
        "How close in meaning are the two sentences? Answer with a number from 0 (unrelated) to 5 (the same).",
        _PAIR,
    ),
    "wnli": ("With its pronouns resolved, does the premise entail the hypothesis?", _INFERENCE),
}
TEST_SPLITS = {task: "validation_matched" if task == "mnli" else "validation" for task in QUESTIONS}


@dataclass
class GlueArguments:
    """What is read."""

    dataset_path: str | None = flag(
        None,
        help="Local folder with a folder per task: cola/train-00000-of-00001.parquet as on the Hub, or "
        "cola/train.jsonl; nyu-mll/glue of the Hub by default.",
    )
    dataset_revision: str | None = flag(None, help="Commit, branch or tag of the data set on the Hub.")
    tasks: list[str] = flag(
        default_factory=lambda: list(PAPER_TASKS),
        help="Tasks of GLUE; the paper's five by default, and mnli, qqp, stsb and wnli.",
    )

    def __post_init__(self) -> None:
        for task in self.tasks:
            if task not in QUESTIONS:
                raise UserError(f"--tasks has {task!r}, which is no GLUE task here: choose of {', '.join(QUESTIONS)}")
        if self.dataset_path is not None and self.dataset_revision is not None:
            raise UserError(
                f"--dataset_revision is {self.dataset_revision}, but --dataset_path has none: leave one of the two out"
            )


def read_task(task: str, source: GlueArguments) -> PreparedTask:
    """Read one task, its published validation split as the test, and write its prompts and answers."""
    examples: dict[str, list[Example]] = {}
    counts: dict[str, Counter[str]] = {}
    record: dict[str, Any] = {"source": task if source.dataset_path is not None else f"{HUB_NAME}/{task}"}
    record |= {"labels": list(GLUE_LABELS[task]), "inputs": {}}
    for split, name in (("train", "train"), ("test", TEST_SPLITS[task])):
        if source.dataset_path is None:
            records = load_records(HUB_NAME, task, name, "GLUE", source.dataset_revision)
            records.label = f"data set {HUB_NAME!r}, {task}, {name}"
            files = getattr(getattr(records.rows, "info", None), "download_checksums", None)
            if files:  # their addresses name the commit
                record["hub_files"] = sorted({*record.get("hub_files", []), *files})
            parts = [_as_list(task, records)]
            record["inputs"][name] = _rows_sha256(parts[0])
        else:
            paths = _split_files(Path(source.dataset_path).expanduser().absolute() / task, name)
            parts = [_as_list(task, load_records(str(path), kind="GLUE")) for path in paths]
            record["inputs"] |= {path.name: file_sha256(path) for path in paths}
        counts[split] = Counter()
        examples[split] = [example for records in parts for example in _examples(task, records, counts[split])]
    return PreparedTask(task, "GLUE", examples, counts, record)


def _split_files(folder: Path, split: str) -> list[Path]:
    """The file of a split, or all its numbered parts in order."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: --dataset_path must have a folder for each of --tasks")
    whole = [folder / f"{split}{suffix}" for suffix in SUFFIXES if (folder / f"{split}{suffix}").is_file()]
    numbered = re.compile(re.escape(split) + r"-[0-9]{5}-of-([0-9]{5})")
    found = [(path, numbered.fullmatch(path.stem)) for path in sorted(folder.iterdir()) if path.suffix in SUFFIXES]
    parts = {path: int(match[1]) for path, match in found if match}
    names = ", ".join(path.name for path in (*whole, *parts))
    if not names:
        raise UserError(
            f"{folder} holds no {split} split: put {split}.parquet, {split}.jsonl or {split}-00000-of-00001.parquet "
            "there"
        )
    if len(whole) + bool(parts) > 1:
        raise UserError(f"{folder} holds the {split} split more than once ({names}): leave one")
    if any(total != len(parts) for total in parts.values()):
        raise UserError(
            f"{folder} holds {len(parts)} of the parts of {split} ({names}), not all of them: add the others"
        )
    return whole or list(parts)


def _as_list(task: str, records: Records) -> Records:
    """Records as plain dictionaries, refused if their labels are numbered otherwise than GLUE's."""
    if not isinstance(records.rows, Dataset):
        return records
    feature = records.rows.features.get("label")
    names = feature.names if isinstance(feature, ClassLabel) else None
    if names and tuple(name.replace("_", " ") for name in names) != GLUE_LABELS[task]:
        raise UserError(
            f"{records.label} numbers its labels as {', '.join(names)}, GLUE as {', '.join(GLUE_LABELS[task])}: "
            "renumber them"
        )
    return Records(records.label, records.rows.to_list(), records.lines)


def _rows_sha256(records: Records) -> str:
    """SHA-256 of the records themselves, which does not depend on the file format."""
    digest = hashlib.sha256()
    for row in records.rows:
        digest.update((json.dumps(row, sort_keys=True) + "\n").encode())
    return digest.hexdigest()


def _examples(task: str, records: Records, counts: Counter[str]) -> list[Example]:
    examples = []
    counts["read"] += len(records.rows)
    for index, row in enumerate(records.rows):
        sentences, answer = records.call(index, _read_row, task, row)
        if not all(sentences.values()):
            counts["without_text"] += 1
        elif answer is None:
            counts["without_answer"] += 1
        else:
            examples.append(Example("\n".join(sentences.values()), write_question(task, sentences), f" {answer}"))
    return examples


def _read_row(task: str, row: Mapping[str, Any]) -> tuple[dict[str, str], str | None]:
    """The sentences of a row by their name in the prompt, and the words for its label; None if it has none."""
    columns, labels = QUESTIONS[task][1], GLUE_LABELS[task]
    for column in (*columns, "label"):
        if column not in row:
            raise UserError(f"the column `{column}` is missing (found: {', '.join(row) or 'none'}): add it")
    sentences = {
        title: "" if row[column] is None else check_string(row[column], column).strip()
        for column, title in columns.items()
    }
    label = row["label"]
    if label is None or label == -1:  # GLUE's own mark
        return sentences, None
    wanted = "one of " + ", ".join(f"{number} ({name})" for number, name in enumerate(labels))
    wanted = wanted if labels else "a number from 0 to 5"
    if isinstance(label, bool) or not isinstance(label, int if labels else (int, float)):
        raise UserError(f"`label` is {type_name(label)}: make it {wanted}")
    if not 0 <= label <= (len(labels) - 1 if labels else MAX_SIMILARITY):
        raise UserError(f"`label` is {label}: make it {wanted}")
    return sentences, labels[int(label)] if labels else f"{label:.1f}"


def write_question(task: str, sentences: Mapping[str, str]) -> str:
    """The prompt of one record, which ends in `Answer:` without a space."""
    options = [f"Option: {', '.join(GLUE_LABELS[task])}"] if GLUE_LABELS[task] else []
    given = [f"{title}: {text}" for title, text in sentences.items()]
    return "\n".join([QUESTIONS[task][0], *options, *given, "Answer:"])


@command
def main(argv: list[str]) -> None:
    source, args = parse_arguments((GlueArguments, PrepareArguments), argv, __doc__)
    set_up_logging(hold=True)
    prepare((read_task(task, source) for task in dict.fromkeys(source.tasks)), args, "GLUE")


if __name__ == "__main__":
    sys.exit(main())
