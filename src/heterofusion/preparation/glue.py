"""GLUE as verbalized question answering: a question, the options, the sentences, and the label's words as the answer.

The validation split is the test, since GLUE's own test has no labels; validation is cut from train.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from datasets import ClassLabel, Dataset

from heterofusion.data.files import Records, load_records
from heterofusion.data.formats import check_string, type_name
from heterofusion.evaluation.glue import GLUE_LABELS, MAX_SIMILARITY
from heterofusion.preparation.splits import Example, SourceTask
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.files import file_sha256

HUB_NAME = "nyu-mll/glue"
SUFFIXES = (".parquet", ".jsonl", ".json")
UNLABELLED = -1  # GLUE's own mark
PAPER_TASKS = ("cola", "mrpc", "qnli", "rte", "sst2")


@dataclass(frozen=True)
class Question:
    """How a task is asked.

    Args:
        text: The question.
        columns: The columns that hold the sentences, each with its name in the prompt.
        test_split: The split that becomes the test.
    """

    text: str
    columns: Mapping[str, str]
    test_split: str = "validation"


_PAIR = {"sentence1": "Sentence 1", "sentence2": "Sentence 2"}
_INFERENCE = {"sentence1": "Premise", "sentence2": "Hypothesis"}

QUESTIONS: Mapping[str, Question] = MappingProxyType(
    {
        "cola": Question("Is this sentence acceptable English grammar?", {"sentence": "Sentence"}),
        "mnli": Question(
            "Does the premise entail the hypothesis, contradict it, or leave it open?",
            {"premise": "Premise", "hypothesis": "Hypothesis"},
            "validation_matched",
        ),
        "mrpc": Question("Do the two sentences say the same thing?", _PAIR),
        "qnli": Question(
            "Can the answer to the question be inferred from the sentence?",
            {"question": "Question", "sentence": "Sentence"},
        ),
        "qqp": Question(
            "Do the two questions ask the same thing?", {"question1": "Question 1", "question2": "Question 2"}
        ),
        "rte": Question("Does the premise entail the hypothesis?", _INFERENCE),
        "sst2": Question("Does this piece of a film review speak well or badly of the film?", {"sentence": "Review"}),
        "stsb": Question(
            "How close in meaning are the two sentences? Answer with a number from 0 (unrelated) to 5 (the same).",
            _PAIR,
        ),
        "wnli": Question("With its pronouns resolved, does the premise entail the hypothesis?", _INFERENCE),
    }
)


def read_glue_task(task: str, dataset_path: str | Path | None = None, revision: str | None = None) -> SourceTask:
    """Read one GLUE task and write its prompts and answers.

    Args:
        task: A key of `QUESTIONS`.
        dataset_path: Folder with a folder per task, as on the Hub: `cola/train-00000-of-00001.parquet`, or
            `cola/train.parquet`, `.jsonl` or `.json`. None reads the data set of the Hub.
        revision: Commit, branch or tag of the Hub's data set.

    Returns:
        The task with the splits `train` and `test`. Left out and counted are records `without_text` (a sentence is
        missing) and `without_answer` (no label).

    Raises:
        ValueError: An unknown task, a file that is missing or not readable, or a record that is not what it has to be;
            the message names file and record.
    """
    if task not in QUESTIONS:
        raise UserError(f"--tasks has {task!r}, which is no GLUE task here: choose of {', '.join(QUESTIONS)}")
    if dataset_path is not None and revision is not None:
        raise UserError(f"--dataset_revision is {revision}, but --dataset_path has none: leave one of the two out")
    examples: dict[str, list[Example]] = {}
    counts: dict[str, Counter[str]] = {}
    inputs: dict[str, str] = {}
    hub_files: set[str] = set()
    for split, source in (("train", "train"), ("test", QUESTIONS[task].test_split)):
        if dataset_path is None:
            records = load_records(HUB_NAME, task, source, "GLUE", revision)
            records.label = f"data set {HUB_NAME!r}, {task}, {source}"
            assert isinstance(records.rows, Dataset)  # for the type checker: what comes from the Hub is one
            hub_files |= set(records.rows.info.download_checksums or ())  # their addresses name the commit
            parts = [_as_list(task, records)]
            inputs[source] = _rows_sha256(parts[0])
        else:
            parts = []
            for path in _split_files(Path(dataset_path).expanduser().absolute() / task, source):
                parts.append(_as_list(task, load_records(str(path), kind="GLUE")))
                inputs[path.name] = file_sha256(path)
        examples[split], counts[split] = [], Counter()
        for records in parts:
            _read_records(task, records, examples[split], counts[split])
    record: dict[str, Any] = {"source": task if dataset_path is not None else f"{HUB_NAME}/{task}"}
    record |= {"labels": list(GLUE_LABELS[task]), "inputs": inputs}
    if hub_files:
        record["hub_files"] = sorted(hub_files)
    return SourceTask(task, "GLUE", examples, counts, record)


def _split_files(folder: Path, split: str) -> list[Path]:
    """The file of a split, or all its numbered parts in order."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: --dataset_path must have a folder for each of --tasks")
    whole = [folder / f"{split}{suffix}" for suffix in SUFFIXES if (folder / f"{split}{suffix}").is_file()]
    parts: list[tuple[Path, str]] = []
    for path in sorted(folder.iterdir()):
        match = re.fullmatch(re.escape(split) + r"-[0-9]{5}-of-([0-9]{5})", path.stem)
        if match and path.suffix in SUFFIXES:
            parts.append((path, match[1]))
    if not whole and not parts:
        raise UserError(
            f"{folder} holds no {split} split: put {split}.parquet, {split}.jsonl or {split}-00000-of-00001.parquet "
            "there"
        )
    if len(whole) + bool(parts) > 1:
        names = ", ".join(path.name for path in (*whole, *(path for path, _ in parts)))
        raise UserError(f"{folder} holds the {split} split more than once ({names}): leave one")
    if parts and any(int(total) != len(parts) for _, total in parts):
        raise UserError(
            f"{folder} holds {len(parts)} of the parts of {split} ({', '.join(path.name for path, _ in parts)}), not "
            "all of them: add the others"
        )
    return whole or [path for path, _ in parts]


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


def _read_records(task: str, records: Records, examples: list[Example], counts: Counter[str]) -> None:
    counts["read"] += len(records.rows)
    for index, row in enumerate(records.rows):
        try:
            sentences = {title: _sentence(row, column) for column, title in QUESTIONS[task].columns.items()}
            answer = _answer(task, row)
        except ValueError as error:
            raise UserError(f"{records.where(index)}: {error}") from error
        if not all(sentences.values()):
            counts["without_text"] += 1
        elif answer is None:
            counts["without_answer"] += 1
        else:
            examples.append(Example("\n".join(sentences.values()), write_question(task, sentences), f" {answer}"))


def write_question(task: str, sentences: Mapping[str, str]) -> str:
    """The prompt of one record.

    Args:
        task: A key of `QUESTIONS`.
        sentences: The sentences by their name in the prompt.

    Returns:
        The prompt, which ends in `Answer:` without a space.
    """
    options = [f"Option: {', '.join(GLUE_LABELS[task])}"] if GLUE_LABELS[task] else []
    given = [f"{title}: {text}" for title, text in sentences.items()]
    return "\n".join([QUESTIONS[task].text, *options, *given, "Answer:"])


def _sentence(row: Mapping[str, Any], column: str) -> str:
    if column not in row:
        raise UserError(f"the column `{column}` is missing (found: {', '.join(row) or 'none'}): add it")
    return "" if row[column] is None else check_string(row[column], column).strip()


def _answer(task: str, row: Mapping[str, Any]) -> str | None:
    """The words for a record's label; None if it has none."""
    if "label" not in row:
        raise UserError(f"the column `label` is missing (found: {', '.join(row) or 'none'}): add it")
    label, labels = row["label"], GLUE_LABELS[task]
    if label is None or label == UNLABELLED:
        return None
    if isinstance(label, bool) or not isinstance(label, (int, float) if not labels else int):
        raise UserError(f"`label` is {type_name(label)}: make it {_label_numbers(task)}")
    if not 0 <= label <= (len(labels) - 1 if labels else MAX_SIMILARITY):
        raise UserError(f"`label` is {label}: make it {_label_numbers(task)}")
    return labels[int(label)] if labels else f"{label:.1f}"


def _label_numbers(task: str) -> str:
    if not GLUE_LABELS[task]:
        return "a number from 0 to 5"
    return "one of " + ", ".join(f"{number} ({name})" for number, name in enumerate(GLUE_LABELS[task]))
