"""Files of an evaluation: its state, predictions as they come, and what is finished.

    output_dir/state.json                  what is evaluated; written first, so that a resumed run can compare
    output_dir/parts/<label>/rank-0.jsonl  answers of one process, batch by batch, until all is finished
    output_dir/predictions/<label>.jsonl   all answers, in the order of the data set
    output_dir/results.json                written last: where it stands, the evaluation is complete

With several adapters, all but the state is in a folder per adapter. Processes on several machines need a common file
system.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from heterofusion.evaluation.arguments import is_file_name
from heterofusion.experts.generation import Answer
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.files import TEMPORARY, write_whole

logger = logging.getLogger(__name__)

STATE_FILE = "state.json"
RESULTS_FILE = "results.json"
PREDICTIONS = "predictions"
PARTS = "parts"
Generated = TypeVar("Generated", bound=Answer)


# ---- whole files ------------------------------------------------------------------------------------------------


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON so that the file is there as a whole or not at all."""
    write_whole(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, so that the file is there as a whole or not at all."""
    write_whole(path, (json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON object that `write_json` wrote; None where there is no file.

    Raises:
        ValueError: it is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); start anew with --overwrite true") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object; start anew with --overwrite true")
    return content


def read_predictions(path: Path) -> tuple[list[str], list[str]]:
    """Predictions and references of a finished data set.

    Raises:
        ValueError: the file is missing or damaged.
    """
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        return [record["prediction"] for record in records], [record["reference"] for record in records]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}); start anew with --overwrite true") from error


# ---- the folder as a whole --------------------------------------------------------------------------------------


def adapter_folder(output_dir: Path, name: str, count: int) -> Path:
    """Where the results of one of `count` adapters go."""
    return output_dir if count == 1 else output_dir / name


def check_same(output_dir: Path, state: Mapping[str, Any]) -> None:
    """Check that an output folder holds an evaluation with these settings, or nothing.

    Args:
        output_dir: The folder.
        state: The settings of this run.

    Raises:
        ValueError: it holds something else, or a setting differs; names the first.
    """
    found = read_json(output_dir / STATE_FILE)
    if found is None:
        if output_dir.is_dir() and any(path.suffix != TEMPORARY for path in output_dir.iterdir()):
            raise UserError(f"--resume: {output_dir} holds no evaluation ({STATE_FILE} is missing); name another")
        return
    there, here = _flat(found), _flat(state)
    for field in dict.fromkeys((*here, *there)):
        if there.get(field) != here.get(field):
            raise UserError(
                f"--resume: {output_dir} holds an evaluation with another {field}: {there.get(field)}, this one has "
                f"{here.get(field)}; give the same flags, or another --output_dir"
            )


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{prefix}{key} ") if isinstance(item, dict) else {f"{prefix}{key}": item}
    return flat


def remove_evaluation(output_dir: Path) -> None:
    """Remove what an earlier evaluation wrote, and nothing else."""
    try:
        state = read_json(output_dir / STATE_FILE) or {}
    except ValueError:
        state = {}
    names = [name for name in state.get("adapters") or {} if is_file_name(name)]
    labels = [label for label in state.get("datasets") or {} if is_file_name(label)]
    for folder in [output_dir / name for name in names] if "adapters" in state else [output_dir]:
        (folder / RESULTS_FILE).unlink(missing_ok=True)
        for label in labels:
            (folder / PREDICTIONS / f"{label}.jsonl").unlink(missing_ok=True)
            remove_parts(folder, label)
        for emptied in (folder / PREDICTIONS, folder / PARTS, *([folder] if folder != output_dir else [])):
            if emptied.is_dir() and not any(emptied.iterdir()):
                emptied.rmdir()
    (output_dir / STATE_FILE).unlink(missing_ok=True)


def remove_parts(folder: Path, label: str) -> None:
    """Remove the part files of a data set, and their folder with the last of them."""
    shutil.rmtree(folder / PARTS / label, ignore_errors=True)
    parts = folder / PARTS
    if parts.is_dir() and not any(parts.iterdir()):
        parts.rmdir()
