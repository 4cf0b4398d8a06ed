"""Make replay, train, validation and test files of data in the InstructUIE layout.

    python recipes/uie/prepare.py --dataset_path IE_INSTRUCTIONS --output_dir data/uie \
        --tasks NER/mit-movie NER/TweetNER7 RE/New-York-Times-RE RE/conll04 ET/FindVehicle ET/FabNER

Writes output_dir/{replay,train,validation,test}/NER_mit-movie.jsonl and so on, prompts with their answers, and
manifest.json. The same data, flags and seed give the same files, byte for byte.

The layout: `NER/mit-movie/{train,dev,test,labels}.json`, and the same below `RE` and `ET`. A record is `{"sentence":
..., "entities": [{"name": ..., "type": ...}]}`, or of the kind RE `{"sentence": ..., "relations": [{"head": {"name":
...}, "type": ..., "tail": {"name": ...}}]}`. `labels.json` is the list of the types. Every file is a JSON array or
JSON Lines in UTF-8.
"""

import logging
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# what libraries warn of while they are imported must not stand beside an error
logging.getLogger().addHandler(logging.NullHandler())

from heterofusion.data.files import Records, load_json, parse_json, read_text
from heterofusion.data.formats import check_string, type_name
from heterofusion.evaluation.uie import KINDS
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.files import file_sha256
from heterofusion.runtime.flags import flag
from heterofusion.runtime.program import command, parse_arguments, set_up_logging

sys.path.append(str(Path(__file__).resolve().parents[1]))  # what this shares with glue/prepare.py
from _prepared import Example, PrepareArguments, PreparedTask, prepare, stable_number

logger = logging.getLogger("heterofusion.recipes.uie.prepare")

SPLIT_FILES = {"train": "train.json", "validation": "dev.json", "test": "test.json"}
LABELS_FILE = "labels.json"
NO_TYPE = ("", "NA")  # how the layout marks an item that is of none of the types

_ENTITIES = '"type1: word1; type2: word2"'
_RELATIONS = '"relation1: head1, tail1; relation2: head2, tail2"'
# Several for each kind, so that an expert learns the task and not one wording of it.
INSTRUCTIONS = {
    "NER": (
        f"Which words of the text are entities of the listed types? Answer in the form {_ENTITIES}, or None.",
        f"Go through the text and write down each entity with its type, as {_ENTITIES}; write None without any.",
        f"Name all entities in the text that fit one of the options. Use the form {_ENTITIES}, or None.",
    ),
    "RE": (
        f"Which pairs in the text stand in one of the listed relations? Answer in the form {_RELATIONS}, or None.",
        f"Go through the text and write down each related pair, as {_RELATIONS}; write None without any.",
        f"Name every relation of the options that the text states, with its pair. Use the form {_RELATIONS}, or None.",
    ),
    "ET": (
        f"Which of the listed types does each of the given entities have? Answer in the form {_ENTITIES}.",
        f"Put every entity of the list under one of the options, as {_ENTITIES}.",
        f"Decide what type the given entities are in this text. Use the form {_ENTITIES}.",
    ),
}
Item = tuple[str, ...]  # (type, span), or (relation, head, tail)


@dataclass
class UieArguments:
    """What is read."""

    dataset_path: str = flag(help="Folder in the InstructUIE layout: it holds NER, RE or ET.")
    tasks: list[str] = flag(
        default_factory=list,
        help="Tasks such as NER/mit-movie, all by default; ET/NAME is also made of NER/NAME where there is no "
        "folder of that name in ET.",
    )


@dataclass(frozen=True)
class TaskFolder:
    """Folder of one task: its kind (NER, RE or ET), and its path below that of the kind as its name."""

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


def find_tasks(dataset_path: str) -> list[TaskFolder]:
    """All tasks of a folder, one or two levels below `NER`, `RE` and `ET`, by kind and name."""
    root = Path(dataset_path).expanduser().absolute()
    if not root.is_dir():
        raise UserError(f"--dataset_path {root} is no folder: name the one that holds NER, RE or ET")
    tasks: list[TaskFolder] = []
    for folder in _subfolders(root):
        if folder.name not in KINDS:
            logger.info("skipped %s: its name is none of %s", folder, ", ".join(KINDS))
            continue
        for path in _subfolders(folder):
            found = [
                each for each in (path, *_subfolders(path)) if any((each / n).is_file() for n in SPLIT_FILES.values())
            ]
            found = found[:1] if path in found else found
            tasks += [TaskFolder(folder.name, each.relative_to(folder).as_posix(), each) for each in found]
            if not found:
                logger.warning("skipped %s: it holds none of %s", path, ", ".join(SPLIT_FILES.values()))
    if not tasks:
        names = ", ".join(SPLIT_FILES.values())
        raise UserError(
            f"--dataset_path {root} holds no task: it must have folders such as NER/mit-movie with {names}"
        )
    for task in tasks:
        if not task.name.isprintable():  # a line break, or bytes that are not UTF-8: no file of it could be named
            raise UserError(f"the folder {task.title!r} in {root} has a name that cannot be printed: rename it")
    return sorted(tasks, key=lambda task: (KINDS.index(task.kind), task.name))


def _subfolders(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith((".", "__"))]


def select_tasks(found: Sequence[TaskFolder], wanted: Sequence[str]) -> list[TaskFolder]:
    """The tasks that are to be prepared, each once, in the order wanted; all if none is named."""
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


def read_task(folder: TaskFolder, seed: int) -> PreparedTask:
    """Read one task and write its prompts and answers; `seed` chooses between wordings."""
    read: dict[str, list[tuple[str, list[Item]]]] = {}
    counts: dict[str, Counter[str]] = {}
    inputs: dict[str, str] = {}
    for split, name in SPLIT_FILES.items():
        path = folder.path / name
        if path.is_file():
            counts[split] = Counter()
            read[split] = _read_split(path, folder.kind, counts[split])
            inputs[name] = file_sha256(path)
        elif split != "validation":
            raise UserError(f"{folder.title} has no {name} ({path}): add it, or leave the task out with --tasks")
    used = sorted({item[0] for rows in read.values() for _, items in rows for item in items})
    record = _labels(folder, used)
    if (folder.path / LABELS_FILE).is_file():
        inputs[LABELS_FILE] = file_sha256(folder.path / LABELS_FILE)
    examples: dict[str, list[Example]] = {}
    for split, rows in read.items():
        usable = [(text, items) for text, items in rows if items or folder.kind != "ET"]
        counts[split]["without_answer"] = len(rows) - len(usable)  # nothing to ask about
        examples[split] = [
            Example(
                text,
                write_prompt(folder.kind, record["labels"], text, items, f"{seed} {folder.stem}"),
                write_answer(items),
            )
            for text, items in usable
        ]
    return PreparedTask(
        folder.stem, folder.kind, examples, counts, {"source": folder.title, **record, "inputs": inputs}
    )


def _read_split(path: Path, kind: str, counts: Counter[str]) -> list[tuple[str, list[Item]]]:
    """Sentences of one file with what there is to find in each."""
    label = f"{kind} file {path}"
    records = Records(label, *parse_json(read_text(path, label), label, is_record=lambda row: "sentence" in row))
    if not records.rows:
        raise UserError(f"{label} holds no records: leave it out or fill it")

    def read(row: dict[str, Any]) -> tuple[str, list[Item]]:
        text = "" if row.get("sentence") is None else check_string(row["sentence"], "sentence").strip()
        return text, _items(row, kind, counts) if text else []

    counts["read"] = len(records.rows)
    rows = [records.call(i, read, row) for i, row in enumerate(records.rows)]
    kept = [(text, items) for text, items in rows if text]
    counts["without_text"] = len(rows) - len(kept)
    return kept


def _items(row: dict[str, Any], kind: str, counts: Counter[str]) -> list[Item]:
    """What there is to find in a record, each item once; what is left out is counted."""
    name = "relations" if kind == "RE" else "entities"
    entries = row.get(name)
    if not isinstance(entries, list):
        found = type_name(entries) if name in row else f"missing (found: {', '.join(row)})"
        raise UserError(f"`{name}` is {found}: make it a list, empty if there is nothing to find")
    items: list[Item] = []
    for i, entry in enumerate(entries):
        place = f"{name}[{i}]"
        spans = [_part(entry, (part, "name"), place) for part in ("head", "tail")] if kind == "RE" else []
        item = (_part(entry, ("type",), place), *(spans or [_part(entry, ("name",), place)]))
        if item[0] in NO_TYPE or not all(item[1:]):
            counts["untyped_items"] += 1
        elif item in items:
            counts["repeated_items"] += 1  # answers are compared as sets
        else:
            _check_type(item[0], f"`{place}`")
            counts["items_with_semicolon"] += any(";" in span for span in item[1:])  # the answer shows two items
            items.append(item)
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


def _labels(folder: TaskFolder, used: list[str]) -> dict[str, Any]:
    """The options of a task, in order, and where they are from: what the manifest says of them."""
    path = folder.path / LABELS_FILE
    if not path.is_file():
        if not used:
            raise UserError(f"{path} does not exist and no record has a type: write the list of types there")
        logger.warning("%s has no %s: its %d types are those of the records", folder.title, LABELS_FILE, len(used))
        return {"labels": used, "labels_from": "records"}
    label = f"{folder.kind} file {path}"
    value = load_json(read_text(path, label), label)
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise UserError(f'{label} is no list of strings: make it one, such as ["person", "place"]')
    labels = [name for name in dict.fromkeys(" ".join(name.split()) for name in value) if name not in NO_TYPE]
    if not labels:
        raise UserError(f"{label} names no type: fill it, or remove it to collect the types from the records")
    for name in labels:
        _check_type(check_string(name, f"type in {label}"), label)
    missing = [name for name in used if name not in labels]
    record: dict[str, Any] = {"labels": labels + missing, "labels_from": LABELS_FILE}
    if missing:
        names = ", ".join(map(repr, missing))
        logger.warning(
            "%s: %s lacks %s, which the records have; added to the options", folder.title, LABELS_FILE, names
        )
        record["labels_added"] = missing
    return record


def write_prompt(kind: str, labels: Sequence[str], text: str, items: Iterable[Item], salt: str) -> str:
    """The prompt of one record, which ends in `Answer:`; `salt` chooses one of the wordings for every text."""
    wordings = INSTRUCTIONS[kind]
    instruction = wordings[stable_number(f"{salt} wording", text) % len(wordings)]
    lines = [instruction, f"Option: {', '.join(labels)}", f"Text: {text}"]
    if kind == "ET":
        lines.append(f"Entities: {', '.join(dict.fromkeys(item[1] for item in items))}")
    return "\n".join([*lines, "Answer:"])


def write_answer(items: Iterable[Item]) -> str:
    """The answer of one record, with its leading space; ` None` without items."""
    return " " + ("; ".join(f"{label}: {', '.join(spans)}" for label, *spans in items) or "None")


@command
def main(argv: list[str]) -> None:
    source, args = parse_arguments((UieArguments, PrepareArguments), argv, __doc__)
    set_up_logging(hold=True)
    folders = select_tasks(find_tasks(source.dataset_path), source.tasks)
    prepare((read_task(folder, args.seed) for folder in folders), args, "InstructUIE")


if __name__ == "__main__":
    sys.exit(main())
