"""What a preparation leaves: JSON Lines files by purpose and task, a manifest, and a table that accounts for all."""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from heterofusion.data.files import load_json, read_text
from heterofusion.data.markdown import markdown_table
from heterofusion.preparation.splits import PreparedTask
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.files import file_sha256, staging_folder

MANIFEST = "manifest.json"
UNLABELLED = "unlabelled"
FILES = ("replay", "train", "validation", "test", UNLABELLED)
_STAGING = ".preparing-"

# Columns of the table: counts over all splits. Those in brackets are left out where they are zero for all tasks.
_COLUMNS = {
    "read": "read",
    "without_text": "no text",
    "without_answer": "no answer",
    "repeated": "repeated",
    "in other split": "in another split",
    "cut_for_validation": "(cut for validation)",
    "cut_for_unlabelled": "(cut for unlabelled)",
    "untyped_items": "(untyped items)",
    "repeated_items": "(repeated items)",
    "items_with_semicolon": "(items with ;)",
}


def check_output(folder: str | Path, overwrite: bool) -> Path:
    """Check that the files may be written to a folder, before anything is read.

    Args:
        folder: The output folder.
        overwrite: Whether it may hold something already.

    Returns:
        Its full path.

    Raises:
        ValueError: It is a file, or holds something and `overwrite` is not set, or its manifest is none of ours.
    """
    path = Path(folder).expanduser().absolute()
    if path.exists() and not path.is_dir():
        raise UserError(f"--output_dir {path} is a file: name a folder")
    if path.is_dir() and any(not entry.name.startswith(_STAGING) for entry in path.iterdir()):
        if not overwrite:
            raise UserError(f"--output_dir {path} is not empty: name another folder, or add --overwrite true")
        _written_before(path)
    return path


def _written_before(folder: Path) -> list[Path]:
    """The files that the manifest of a folder lists."""
    path = folder / MANIFEST
    if not path.exists():
        return []
    manifest = load_json(read_text(path, f"manifest {path}"), f"manifest {path}")
    try:
        names = [name for task in manifest["tasks"].values() for name in task["files"]]
        split = [name.split("/") for name in names]
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path} was not written by a preparation: name another --output_dir") from error
    if any(len(parts) != 2 or parts[0] not in FILES or not parts[1].endswith(".jsonl") for parts in split):
        raise UserError(f"{path} lists files that no preparation writes: name another --output_dir")
    return [folder / name for name in names]


def write_tasks(folder: Path, tasks: Sequence[PreparedTask], settings: Mapping[str, Any]) -> None:
    """Write `replay/NAME.jsonl`, `train/`, `validation/`, `test/`, `unlabelled/` and `manifest.json`.

    All is written beside its place and then moved there; files that an earlier manifest in the folder lists are
    removed first. The manifest is moved last: where it stands, the files that it lists are complete.

    Args:
        folder: The output folder, as `check_output` gave it.
        tasks: The tasks.
        settings: Seed and sizes, for the manifest.

    Raises:
        OSError: A file cannot be written.
    """
    with staging_folder(folder, _STAGING) as staging:
        entries = {}
        for task in tasks:
            written = {}
            for name in FILES:
                if not task.files[name]:
                    continue  # a data set that is empty is refused by what reads it
                path = staging / name / f"{task.name}.jsonl"
                _write_examples(path, task, name)
                written[f"{name}/{path.name}"] = {"records": len(task.files[name]), "sha256": file_sha256(path)}
            splits = {split: _plain(counts) for split, counts in task.counts.items()}
            entries[task.name] = {"kind": task.kind, **task.record, "splits": splits, "files": written}
        manifest = {"heterofusion": version("heterofusion"), **settings, "tasks": entries}
        text = json.dumps(manifest, indent=2, ensure_ascii=False)
        (staging / MANIFEST).write_text(text + "\n", encoding="utf-8")

        old = _written_before(folder)
        (folder / MANIFEST).unlink(missing_ok=True)
        for path in old:
            path.unlink(missing_ok=True)
        for path in sorted(staging.rglob("*.jsonl")):
            target = folder / path.relative_to(staging)
            target.parent.mkdir(exist_ok=True)
            os.replace(path, target)
        os.replace(staging / MANIFEST, folder / MANIFEST)


def _write_examples(path: Path, task: PreparedTask, name: str) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for example in task.files[name]:
            answer = {} if name == UNLABELLED else {"completion": example.completion}
            row = {"prompt": example.prompt, **answer, "task": task.name, "kind": task.kind}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _plain(counts: Counter[str]) -> dict[str, int]:
    """Counts that are not zero, and those of a split's records in any case."""
    return {name: count for name, count in counts.items() if count or name in ("read", "kept")}


def summary_table(tasks: Sequence[PreparedTask]) -> str:
    """What became of all records, as a Markdown table with a row per task.

    Args:
        tasks: The tasks.

    Returns:
        The table: records read (train + validation + test), those left out by reason, and those in every file.
    """
    counts = []
    for task in tasks:
        total: Counter[str] = sum(task.counts.values(), Counter())
        total["in other split"] = total["in_test"] + total["in_validation"] + total["in_unlabelled"]
        counts.append(total)
    shown = [key for key, title in _COLUMNS.items() if title[0] != "(" or any(total[key] for total in counts)]
    files = [name for name in FILES if name != UNLABELLED or any(task.files[name] for task in tasks)]
    rows = []
    for task, total in zip(tasks, counts, strict=True):
        read = " + ".join(str(task.counts[name]["read"]) for name in FILES if name in task.counts)
        left_out = [total[key] for key in shown if key != "read"]
        rows.append([task.name, read, *left_out, *(len(task.files[name]) for name in files)])
    header = ["task", *(_COLUMNS[key].strip("()") for key in shown), *files]
    return markdown_table(header, rows)
