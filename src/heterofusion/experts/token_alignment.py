"""Soft labels of other models in the target's tokens: aligned by dynamic time warping (DTW), mapped by MinED.

Where DTW aligns one token of a source with one of the target, and MinED maps the one to the other, the soft label is
the source's top k, mapped to the target's vocabulary and renormalized. Other tokens of the answer have none. (The
second condition is that of FuseLLM's published code: DTW also pairs ` til` with ` tilken`, whose distributions are not
of the same thing.)

Origin: FuseLLM, arXiv 2401.10491, section 3.3: the cost of a pair of tokens is their edit distance, once the space
marks are gone. All steps of the path cost alike, and of equally good ones the diagonal is taken.
"""

from __future__ import annotations

from collections import ChainMap, Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value, concatenate_datasets
from numpy.typing import NDArray
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from heterofusion.data.formats import IGNORE_INDEX
from heterofusion.data.labels import SOFT_IDS, SOFT_POSITIONS, SOFT_PROBS
from heterofusion.data.replay import examples_sha256
from heterofusion.experts.expert import tokenizer_fingerprint
from heterofusion.experts.soft_labels import (
    SoftLabel,
    SoftLabels,
    cache_key,
    made_once,
    read_labels,
    write_table,
)
from heterofusion.experts.vocabulary import UNMAPPED, VocabularyMap, as_columns, edit_distances, token_bytes

_FORMAT = 1  # another number is another name
_FEATURES = Features(
    {
        SOFT_POSITIONS: List(Value("int32")),
        SOFT_IDS: List(List(Value("int32"))),
        SOFT_PROBS: List(List(Value("float32"))),
    }
)
_BATCH = 64  # examples that are aligned before they are written

Mapped = tuple[NDArray[np.int32], NDArray[np.float32]]  # (k,) token ids of the target, (k,) their probabilities


@dataclass(frozen=True, eq=False)
class Source:
    """A model whose soft labels are stored in a folder, and the tokenizer that they are of."""

    name: str
    folder: Path
    identity: Mapping[str, Any]
    tokenizer: PreTrainedTokenizerBase


Answer = tuple[Source, int]  # whose soft labels, and the number of the answer among them


def add_aligned(
    examples: Dataset, tokenizer: PreTrainedTokenizerBase, answers: Sequence[Answer | None], cache: Path
) -> tuple[Dataset, dict[str, Any]]:
    """Give each example the soft labels of an answer to it. All ranks together: the main one makes them.

    Also `one_to_one` and `soft`, the shares of the answers' tokens that are aligned and that have a soft label, and
    the `seconds` that it once took.
    """
    identity = {
        "format": _FORMAT,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "examples": examples_sha256(examples),
        "answers": [answer and [cache_key(answer[0].identity), answer[1]] for answer in answers],
    }

    def make() -> None:
        stored = {source: read_labels(source.folder, source.identity) for source in dict(filter(None, answers))}
        record: dict[str, Any] = {}
        write_table(path, _FEATURES, _align(examples, tokenizer, answers, stored, record), record)

    path = cache / f"soft-targets-{cache_key(identity)}"
    data, record = made_once(path, _FEATURES, make)
    return concatenate_datasets([examples, data], axis=1), record


def _align(
    examples: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    answers: Sequence[Answer | None],
    stored: Mapping[Source, SoftLabels],
    record: dict[str, Any],
) -> Iterator[dict[str, list[Any]]]:
    """The soft labels of all examples, in their order, batch by batch; fills the record."""
    target = AnswerSymbols(tokenizer, ([t for t in labels if t != IGNORE_INDEX] for labels in examples["labels"]))
    maps: dict[str, VocabularyMap] = {}  # sources of one tokenizer share one
    aligners: dict[Source, Aligner] = {}
    for source, labels in stored.items():
        name = tokenizer_fingerprint(source.tokenizer)
        if name not in maps:
            maps[name] = VocabularyMap(source.tokenizer, tokenizer)
        own = (labels.of(answer[1]).tokens.tolist() for answer in answers if answer and answer[0] is source)
        aligners[source] = Aligner(AnswerSymbols(source.tokenizer, own), target, maps[name])
    tokens = aligned = soft = 0
    with tqdm(total=len(answers), desc="Aligning soft labels", unit="answer", delay=3, leave=False) as bar:
        for first in range(0, len(answers), _BATCH):
            columns: dict[str, list[Any]] = {name: [] for name in _FEATURES}
            for place, answer in enumerate(answers[first : first + _BATCH], start=first):
                wanted = np.asarray(examples[place]["labels"], dtype=np.int32)
                positions = np.flatnonzero(wanted[1:] != IGNORE_INDEX) + 1  # nothing predicts the first token
                found: dict[int, Mapped] = {}
                if answer is not None:
                    source, number = answer
                    found, pairs = aligners[source].distributions(stored[source].of(number), wanted[positions])
                    aligned += pairs
                columns[SOFT_POSITIONS].append(positions[list(found)])
                columns[SOFT_IDS].append([ids for ids, _ in found.values()])
                columns[SOFT_PROBS].append([probs for _, probs in found.values()])
                tokens, soft = tokens + len(positions), soft + len(found)
            bar.update(len(columns[SOFT_IDS]))
            yield columns
    record |= {"one_to_one": aligned / tokens, "soft": soft / tokens}


class Aligner:
    """Turns the soft labels of a source into soft labels for the target's tokens."""

    def __init__(self, source: AnswerSymbols, target: AnswerSymbols, vocabulary: VocabularyMap) -> None:
        self._source, self._target = source, target
        self._same = vocabulary.identity
        # with the same tokens, an end may be one token in a text and another one in a dialogue
        ends = {} if self._same else dict.fromkeys(source.ends, (*target.ends, UNMAPPED)[0])
        self._mapping = ChainMap(ends, vocabulary)

    def distributions(self, labels: SoftLabel, target_tokens: NDArray[np.int32]) -> tuple[dict[int, Mapped], int]:
        """The source's distributions at those tokens of one answer that both see alike, and how many are aligned."""
        tokens, top_ids, top_log_probs = labels
        if self._same and np.array_equal(tokens, target_tokens):
            pairs = [(place, place) for place in range(len(tokens))]
        else:
            source_places, source = self._source.of(tokens.tolist())
            target_places, target = self._target.of(target_tokens.tolist())
            pairs = [(source_places[i], target_places[j]) for i, j in one_to_one(source, target)]
        found: dict[int, Mapped] = {}
        for row, place in pairs:
            if self._mapping[int(tokens[row])] == int(target_tokens[place]):
                label = mapped_distribution(top_ids[row], top_log_probs[row], self._mapping)
                if label is not None:
                    found[place] = label
        return found, len(pairs)


Symbols = tuple[int, ...]

# Special tokens have no text. As single symbols that are no bytes, each is n edits away from a text of n bytes.
END: Symbols = (256,)
SPECIAL: Symbols = (257,)


class AnswerSymbols:
    """Turns the tokens of an answer into what is compared: their bytes, and one symbol for all that end a turn.

    These are the special tokens that the `answers` hold, the most frequent first, and the tokenizer's own.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, answers: Iterable[Iterable[int]]) -> None:
        self._texts = token_bytes(tokenizer)
        learned = Counter(token for answer in answers for token in answer)
        ends = [t for t, _ in learned.most_common() if self._texts[t] is None and t != tokenizer.unk_token_id]
        own: Any = tokenizer.eos_token_id
        self.ends = [*dict.fromkeys((*ends, *([] if own is None else [own])))]

    def of(self, tokens: Sequence[int]) -> tuple[list[int], list[Symbols]]:
        """Positions in the answer that take part in an alignment, and their symbols.

        White space right after the end of a turn is left out: some chat templates write it, others do not.
        """
        positions: list[int] = []
        symbols: list[Symbols] = []
        after_end = False
        for position, token in enumerate(tokens):
            text = self._texts[token] if token < len(self._texts) else None
            if token in self.ends:
                symbol, after_end = END, True
            elif after_end and text is not None and not text.strip():
                continue
            else:
                symbol, after_end = SPECIAL if text is None else tuple(text), False
            positions.append(position)
            symbols.append(symbol)
        return positions, symbols


def one_to_one(source: Sequence[Symbols], target: Sequence[Symbols]) -> list[tuple[int, int]]:
    """Pairs of tokens that DTW aligns with each other and with nothing else."""
    if not source or not target:
        return []
    if list(source) == list(target):  # where the diagonal costs nothing
        return [(index, index) for index in range(len(source))]
    rows, columns = list(dict.fromkeys(source)), list(dict.fromkeys(target))  # different tokens are compared once
    candidates = as_columns(columns)
    distances = np.stack([edit_distances(row, *candidates) for row in rows])  # (different rows, different columns)
    row_of, column_of = ({symbols: i for i, symbols in enumerate(kinds)} for kinds in (rows, columns))
    path = dtw_path(distances[np.ix_([row_of[s] for s in source], [column_of[s] for s in target])])
    of_source = np.bincount([i for i, _ in path])
    of_target = np.bincount([j for _, j in path])
    return [(i, j) for i, j in path if of_source[i] == 1 and of_target[j] == 1]


def dtw_path(costs: NDArray[np.int64]) -> list[tuple[int, int]]:
    """The cheapest monotone path from the first pair to the last, through neighbouring pairs.

    O(rows * columns), a row at a time in numpy.

    Args:
        costs: (rows, columns), at least one each.

    Returns:
        The pairs (row, column) on the path, ascending; of equally cheap steps the diagonal is taken, then the one
        that stays in the column.
    """
    far = np.iinfo(np.int64).max // 4
    rows, columns = costs.shape
    total = np.full((rows + 1, columns + 1), far, dtype=np.int64)
    total[0, 0] = 0
    for i in range(rows):
        above = np.minimum(total[i, 1:], total[i, :-1])
        along = np.cumsum(costs[i])
        # staying in the row from column k to j costs the sum between: a running minimum finds the best k for every j
        total[i + 1, 1:] = along + np.minimum.accumulate(above - along + costs[i])
    i, j = rows, columns
    path = [(i - 1, j - 1)]
    while i > 1 or j > 1:
        steps = (total[i - 1, j - 1], total[i - 1, j], total[i, j - 1])
        step = int(np.argmin(steps))  # the first of equals
        i, j = i - (step != 2), j - (step != 1)
        path.append((i - 1, j - 1))
    return path[::-1]


def mapped_distribution(
    ids: NDArray[np.int32], log_probs: NDArray[np.float32], mapping: Mapping[int, int]
) -> Mapped | None:
    """A distribution over a teacher's top k as one over the target's tokens, renormalized.

    Args:
        ids: (k,) token ids of the teacher.
        log_probs: (k,) their log-probabilities.
        mapping: target id by teacher id; what is `UNMAPPED` is left out.

    Returns:
        (k,) token ids of the target, those that are mapped alike joined, the most probable first, and (k,)
        probabilities; places that are left have probability 0. None if nothing is mapped.
    """
    sums: dict[int, float] = {}
    for index, value in zip(ids.tolist(), np.exp(log_probs.astype(np.float64)).tolist(), strict=True):
        token = mapping[index]
        if token != UNMAPPED:
            sums[token] = sums.get(token, 0.0) + value
    total = sum(sums.values())
    if total == 0:
        return None
    new_ids, probs = np.zeros(len(ids), dtype=np.int32), np.zeros(len(ids), dtype=np.float32)
    for place, (token, value) in enumerate(sorted(sums.items(), key=lambda item: -item[1])):
        new_ids[place], probs[place] = token, value / total
    return new_ids, probs
