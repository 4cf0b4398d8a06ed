"""The InstructUIE layout: `NER/mit-movie/{train,dev,test,labels}.json`, and the same below `RE` and `ET`.

A record is `{"sentence": ..., "entities": [{"name": ..., "type": ...}]}`, or of the kind RE `{"sentence": ...,
"relations": [{"head": {"name": ...}, "type": ..., "tail": {"name": ...}}]}`. `labels.json` is the list of the types.
Every file is a JSON array or JSON Lines in UTF-8.
"""

import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heterofusion.data.files import Records, load_json, parse_json, read_text
from heterofusion.data.formats import check_string, type_name
from heterofusion.evaluation.uie import KINDS
from heterofusion.preparation.prompts import Item, write_answer, write_prompt
from heterofusion.preparation.splits import Example, SourceTask
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.files import file_sha256

logger = logging.getLogger(__name__)

SPLIT_FILES = {"train": "train.json", "validation": "dev.json", "test": "test.json"}
LABELS_FILE = "labels.json"
NO_TYPE = ("", "NA")  # how the layout marks an item that is of none of the types


@dataclass(frozen=True)
class TaskFolder:
    """Folder of one task.

    Args:
        kind: NER, RE or ET.
        name: Path of the folder below that of its kind.
        path: The folder itself.
    """

    kind: str
    name: str
    path: Path

    @property
    def title(self) -> str:
        """How flags and messages name the task."""
        return f"{self.kind}/{self.name}"

    @property
    def stem(self) -> str:
        """Name of the task's files; spaces and slashes become underscores."""
        return re.sub(r"[^\w.+-]+", "_", f"{self.kind}_{self.name}")


def find_tasks(dataset_path: str | Path) -> list[TaskFolder]:
    """All tasks of a folder in the InstructUIE layout, one or two levels below `NER`, `RE` and `ET`.

    Args:
        dataset_path: The folder.

    Returns:
        The tasks, by kind and name. What is skipped is logged.

    Raises:
        ValueError: No such folder, no task in it, or a folder whose name cannot be printed.
    """
    root = Path(dataset_path).expanduser().absolute()
    if not root.is_dir():
        raise UserError(f"--dataset_path {root} is no folder: name the one that holds NER, RE or ET")
    tasks: list[TaskFolder] = []
    for folder in _subfolders(root):
        if folder.name not in KINDS:
            logger.info("skipped %s: its name is none of %s", folder, ", ".join(KINDS))
            continue
        for path in _subfolders(folder):
            found = [path] if _is_task(path) else [inner for inner in _subfolders(path) if _is_task(inner)]
            tasks += [TaskFolder(folder.name, one.relative_to(folder).as_posix(), one) for one in found]
            if not found:
                logger.warning("skipped %s: it holds none of %s", path, ", ".join(SPLIT_FILES.values()))
    if not tasks:
        raise UserError(
            f"--dataset_path {root} holds no task: it must have folders such as NER/mit-movie with "
            f"{', '.join(SPLIT_FILES.values())}"
        )
    for task in tasks:
        if not task.name.isprintable():  # a line break, or bytes that are not UTF-8: no file of it could be named
            raise UserError(f"the folder {task.title!r} in {root} has a name that cannot be printed: rename it")
    return sorted(tasks, key=lambda task: (KINDS.index(task.kind), task.name))


def _subfolders(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith((".", "__"))]


def _is_task(folder: Path) -> bool:
    return any((folder / name).is_file() for name in SPLIT_FILES.values())


def select_tasks(found: Sequence[TaskFolder], wanted: Sequence[str]) -> list[TaskFolder]:
    """The tasks that are to be prepared.

    Args:
        found: What `find_tasks` gave.
        wanted: Names such as `NER/mit-movie`, or `mit-movie` where there is only one of that name; all if empty.
            `ET/name` without a folder of its own is made of the entities of `NER/name`.

    Returns:
        The tasks in the order wanted, each once.

    Raises:
        ValueError: An unknown or ambiguous name, or two tasks whose files would have the same name.
    """
    tasks = list(dict.fromkeys(_select(found, name) for name in wanted)) if wanted else list(found)
    by_stem: dict[str, TaskFolder] = {}
    for task in tasks:
        other = by_stem.setdefault(task.stem, task)
        if other is not task:
            raise UserError(
                f"the files of {other.title!r} and {task.title!r} would both be called {task.stem!r}: rename one of "
                "the folders, or prepare them apart with --tasks"
            )
    return tasks


def _select(found: Sequence[TaskFolder], wanted: str) -> TaskFolder:
    name = wanted.strip("/")
    matches = [task for task in found if name in (task.title, task.name)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        titles = " or ".join(task.title for task in matches)
        raise UserError(f"--tasks has {wanted!r}, which may be {titles}: name one of them")
    kind, _, rest = name.partition("/")
    for task in found:
        if kind == "ET" and task.title == f"NER/{rest}":
            logger.info("%s has no folder of its own: it is made of %s", name, task.title)
            return TaskFolder("ET", rest, task.path)
    known = ", ".join(task.title for task in found)
    raise UserError(f"--tasks has {wanted!r}, which is not there: choose of {known}")


@dataclass
class _Parsed:
    """Records of one split: their sentences with what there is to find."""

    rows: list[tuple[str, list[Item]]]
    counts: Counter[str]
    types: set[str]


def read_task(folder: TaskFolder, seed: int) -> SourceTask:
    """Read one task and write its prompts and answers.

    Args:
        folder: The task.
        seed: Seed of the choice between wordings.

    Returns:
        The task. Left out and counted are records `without_text` (no sentence) and, of the kind ET, `without_answer`
        (no entity to type), and items `untyped_items` (no type or no name) and `repeated_items`. Counted but kept are
        `items_with_semicolon`, which the answers' format cannot tell from two items.

    Raises:
        ValueError: A file is missing, empty or not readable, or a record is not what it has to be; the message names
            file and record.
    """
    splits: dict[str, _Parsed] = {}
    inputs: dict[str, str] = {}
    for split, name in SPLIT_FILES.items():
        path = folder.path / name
        if not path.is_file():
            if split == "validation":
                continue
            raise UserError(f"{folder.title} has no {name} ({path}): add it, or leave the task out with --tasks")
        splits[split] = _read_split(path, folder.kind)
        inputs[name] = file_sha256(path)
    labels, record = _labels(folder, sorted(set().union(*(parsed.types for parsed in splits.values()))))
    if (folder.path / LABELS_FILE).is_file():
        inputs[LABELS_FILE] = file_sha256(folder.path / LABELS_FILE)

    salt = f"{seed} {folder.stem}"
    examples: dict[str, list[Example]] = {}
    for split, parsed in splits.items():
        usable = [(text, items) for text, items in parsed.rows if items or folder.kind != "ET"]
        parsed.counts["without_answer"] = len(parsed.rows) - len(usable)  # nothing to ask about
        examples[split] = [
            Example(text, write_prompt(folder.kind, labels, text, items, salt), write_answer(items))
            for text, items in usable
        ]
    record = {"source": folder.title, **record, "inputs": inputs}
    counts = {split: parsed.counts for split, parsed in splits.items()}
    return SourceTask(folder.stem, folder.kind, examples, counts, record)


def _read_split(path: Path, kind: str) -> _Parsed:
    label = f"{kind} file {path}"
    rows, lines = parse_json(read_text(path, label), label, is_record=_is_record)
    if not rows:
        raise UserError(f"{label} holds no records: leave it out or fill it")
    records = Records(label, rows, lines)
    parsed = _Parsed([], Counter(read=len(rows)), set())
    for index, row in enumerate(rows):
        try:
            sentence = row.get("sentence")
            text = "" if sentence is None else check_string(sentence, "sentence").strip()
            if not text:
                parsed.counts["without_text"] += 1
                continue
            items = _items(row, kind, parsed)
        except ValueError as error:
            raise UserError(f"{records.where(index)}: {error}") from error
        parsed.rows.append((text, items))
    return parsed


def _is_record(value: dict[str, Any]) -> bool:
    return "sentence" in value


def _items(row: dict[str, Any], kind: str, parsed: _Parsed) -> list[Item]:
    """What there is to find in a record, each item once; what is left out is counted."""
    field = "relations" if kind == "RE" else "entities"
    entries = row.get(field)
    if not isinstance(entries, list):
        found = type_name(entries) if field in row else f"missing (found: {', '.join(row)})"
        raise UserError(f"`{field}` is {found}: make it a list, empty if there is nothing to find")
    items: list[Item] = []
    for i, entry in enumerate(entries):
        place = f"{field}[{i}]"
        spans = [_part(entry, (part, "name"), place) for part in ("head", "tail")] if kind == "RE" else []
        item = (_part(entry, ("type",), place), *(spans or [_part(entry, ("name",), place)]))
        if item[0] in NO_TYPE or not all(item[1:]):
            parsed.counts["untyped_items"] += 1
        elif item in items:
            parsed.counts["repeated_items"] += 1  # answers are compared as sets
        else:
            _check_type(item[0], f"`{place}`")
            parsed.counts["items_with_semicolon"] += any(";" in span for span in item[1:])
            items.append(item)
            parsed.types.add(item[0])
    return items


def _part(entry: Any, path: tuple[str, ...], place: str) -> str:
    """A string of an entity or a relation, on one line; empty where it is null."""
    for key in path:
        if not isinstance(entry, dict) or key not in entry:
            raise UserError(f"`{place}` has no `{key}`: make it an object with one")
        entry, place = entry[key], f"{place}.{key}"
    return "" if entry is None else " ".join(check_string(entry, place).split())


def _check_type(name: str, place: str) -> None:
    if ":" in name or ";" in name:
        raise UserError(f"{place} has the type {name!r}: the answers' format needs `:` and `;` itself, so rename it")


def _labels(folder: TaskFolder, used: list[str]) -> tuple[list[str], dict[str, Any]]:
    """The options of a task, in order, and what the manifest says of them."""
    path = folder.path / LABELS_FILE
    label = f"{folder.kind} file {path}"
    if not path.is_file():
        if not used:
            raise UserError(f"{path} does not exist and no record has a type: write the list of types there")
        logger.warning("%s has no %s: its %d types are those of the records", folder.title, LABELS_FILE, len(used))
        return used, {"labels": used, "labels_from": "records"}
    value = load_json(read_text(path, label), label)
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise UserError(f'{label} is no list of strings: make it one, such as ["person", "place"]')
    labels = [name for name in dict.fromkeys(" ".join(name.split()) for name in value) if name not in NO_TYPE]
    for name in labels:
        _check_type(name, label)
        try:
            check_string(name, "type")
        except ValueError as error:
            raise UserError(f"{label}: {error}") from error
    if not labels:
        raise UserError(f"{label} names no type: fill it, or remove it to collect the types from the records")
    missing = [name for name in used if name not in labels]
    if missing:
        logger.warning(
            "%s: %s lacks %s, which the records have; added to the options",
            folder.title,
            LABELS_FILE,
            ", ".join(map(repr, missing)),
        )
    record = {"labels": labels + missing, "labels_from": LABELS_FILE}
    return labels + missing, record | ({"labels_added": missing} if missing else {})
