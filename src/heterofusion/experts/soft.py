"""What sources think of their own labels: kept beside the labels, and given to a training in the target's tokens.

    output_dir/soft/                        one entry per source, as `heterofusion.experts.soft_labels` writes it
    output_dir/soft/tokenizers/<source>/    the tokenizer that its token ids are of
    output_dir/soft/index.json              which label each answer of an entry is of, and a hash of every label

Tokens are aligned and mapped as FuseLLM does (`heterofusion.rivals.fusellm`): where DTW aligns one token of a
source with one of the target, and MinED maps the one to the other, the soft label is the source's top k, mapped to the
target's vocabulary and renormalized. Other tokens of the label have none. It is kept in `--logits_cache`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset, Features, List, Value, concatenate_datasets
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from heterofusion.data.formats import IGNORE_INDEX, detect_format, render, to_conversation, tokenize
from heterofusion.data.labels import SOFT_IDS, SOFT_POSITIONS, SOFT_PROBS, Origin, SourceLabelArguments, SourceLabels
from heterofusion.data.replay import examples_sha256
from heterofusion.experts.expert import Expert
from heterofusion.experts.identity import tokenizer_fingerprint
from heterofusion.experts.soft_labels import (
    SoftLabels,
    cache_folder,
    cache_key,
    labels_path,
    new_table,
    read_labels,
    read_table,
)
from heterofusion.experts.teachers import Teacher, collect_soft_labels
from heterofusion.experts.token_alignment import Aligner, Mapped, answer_symbols, symbols_of, used_tokens
from heterofusion.experts.vocabulary import VocabularyMap
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.files import display_name, read_json_object, told_writes, write_json
from heterofusion.runtime.loading import ModelArguments, load_tokenizer
from heterofusion.runtime.ranks import all_together

logger = logging.getLogger(__name__)

FOLDER = "soft"
INDEX_FILE = "index.json"
TOKENIZERS = "tokenizers"

_FORMAT = 1  # another number is another name
_FEATURES = Features(
    {
        SOFT_POSITIONS: List(Value("int32")),
        SOFT_IDS: List(List(Value("int32"))),
        SOFT_PROBS: List(List(Value("float32"))),
    }
)
_BATCH = 64  # examples that are aligned before they are written


@dataclass(frozen=True)
class OwnLabel:
    """A label of a source."""

    task: str
    line: int  # of its record in the task's file, from 0
    record: Mapping[str, Any]  # prompt and answer, in replay columns

    @property
    def sha256(self) -> str:
        """Hash of the record: it differs when any of its columns does."""
        return hashlib.sha256(json.dumps(dict(self.record), sort_keys=True, default=str).encode()).hexdigest()


# ---- labelling --------------------------------------------------------------------------------------------------


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
    examples = {name: _examples(experts[name], own) for name, own in labels.items()}
    kept = {name: used for name, (_, used) in examples.items() if used}
    teachers = [Teacher(experts[name], examples[name][0]) for name in kept]
    found = collect_soft_labels(teachers, folder, top_k, batch_size, device) if teachers else []
    seconds = sum(stored.seconds for stored in found)  # on disk: of earlier runs too, and the same on all ranks
    index: dict[str, Any] = {"top_k": top_k, "seconds": seconds, "sources": {}}
    for (name, used), teacher in zip(kept.items(), teachers, strict=True):
        identity = teacher.identity(top_k)
        index["sources"][name] = {
            "file": labels_path(folder, identity).name,
            "identity": identity,
            "tokenizer": f"{TOKENIZERS}/{name}",
            "labels": [[label.task, label.line] for label in used],
            "label_sha256": [label.sha256 for label in used],
        }
    ranks = PartialState()
    with all_together(ranks):
        if ranks.is_main_process:
            with told_writes(f"the soft labels could not be written to {folder}", "go on with --resume true"):
                for name in kept:
                    experts[name].tokenizer.save_pretrained(folder / TOKENIZERS / name)
                write_json(folder / INDEX_FILE, index)
    return index


def _examples(expert: Expert, labels: Sequence[OwnLabel]) -> tuple[Dataset, list[OwnLabel]]:
    """The labels as token ids with the answers marked, and those of them that can be: not empty, not too long."""
    rows: list[dict[str, list[int]]] = []
    used = []
    for label in labels:
        format = detect_format(label.record)
        assert format is not None  # for the type checker: the columns are ours
        rendered = render(*to_conversation(dict(label.record), format), format, expert.tokenizer)
        ids, answer = tokenize(rendered, expert.tokenizer) if rendered.spans else ([], [])
        if ids and (expert.context is None or len(ids) <= expert.context):
            rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": answer})
            used.append(label)
    if len(used) < len(labels):
        logger.info("%s: %d labels are empty or too long for soft labels", expert.name, len(labels) - len(used))
    return Dataset.from_list(rows), used


# ---- training ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Source:
    """A source whose soft labels are stored in a folder; its token ids are of its tokenizer."""

    name: str
    folder: Path
    identity: Mapping[str, Any]
    tokenizer: PreTrainedTokenizerBase

    def read(self) -> SoftLabels:
        """Open the soft labels, memory-mapped."""
        labels = read_labels(self.folder, self.identity)
        if labels is None:
            raise UserError(
                f"{labels_path(self.folder, self.identity)}, the soft labels of {self.name}, is missing or damaged: "
                "run recipes/label.py --top_k_logits again"
            )
        return labels


Answer = tuple[Source, int]  # whose label it is, and its number among the source's soft labels


@dataclass(frozen=True)
class Store:
    """All soft labels of one run of `recipes/label.py`, without their tables."""

    top_k: int
    tasks: frozenset[str]
    places: Mapping[tuple[str, int], tuple[Answer, str]]  # by task and line, with the hash of the record


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
    places: dict[tuple[str, int], tuple[Answer, str]] = {}
    for name, entry in index["sources"].items():
        own = folder / TOKENIZERS / Path(name).name  # a name from a file is no path
        if not own.is_dir():
            raise UserError(
                f"{own}, the tokenizer of the soft labels of {name}, does not exist: run recipes/label.py "
                "--top_k_logits again"
            )
        source = Source(name, folder, entry["identity"], load_tokenizer(ModelArguments(str(own)), None))
        for number, ((task, line), digest) in enumerate(zip(entry["labels"], entry["label_sha256"], strict=True)):
            places[task, line] = ((source, number), digest)
    return Store(index["top_k"], frozenset(task for task, _ in places), places)


def add_soft_labels(
    labels: SourceLabels, args: SourceLabelArguments, tokenizer: PreTrainedTokenizerBase
) -> tuple[Dataset, dict[str, Any], str]:
    """Give examples the soft labels of their sources. All ranks together: the main one makes them."""
    cache = cache_folder(args.logits_cache)
    stores = {folder: read_store(folder) for folder in {origin.path.parent: None for origin in labels.origins}}
    answers = [_find_answer(stores[origin.path.parent], origin) for origin in labels.origins]
    identity = {
        "format": _FORMAT,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "examples": examples_sha256(labels.examples),
        "answers": [answer and [cache_key(answer[0].identity), answer[1]] for answer in answers],
    }
    path = cache / f"soft-targets-{cache_key(identity)}"
    ranks = PartialState()
    with all_together(ranks):
        if ranks.is_main_process and read_table(path, _FEATURES) is None:
            _write(path, labels.examples, answers, tokenizer, cache)
    with all_together(ranks):
        found = read_table(path, _FEATURES, check=False)  # its content has just been checked, or written
        if found is None:
            raise UserError(f"--logits_cache {cache} is not the same folder on all machines; name one that is shared")
    data, kept = found
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
    return concatenate_datasets([labels.examples, data], axis=1), record, line


def _find_answer(store: Store, origin: Origin) -> Answer | None:
    """Where the soft labels of an example are; None if its label was stored without, as those too long are."""
    task = origin.path.stem
    if origin.path.name != f"{task}.jsonl" or task not in store.tasks:
        raise UserError(
            f"--source_labels {origin.path}: the soft labels beside it are of other files ("
            f"{', '.join(f'{name}.jsonl' for name in sorted(store.tasks)) or 'none'}); name those, label with "
            "--top_k_logits again, or leave --label_loss out"
        )
    answer, digest = store.places.get((task, origin.line), (None, None))
    if answer is not None and OwnLabel(task, origin.line, origin.record).sha256 != digest:
        raise UserError(
            f"{origin.where} is not the label that the soft labels beside the file are of: it was changed, or another "
            "run wrote it; label with --top_k_logits again, or leave --label_loss out"
        )
    return answer


def _write(
    path: Path, examples: Dataset, answers: Sequence[Answer | None], tokenizer: PreTrainedTokenizerBase, cache: Path
) -> None:
    """Make the soft labels of all examples, in their order, and write them a few at a time."""
    start = time.perf_counter()
    numbers: dict[Source, list[int]] = {}
    for source, number in filter(None, answers):
        numbers.setdefault(source, []).append(number)
    tables = {source: source.read() for source in numbers}
    target = answer_symbols(tokenizer, examples)
    maps: dict[str, VocabularyMap] = {}  # sources of one tokenizer share one
    aligners: dict[Source, Aligner] = {}
    for source, indices in numbers.items():
        stored, name = tables[source], tokenizer_fingerprint(source.tokenizer)
        if name not in maps:
            maps[name] = VocabularyMap(source.tokenizer, tokenizer, cache)
        maps[name].map(used_tokens(stored, indices), shown=True)
        symbols = symbols_of(source.tokenizer, [stored.of(index).tokens.tolist() for index in indices])
        aligners[source] = Aligner(symbols, target, maps[name])
    tokens = aligned = soft = 0
    with (
        new_table(path, _FEATURES) as table,
        tqdm(total=len(answers), desc="Aligning soft labels", unit="label", delay=3, leave=False) as bar,
    ):
        for first in range(0, len(answers), _BATCH):
            columns: dict[str, list[Any]] = {name: [] for name in _FEATURES}
            for place, answer in enumerate(answers[first : first + _BATCH], start=first):
                wanted = np.asarray(examples[place]["labels"], dtype=np.int32)
                positions = np.flatnonzero(wanted != IGNORE_INDEX)
                found: dict[int, Mapped] = {}
                pairs = 0
                if answer is not None:
                    source, number = answer
                    found, pairs = aligners[source].distributions(tables[source].of(number), wanted[positions])
                columns[SOFT_POSITIONS].append(positions[list(found)])
                columns[SOFT_IDS].append([ids for ids, _ in found.values()])
                columns[SOFT_PROBS].append([probs for _, probs in found.values()])
                tokens, aligned, soft = tokens + len(positions), aligned + pairs, soft + len(found)
            table.add(columns)
            bar.update(len(columns[SOFT_IDS]))
        seconds = round(time.perf_counter() - start, 3)
        table.record |= {"one_to_one": aligned / tokens, "soft": soft / tokens, "seconds": seconds}
