"""Controls of source labels: what training on them gives when somebody who does not know the task has answered.

`recipes/label.py --control` makes such labels and says so in `labels.json` beside them and in every record. Whoever
trains on them finds out here, wherever the files went.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from heterofusion.adapters.config import read_json_object

LABELS_FILE = "labels.json"  # beside the files of labels that recipes/label.py wrote
ANCHOR = "anchor"  # its name among those of the sources, of which none may have it
CONTROL_COLUMN = "control"  # of a label: the kind; labels that are none have no such column
LABEL_CONTROLS = ("bases", "shuffle", "anchor")
_WORDS = {
    "bases": "those of the sources' base models without their adapters (bases)",
    "shuffle": "those of sources that were chosen for other tasks (shuffle)",
    "anchor": "those of the anchor itself in place of the sources (anchor)",
}


def file_control(path: Path, labels: Iterable[Mapping[str, Any]]) -> str | None:
    """Kind of the control that a file of labels is of.

    Args:
        path: the file. A `labels.json` beside it counts if it tells of this file.
        labels: its records, which tell of themselves where the file was moved or joined with others.

    Returns:
        The kind, several joined by `+`; None if the labels are of whoever was chosen, or not of recipes/label.py.

    Raises:
        AdapterError: `labels.json` is damaged; names it.
    """
    kinds = [label.get(CONTROL_COLUMN) for label in labels]
    beside = path.parent / LABELS_FILE
    if beside.is_file():
        record = read_json_object(beside)
        tasks, control = record.get("tasks"), record.get("control")
        if isinstance(tasks, Mapping) and path.name in {f"{task}.jsonl" for task in tasks}:
            kinds.append(control.get("kind") if isinstance(control, Mapping) else None)
    return "+".join(kind for kind in LABEL_CONTROLS if kind in kinds) or None


def is_labelled_by_sources(record: Mapping[str, Any] | None) -> bool:
    """Whether a training record of source labels holds any that are not the anchor's own answers."""
    return record is not None and any(source != ANCHOR for file in record["files"] for source in file["by_source"])


def labels_control(record: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What records tell of the controls among source labels; None if there are none.

    Args:
        record: `source_labels` of a training.

    Returns:
        `kind` (several are joined by `+`), and `files`: the names of the files.
    """
    files = [file for file in (record or {}).get("files", []) if file.get("control")]
    if not files:
        return None
    kinds = {kind for file in files for kind in file["control"].split("+")}
    return {
        "kind": "+".join(kind for kind in LABEL_CONTROLS if kind in kinds),
        "files": [file["name"] for file in files],
    }


def describe_labels_control(record: Mapping[str, Any]) -> str:
    """What `labels_control` gave, in words: a clause."""
    words = " and ".join(_WORDS[kind] for kind in record["kind"].split("+"))
    return f"the source labels in {', '.join(record['files'])} are {words}"
