"""Answers as they come, one file per process, so that a kill loses one batch at most.

    output_dir/parts/<key>/rank-0.jsonl

The key is a hash of everything that the answers depend on: the model, the prompts as token ids, and how is generated.
Whoever asks the same of the same model finds what is there, and nothing else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from heterofusion.evaluation.store import PartWriter, read_records
from heterofusion.experts.label_generation import Label

_FORMAT = 1  # of part files; another number is another folder


def parts_folder(folder: Path, identity: Mapping[str, Any]) -> Path:
    """Where answers with an identity are.

    Args:
        folder: Of all parts.
        identity: Plain values; other ones are another folder.
    """
    key = json.dumps({"format": _FORMAT, **identity}, sort_keys=True)
    return folder / hashlib.sha256(key.encode()).hexdigest()[:24]


def write_labels(part: PartWriter, labels: Sequence[Label], seconds: float) -> None:
    """Append a batch of labels that took so long to a part file."""
    share = round(seconds / len(labels), 6)
    part.write_records(
        {
            "index": label.index,
            "text": label.text,
            "new_tokens": label.new_tokens,
            "log_probability": round(label.log_probability, 5),
            "ended": label.ended,
            "seconds": share,
        }
        for label in labels
    )


def read_parts(folder: Path) -> tuple[dict[int, Label], float]:
    """Read the labels that all processes of all runs left in a folder.

    Args:
        folder: `parts/<key>`; it need not exist.

    Returns:
        The labels by index, and the seconds of generation: those of the process that took longest.
    """

    def label(record: Mapping[str, Any]) -> Label:
        return Label(
            int(record["index"]),
            str(record["text"]),
            int(record["new_tokens"]),
            float(record["log_probability"]),
            bool(record["ended"]),
        )

    return read_records(folder, label)
