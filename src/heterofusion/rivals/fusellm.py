"""FuseLLM's fused labels: per example the distributions of the best teacher, in the target's tokens.

MinCE picks, per example, the model of lowest cross-entropy on the answer. The target itself is one of them, as it is
before the distillation: where it wins, its own first distributions are what it is held to. Cross-entropies are of the
answer as a whole, in nats: all models predict the same text, so that they can be compared whatever the tokenizer (a
mean over each model's own tokens, which FuseLLM's published code takes, would favour the finer tokenizer).

Where DTW aligns one token of the teacher with one of the target, and MinED maps the one to the other, the label is the
teacher's top k, mapped to the target's vocabulary by MinED and renormalized; elsewhere it is the target's token
itself. (The second condition is that of FuseLLM's published code: DTW also pairs ` til` with ` tilken`, whose
distributions are not of the same thing.)

Origin: FuseLLM, arXiv 2401.10491, sections 3.2 and 3.3.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from accelerate import PartialState
from datasets import Dataset, Features, List, Value, concatenate_datasets
from numpy.typing import NDArray
from tqdm import tqdm

from heterofusion.experts.identity import tokenizer_fingerprint
from heterofusion.experts.soft_labels import SoftLabel, SoftLabels, cache_key, new_table, read_table
from heterofusion.experts.teachers import Teacher
from heterofusion.experts.token_alignment import Aligner, FusedAnswer, answer_symbols, used_tokens
from heterofusion.experts.vocabulary import VocabularyMap
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.ranks import all_together

TEACHER_IDS, TEACHER_PROBS = "teacher_ids", "teacher_probs"  # columns of the examples
_FORMAT = 1  # another number is another name
_FEATURES = Features({TEACHER_IDS: List(List(Value("int32"))), TEACHER_PROBS: List(List(Value("float32")))})
_BATCH = 64  # examples that are aligned before they are written


@dataclass(frozen=True)
class FusionReport:
    """How the labels came about."""

    picked: list[int]  # per model, the target first: how many examples MinCE gave it
    mean_cross_entropy: list[float]  # per model, nats per answer
    one_to_one: float  # share of the answers' tokens that DTW aligns one to one; all, where the target was picked
    soft: float  # share of the answers' tokens whose label is a model's distribution and no single token
    seconds: float  # of all models, maps and alignment; what came from disk counts as long as it once took


def fuse_labels(models: Sequence[Teacher], labels: Sequence[SoftLabels], folder: Path) -> tuple[Dataset, FusionReport]:
    """Give the target's examples the fused labels, `teacher_ids` and `teacher_probs`, both (answer tokens, k).

    They are memory-mapped and kept in a folder. All ranks together: the main one makes them, and all must see it.
    """
    ranks = PartialState()
    choice = min_ce([item.cross_entropy for item in labels])
    path = folder / f"fused-labels-{cache_key({'format': _FORMAT, 'models': [item.identity for item in labels]})}"
    with all_together(ranks):
        if ranks.is_main_process and read_table(path, _FEATURES) is None:
            _write_fused(path, models, labels, choice, folder)
    with all_together(ranks):
        found = read_table(path, _FEATURES, check=False)  # its content has just been checked, or written
        if found is None:
            raise UserError(f"--logits_cache {folder} is not the same folder on all machines; name one that is shared")
    data, record = found
    report = FusionReport(
        picked=np.bincount(choice, minlength=len(models)).tolist(),
        mean_cross_entropy=[float(item.cross_entropy.mean()) for item in labels],
        one_to_one=record["one_to_one"],
        soft=record["soft"],
        seconds=sum(item.seconds for item in labels) + record["seconds"],
    )
    return concatenate_datasets([models[0].examples, data], axis=1), report


def _write_fused(
    path: Path, models: Sequence[Teacher], labels: Sequence[SoftLabels], choice: NDArray[np.int64], folder: Path
) -> None:
    """Make the fused labels of all examples, in their order, and write them a few at a time."""
    maps = _vocabulary_maps(models, labels, choice, folder)
    start = time.perf_counter()
    target_symbols = answer_symbols(models[0].expert.tokenizer, models[0].examples)
    aligners = {}
    for index, vocabulary in maps.items():
        symbols = answer_symbols(models[index].expert.tokenizer, models[index].examples)
        aligners[index] = Aligner(symbols, target_symbols, vocabulary)
    tokens = aligned = soft = 0
    with (
        new_table(path, _FEATURES) as table,
        tqdm(total=len(choice), desc="Aligning", unit="example", delay=3, leave=False) as bar,
    ):
        for first in range(0, len(choice), _BATCH):
            fused: list[FusedAnswer] = []
            for example, index in enumerate(choice[first : first + _BATCH].tolist(), start=first):
                own = labels[0].of(example)
                fused.append(aligners[index].label(labels[index].of(example), own.tokens) if index else _kept(own))
                tokens += len(own.tokens)
            table.add(
                {TEACHER_IDS: [answer.ids for answer in fused], TEACHER_PROBS: [answer.probs for answer in fused]}
            )
            aligned += sum(answer.one_to_one for answer in fused)
            soft += sum(answer.soft for answer in fused)
            bar.update(len(fused))
        mapping = sum(vocabulary.seconds for vocabulary in {id(item): item for item in maps.values()}.values())
        seconds = round(mapping + time.perf_counter() - start, 3)
        table.record |= {"one_to_one": aligned / tokens, "soft": soft / tokens, "seconds": seconds}


def _vocabulary_maps(
    models: Sequence[Teacher], labels: Sequence[SoftLabels], choice: NDArray[np.int64], folder: Path
) -> dict[int, VocabularyMap]:
    """By teacher that is picked, the map of its tokens, filled with all that occur; teachers may share one."""
    maps: dict[int, VocabularyMap] = {}
    by_tokenizer: dict[str, VocabularyMap] = {}
    for index in sorted(set(choice.tolist()) - {0}):
        tokenizer = models[index].expert.tokenizer
        name = tokenizer_fingerprint(tokenizer)
        if name not in by_tokenizer:
            by_tokenizer[name] = VocabularyMap(tokenizer, models[0].expert.tokenizer, folder)
        maps[index] = by_tokenizer[name]
        maps[index].map(used_tokens(labels[index], np.flatnonzero(choice == index).tolist()), shown=True)
    return maps


def min_ce(cross_entropies: Sequence[NDArray[np.float64]]) -> NDArray[np.int64]:
    """Index of the model of lowest cross-entropy per example, (examples,) of each model; the first of equals."""
    return np.argmin(np.stack(cross_entropies), axis=0)


def _kept(own: SoftLabel) -> FusedAnswer:
    """What the target itself thinks of an answer: its top k, renormalized."""
    probs = np.exp(own.top_log_probs.astype(np.float64))
    probs /= probs.sum(axis=1, keepdims=True)
    return FusedAnswer(own.top_ids, probs.astype(np.float32), len(own.tokens), len(own.tokens))
