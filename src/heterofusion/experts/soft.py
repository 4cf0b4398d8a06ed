"""What sources think of their own labels: kept beside the labels, and given to a training in the target's tokens.

output_dir/soft/                        one entry per source, as `heterofusion.experts.soft_labels` writes it
output_dir/soft/tokenizers/<source>/    the tokenizer that its token ids are of
output_dir/soft/index.json              which label each answer of an entry is of, and a hash of every label
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from heterofusion.data.formats import detect_format, render, to_conversation, tokenize
from heterofusion.data.labels import Origin, SourceLabelArguments, SourceLabels
from heterofusion.data.replay import as_dataset
from heterofusion.experts.expert import Expert
from heterofusion.experts.soft_labels import Teacher, cache_folder, collect_soft_labels, labels_path
from heterofusion.experts.token_alignment import Answer, Source, add_aligned
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.files import display_name, read_json_object, told_writes, write_json
from heterofusion.runtime.loading import ModelArguments, load_tokenizer
from heterofusion.runtime.ranks import all_together

logger = logging.getLogger(__name__)

FOLDER = "soft"
INDEX_FILE = "index.json"
TOKENIZERS = "tokenizers"

Place = tuple[str, int]  # of a label: its task, and the line of its record in the task's file, from 0


def _sha256(label: Mapping[str, Any]) -> str:
    """Hash of a label's record."""
    return hashlib.sha256(json.dumps(dict(label), sort_keys=True, default=str).encode()).hexdigest()


# ---- labelling --------------------------------------------------------------------------------------------------


def store_soft_labels(
    output_dir: Path,
    experts: Mapping[str, Expert],
    labels: Mapping[str, Sequence[Mapping[str, Any]]],
    top_k: int,
    batch_size: int,
    device: torch.device,
) -> float:
    """Run sources over their own `labels`, by task, and keep what they think; the seconds that it took in all runs.

    All ranks together: the main one runs models.
    """
    folder, ranks = output_dir / FOLDER, PartialState()
    own: dict[str, dict[Place, Mapping[str, Any]]] = {}
    for task, records in labels.items():
        for line, record in enumerate(records):
            own.setdefault(record["source"], {})[task, line] = record
    teachers: list[Teacher] = []
    used: list[list[Place]] = []
    for name, records_of in own.items():
        examples, places = _examples(experts[name], records_of)
        if places:
            teachers.append(Teacher(experts[name], examples))
            used.append(places)
    found = collect_soft_labels(teachers, folder, top_k, batch_size, device) if teachers else []
    seconds = sum(stored.seconds for stored in found)  # on disk: of earlier runs too, and the same on all ranks
    sources = {
        teacher.expert.name: {
            "file": labels_path(folder, stored.identity).name,
            "identity": stored.identity,
            "tokenizer": f"{TOKENIZERS}/{teacher.expert.name}",
            "labels": places,
            "label_sha256": [_sha256(own[teacher.expert.name][place]) for place in places],
        }
        for teacher, stored, places in zip(teachers, found, used, strict=True)
    }
    with all_together(ranks):
        if ranks.is_main_process:
            with told_writes(f"the soft labels could not be written to {folder}", "go on with --resume true"):
                for name in sources:
                    experts[name].tokenizer.save_pretrained(folder / TOKENIZERS / name)
                write_json(folder / INDEX_FILE, {"top_k": top_k, "seconds": seconds, "sources": sources})
    return seconds


def _examples(expert: Expert, labels: Mapping[Place, Mapping[str, Any]]) -> tuple[Dataset, list[Place]]:
    """The labels as token ids with the answers marked, and those of them that can be: not empty, not too long."""
    rows = []
    used = []
    for place, label in labels.items():
        format = str(detect_format(label))  # the columns are ours
        rendered = render(*to_conversation(dict(label), format), format, expert.tokenizer)
        ids, answer = tokenize(rendered, expert.tokenizer) if rendered.spans else ([], [])
        if ids and (expert.context is None or len(ids) <= expert.context):
            rows.append((ids, answer))
            used.append(place)
    if len(used) < len(labels):
        logger.info("%s: %d labels are empty or too long for soft labels", expert.name, len(labels) - len(used))
    return as_dataset(rows), used


# ---- training ---------------------------------------------------------------------------------------------------


class Store(NamedTuple):
    """All soft labels of one run of `recipes/label.py`, without their tables."""

    top_k: int
    tasks: frozenset[str]
    places: dict[Place, tuple[Answer, str]]  # with the hash of the record


def read_store(output_dir: Path) -> Store:
    """What is stored beside files of labels."""
    folder = output_dir / FOLDER
    path = folder / INDEX_FILE
    if not path.is_file():
        raise UserError(
            f"--label_loss is soft, but there are no soft labels beside the files in {output_dir} ({path} does not "
            "exist): run recipes/label.py with --top_k_logits, or leave --label_loss out"
        )
    index = read_json_object(path)
    places: dict[Place, tuple[Answer, str]] = {}
    for name, entry in index["sources"].items():
        own = folder / TOKENIZERS / Path(name).name  # a name from a file is no path
        source = Source(name, folder, entry["identity"], load_tokenizer(ModelArguments(str(own)), None))
        for number, ((task, line), digest) in enumerate(zip(entry["labels"], entry["label_sha256"], strict=True)):
            places[task, line] = ((source, number), digest)
    return Store(index["top_k"], frozenset(task for task, _ in places), places)


def add_soft_labels(
    labels: SourceLabels, args: SourceLabelArguments, tokenizer: PreTrainedTokenizerBase
) -> tuple[Dataset, dict[str, Any], str]:
    """Give examples the soft labels of their sources; also what is recorded and logged of them. All ranks together."""
    cache = cache_folder(args.logits_cache)
    stores = {folder: read_store(folder) for folder in {origin.path.parent: None for origin in labels.origins}}
    answers = [_find_answer(stores[origin.path.parent], origin) for origin in labels.origins]
    examples, kept = add_aligned(labels.examples, tokenizer, answers, cache)
    if not kept["soft"]:
        raise UserError(
            "--label_loss is soft, but no token of the source labels has a soft label: no answer was stored, or the "
            "tokenizers of sources and target share nothing; leave --label_loss out"
        )
    counts = Counter(display_name(answer[0].name) for answer in answers if answer is not None)
    record = {
        "weight": args.soft_weight,
        "top_k": max(store.top_k for store in stores.values()),
        "examples": dict(sorted(counts.items())),
        "one_to_one": kept["one_to_one"],
        "soft": kept["soft"],
    }
    line = (
        f"soft labels of {counts.total()} examples: {record['one_to_one']:.1%} of the label tokens are aligned one to "
        f"one with a source's, {record['soft']:.1%} have its distribution"
    )
    return examples, record, line


def _find_answer(store: Store, origin: Origin) -> Answer | None:
    """Where the soft labels of an example are; None if its label was stored without, as those too long are."""
    task = origin.path.stem
    answer, digest = store.places.get((task, origin.line), (None, None))
    known = origin.path.name == f"{task}.jsonl" and task in store.tasks
    if not known or (answer is not None and _sha256(origin.record) != digest):
        raise UserError(
            f"{origin.where} is not a label that the soft labels beside the file are of: it was changed, renamed or "
            "written by another run; label with --top_k_logits again, or leave --label_loss out"
        )
    return answer
