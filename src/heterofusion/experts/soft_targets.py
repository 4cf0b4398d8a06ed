"""Soft labels for training: what sources thought of their labels, in the tokens of the target.

Tokens are aligned and mapped as FuseLLM does (`heterofusion.rivals.fusellm`): where DTW aligns one token of a
source with one of the target, and MinED maps the one to the other, the soft label is the source's top k, mapped to the
target's vocabulary and renormalized. Other tokens of the label have none.

The result is kept in `--logits_cache`: another store, other labels, or another tokenizer are another file.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from datasets import Dataset, Features, List, Value, concatenate_datasets
from numpy.typing import NDArray
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from heterofusion.data.formats import IGNORE_INDEX
from heterofusion.data.labels import SOFT_IDS, SOFT_POSITIONS, SOFT_PROBS, Origin, SourceLabelArguments, SourceLabels
from heterofusion.data.replay import examples_sha256
from heterofusion.experts.identity import tokenizer_fingerprint
from heterofusion.experts.soft import StoredLabels, StoredSource, read_store, record_sha256
from heterofusion.experts.soft_labels import SoftLabels
from heterofusion.experts.store import cache_folder, cache_key, new_table, read_table
from heterofusion.experts.token_alignment import Aligner, Mapped, answer_symbols, symbols_of, used_tokens
from heterofusion.experts.vocabulary import VocabularyMap
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.files import display_name
from heterofusion.runtime.ranks import all_together

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
class Answer:
    """Where the soft labels of an example are.

    Args:
        source: whose label it is.
        index: of the answer in the source's soft labels.
    """

    source: StoredSource
    index: int


def add_soft_labels(
    labels: SourceLabels, args: SourceLabelArguments, tokenizer: PreTrainedTokenizerBase
) -> tuple[Dataset, dict[str, Any], str]:
    """Give examples the soft labels of their sources. All ranks together: the main one makes them."""
    cache = cache_folder(args.logits_cache)
    stores = {folder: read_store(folder) for folder in {origin.path.parent: None for origin in labels.origins}}
    answers = [find_answer(stores[origin.path.parent], origin) for origin in labels.origins]
    identity = {
        "format": _FORMAT,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "examples": examples_sha256(labels.examples),
        "answers": [
            None if answer is None else [cache_key(answer.source.identity), answer.index] for answer in answers
        ],
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
    record = {
        "weight": args.soft_weight,
        "top_k": max(store.top_k for store in stores.values()),
        "examples": _by_source(answers),
        "one_to_one": kept["one_to_one"],
        "soft": kept["soft"],
    }
    line = (
        f"soft labels of {sum(record['examples'].values())} examples: {record['one_to_one']:.1%} of the label tokens "
        f"are aligned one to one with a source's, {record['soft']:.1%} have its distribution"
    )
    return concatenate_datasets([labels.examples, data], axis=1), record, line


def find_answer(store: StoredLabels, origin: Origin) -> Answer | None:
    """Where the soft labels of an example are; None if its label was stored without, as those too long are."""
    task = origin.path.stem
    if origin.path != origin.path.parent / f"{task}.jsonl" or task not in store.tasks:
        raise UserError(
            f"--source_labels {origin.path}: the soft labels beside it are of other files ("
            f"{', '.join(f'{name}.jsonl' for name in sorted(store.tasks)) or 'none'}); name those, label "
            "with --top_k_logits again, or leave --label_loss out"
        )
    found = store.places.get((task, origin.line))
    if found is None:
        return None
    source, index, digest = found
    if record_sha256(origin.record) != digest:
        raise UserError(
            f"{origin.where} is not the label that the soft labels beside the file are of: it was changed, or another "
            "run wrote it; label with --top_k_logits again, or leave --label_loss out"
        )
    return Answer(store.sources[source], index)


def _by_source(answers: Sequence[Answer | None]) -> dict[str, int]:
    counts = Counter(display_name(answer.source.name) for answer in answers if answer is not None)
    return dict(sorted(counts.items()))


# ---- making them ------------------------------------------------------------------------------------------------


def _write(
    path: Path, examples: Dataset, answers: Sequence[Answer | None], tokenizer: PreTrainedTokenizerBase, cache: Path
) -> None:
    """Make the soft labels of all examples, in their order, and write them a few at a time."""
    start = time.perf_counter()
    by_source: dict[int, list[Answer]] = {}  # sources of different stores may have one name
    for answer in answers:
        if answer is not None:
            by_source.setdefault(id(answer.source), []).append(answer)
    tables = {key: found[0].source.read(check=True) for key, found in by_source.items()}
    aligners = _aligners(by_source, tables, examples, tokenizer, cache)
    tokens = aligned = soft = 0
    with (
        new_table(path, _FEATURES) as table,
        tqdm(total=len(answers), desc="Aligning soft labels", unit="label", delay=3, leave=False) as bar,
    ):
        for first in range(0, len(answers), _BATCH):
            rows = []
            for place, answer in enumerate(answers[first : first + _BATCH], start=first):
                positions, target = _label_tokens(examples[place])
                found: dict[int, Mapped] = {}
                pairs = 0
                if answer is not None:
                    key = id(answer.source)
                    found, pairs = aligners[key].distributions(tables[key].of(answer.index), target)
                rows.append(
                    (
                        positions[list(found)],
                        [ids for ids, _ in found.values()],
                        [probs for _, probs in found.values()],
                    )
                )
                tokens, aligned, soft = tokens + len(target), aligned + pairs, soft + len(found)
            table.add(dict(zip(_FEATURES, map(list, zip(*rows, strict=True)), strict=True)))
            bar.update(len(rows))
        seconds = round(time.perf_counter() - start, 3)
        table.record |= {"one_to_one": aligned / tokens, "soft": soft / tokens, "seconds": seconds}


def _aligners(
    by_source: Mapping[int, Sequence[Answer]],
    tables: Mapping[int, SoftLabels],
    examples: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    cache: Path,
) -> dict[int, Aligner]:
    """By source, what aligns its tokens; sources of one tokenizer share its map, which all their tokens are in."""
    target = answer_symbols(tokenizer, examples)
    maps: dict[str, VocabularyMap] = {}
    aligners: dict[int, Aligner] = {}
    for key, answers in by_source.items():
        own, table, indices = answers[0].source.tokenizer, tables[key], [answer.index for answer in answers]
        name = tokenizer_fingerprint(own)
        if name not in maps:
            maps[name] = VocabularyMap(own, tokenizer, cache)
        maps[name].map(used_tokens(table, indices), shown=True)
        symbols = symbols_of(own, (table.of(index).tokens.tolist() for index in indices))
        aligners[key] = Aligner(symbols, target, maps[name])
    return aligners


def _label_tokens(example: Mapping[str, Any]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Positions and ids of an example's label tokens."""
    labels = np.asarray(example["labels"], dtype=np.int32)
    positions = np.flatnonzero(labels != IGNORE_INDEX)
    return positions, labels[positions]
