"""What sources think of their own labels: the most probable tokens at every position, on disk.

    output_dir/soft/                        one entry per source, as `heterofusion.experts.soft_labels` writes it
    output_dir/soft/tokenizers/<source>/    the tokenizer that its token ids are of
    output_dir/soft/index.json              which label each answer of an entry is of

All that labelling needs of the distillation baseline is here: it runs a source over its labels as over a replay. The
index holds a hash of every label, so that who reads it later knows whether the files beside it are still those labels.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from heterofusion.data.formats import detect_format, render, to_conversation, tokenize
from heterofusion.experts.expert import Expert
from heterofusion.experts.soft_labels import SoftLabels, labels_path, read_labels
from heterofusion.experts.teachers import Teacher, collect_soft_labels
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.files import read_json_object, told_writes, write_json
from heterofusion.runtime.loading import ModelArguments, load_tokenizer
from heterofusion.runtime.ranks import all_together

logger = logging.getLogger(__name__)

FOLDER = "soft"
INDEX_FILE = "index.json"
TOKENIZERS = "tokenizers"


@dataclass(frozen=True)
class OwnLabel:
    """A label of a source.

    Args:
        task: Of the label.
        line: Of its record in the task's file, from 0.
        record: Prompt and answer, in replay columns.
    """

    task: str
    line: int
    record: Mapping[str, Any]


def check_soft(experts: Sequence[Expert]) -> None:
    """Check, before anything is loaded, that sources can be run over answers."""
    for expert in experts:
        if not expert.tokenizer.is_fast:
            raise UserError(
                f"{expert.name}: --top_k_logits needs a fast tokenizer, which tells what its tokens stand for; save "
                "one with a tokenizer.json, or leave the flag out"
            )
        if expert.adapter is not None and expert.adapter.virtual_tokens:
            raise UserError(
                f"{expert.name} puts tokens before the prompt, so its logits stand at other positions; leave "
                "--top_k_logits out, or give a LoRA"
            )


def store_soft_labels(
    output_dir: Path,
    experts: Mapping[str, Expert],
    labels: Mapping[str, Sequence[OwnLabel]],
    top_k: int,
    batch_size: int,
    device: torch.device,
) -> dict[str, Any]:
    """Run sources over their labels and keep what they think. All ranks together: the main one runs models."""
    folder = output_dir / FOLDER
    teachers, kept, seconds = [], {}, 0.0
    for name, own in labels.items():
        examples, used = _examples(experts[name], own)
        if used:
            kept[name] = used
            teachers.append(Teacher(experts[name], examples))
    if teachers:
        found = collect_soft_labels(teachers, folder, top_k, batch_size, device)
        seconds = sum(stored.seconds for stored in found)  # on disk: of earlier runs too, and the same on all ranks
    index: dict[str, Any] = {"top_k": top_k, "seconds": seconds, "sources": {}}
    for (name, used), teacher in zip(kept.items(), teachers, strict=True):
        identity = teacher.identity(top_k)
        index["sources"][name] = {
            "file": labels_path(folder, identity).name,
            "identity": identity,
            "tokenizer": f"{TOKENIZERS}/{name}",
            "labels": [[label.task, label.line] for label in used],
            "label_sha256": [record_sha256(label.record) for label in used],
        }
    ranks = PartialState()
    with all_together(ranks):
        if ranks.is_main_process:
            with told_writes(f"the soft labels could not be written to {folder}", "go on with --resume true"):
                for name in kept:
                    experts[name].tokenizer.save_pretrained(folder / TOKENIZERS / name)
                write_json(folder / INDEX_FILE, index)
    return index


def record_sha256(record: Mapping[str, Any]) -> str:
    """Hash of a label's record: it differs when any of its columns does."""
    return hashlib.sha256(json.dumps(dict(record), sort_keys=True, default=str).encode()).hexdigest()


@dataclass(frozen=True)
class StoredSource:
    """A source whose soft labels are stored.

    Args:
        name: Of the source.
        folder: Of the store.
        identity: Of its soft labels.
        tokenizer: That its token ids are of.
    """

    name: str
    folder: Path
    identity: Mapping[str, Any]
    tokenizer: PreTrainedTokenizerBase

    def read(self, check: bool) -> SoftLabels:
        """Open the soft labels, memory-mapped."""
        labels = read_labels(self.folder, self.identity, check)
        if labels is None:
            raise UserError(
                f"{labels_path(self.folder, self.identity)}, the soft labels of {self.name}, is missing or damaged: "
                "run recipes/label.py --top_k_logits again"
            )
        return labels


@dataclass(frozen=True)
class StoredLabels:
    """All soft labels of one run of `recipes/label.py`.

    Args:
        top_k: Tokens per position.
        tasks: That have soft labels.
        sources: By name.
        places: By task and line, the source, the index of the answer in its soft labels, and the hash of the record.
    """

    top_k: int
    tasks: frozenset[str]
    sources: Mapping[str, StoredSource]
    places: Mapping[tuple[str, int], tuple[str, int, str]]


def read_store(output_dir: Path) -> StoredLabels:
    """What is stored beside files of labels, without its tables."""
    folder = output_dir / FOLDER
    path = folder / INDEX_FILE
    if not path.is_file():
        raise UserError(
            f"--label_loss is soft, but there are no soft labels beside the files in {output_dir} ({path} does not "
            "exist): run recipes/label.py with --top_k_logits, or leave --label_loss out"
        )
    index = read_json_object(path)
    sources: dict[str, StoredSource] = {}
    places: dict[tuple[str, int], tuple[str, int, str]] = {}
    for name, entry in index["sources"].items():
        tokenizer = _read_tokenizer(name, folder / TOKENIZERS / Path(name).name)  # a name from a file is no path
        sources[name] = StoredSource(name, folder, entry["identity"], tokenizer)
        for answer, ((task, line), digest) in enumerate(zip(entry["labels"], entry["label_sha256"], strict=True)):
            places[task, line] = (name, answer, digest)
    return StoredLabels(index["top_k"], frozenset(task for task, _ in places), sources, places)


def _read_tokenizer(name: str, folder: Path) -> PreTrainedTokenizerBase:
    if not folder.is_dir():
        raise UserError(
            f"{folder}, the tokenizer of the soft labels of {name}, does not exist: run recipes/label.py "
            "--top_k_logits again"
        )
    return load_tokenizer(ModelArguments(str(folder)), None)


def _examples(expert: Expert, labels: Sequence[OwnLabel]) -> tuple[Dataset, list[OwnLabel]]:
    """The labels as token ids with the answers marked, and those of them that can be: not empty, not too long."""
    context = getattr(expert.config.get_text_config(), "max_position_embeddings", None)
    rows: list[dict[str, list[int]]] = []
    used = []
    for label in labels:
        format = detect_format(label.record)
        assert format is not None  # for the type checker: the columns are ours
        rendered = render(*to_conversation(dict(label.record), format), format, expert.tokenizer)
        ids, answer = tokenize(rendered, expert.tokenizer) if rendered.spans else ([], [])
        if not ids or (context is not None and len(ids) > context):
            continue
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": answer})
        used.append(label)
    if len(used) < len(labels):
        logger.info("%s: %d labels are empty or too long for soft labels", expert.name, len(labels) - len(used))
    return Dataset.from_list(rows), used
