"""Which tokens of two tokenizations of one answer stand for each other: dynamic time warping (DTW) on edit distance.

Origin: FuseLLM, arXiv 2401.10491, section 3.3: the cost of a pair of tokens is their edit distance, once the space
marks are gone. All steps of the path cost alike, and of equally good ones the diagonal is taken.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from heterofusion.data.formats import IGNORE_INDEX
from heterofusion.experts.soft_labels import SoftLabel, SoftLabels
from heterofusion.experts.vocabulary import UNMAPPED, VocabularyMap, as_columns, edit_distances, token_bytes

Mapped = tuple[NDArray[np.int32], NDArray[np.float32]]  # (k,) token ids of the target, (k,) their probabilities


@dataclass(frozen=True)
class FusedAnswer:
    """The labels of one answer of n tokens."""

    ids: NDArray[np.int32]  # (n, k) token ids of the target
    probs: NDArray[np.float32]  # (n, k), which add up to 1; a token of probability 0 fills a place
    one_to_one: int  # tokens that are aligned one to one
    soft: int  # tokens whose label is a model's distribution


class Aligner:
    """Turns the soft labels of a teacher into labels for the target's tokens."""

    def __init__(self, source: AnswerSymbols, target: AnswerSymbols, vocabulary: VocabularyMap) -> None:
        self._source, self._target = source, target
        self._vocabulary = vocabulary
        # with the same tokens, an end may be one token in a text and another one in a dialogue
        self._ends = {} if vocabulary.identity else dict.fromkeys(source.ends, (*target.ends, UNMAPPED)[0])

    def label(self, labels: SoftLabel, target_tokens: NDArray[np.int32]) -> FusedAnswer:
        """Labels for all tokens of one answer: the teacher's distribution, or else the token itself."""
        found, aligned = self.distributions(labels, target_tokens)
        shape = (len(target_tokens), labels.top_ids.shape[1])
        ids, probs = np.zeros(shape, dtype=np.int32), np.zeros(shape, dtype=np.float32)
        ids[:, 0], probs[:, 0] = target_tokens, 1.0
        for place, label in found.items():
            ids[place], probs[place] = label
        return FusedAnswer(ids, probs, aligned, len(found))

    def distributions(self, labels: SoftLabel, target_tokens: NDArray[np.int32]) -> tuple[dict[int, Mapped], int]:
        """The teacher's distributions at those tokens of one answer that both models see alike."""
        tokens, top_ids, top_log_probs = labels
        source_places, source = self._source.of(tokens.tolist())
        target_places, target = self._target.of(target_tokens.tolist())
        mapping = {**self._vocabulary.map(np.union1d(top_ids, tokens).tolist()), **self._ends}
        pairs = one_to_one(source, target)
        found: dict[int, Mapped] = {}
        for i, j in pairs:
            row, place = source_places[i], target_places[j]
            if mapping[int(tokens[row])] != int(target_tokens[place]):
                continue
            label = mapped_distribution(top_ids[row], top_log_probs[row], mapping)
            if label is not None:
                found[place] = label
        return found, len(pairs)


Symbols = tuple[int, ...]

# Special tokens have no text. As single symbols that are no bytes, each is n edits away from a text of n bytes.
END: Symbols = (256,)
SPECIAL: Symbols = (257,)


class AnswerSymbols:
    """Turns the tokens of an answer into what is compared: their bytes, and one symbol for all that end a turn.

    `texts` are bytes by token id, None for special tokens; `ends` are the tokens that end an answer or a turn.
    """

    def __init__(self, texts: Sequence[bytes | None], ends: Sequence[int]) -> None:
        self.ends = tuple(ends)
        self._texts = texts

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
    path = dtw_path(token_costs(source, target))
    of_source = np.bincount([i for i, _ in path])
    of_target = np.bincount([j for _, j in path])
    return [(i, j) for i, j in path if of_source[i] == 1 and of_target[j] == 1]


def token_costs(source: Sequence[Symbols], target: Sequence[Symbols]) -> NDArray[np.int64]:
    """Edit distances (source tokens, target tokens); each pair of different tokens is compared once."""
    rows, columns = list(dict.fromkeys(source)), list(dict.fromkeys(target))
    candidates = as_columns(columns)
    distances = np.stack([edit_distances(row, *candidates) for row in rows])  # (different rows, different columns)
    row_of, column_of = ({symbols: i for i, symbols in enumerate(kinds)} for kinds in (rows, columns))
    return distances[np.ix_([row_of[s] for s in source], [column_of[s] for s in target])]


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


def answer_symbols(tokenizer: PreTrainedTokenizerBase, examples: Dataset) -> AnswerSymbols:
    """Symbols of a model's tokens. What ends its answers: special tokens that are learned, the most frequent first."""
    return symbols_of(tokenizer, ([t for t in labels if t != IGNORE_INDEX] for labels in examples["labels"]))


def symbols_of(tokenizer: PreTrainedTokenizerBase, answers: Iterable[Iterable[int]]) -> AnswerSymbols:
    """`answer_symbols` of answers that are token ids alone."""
    texts = token_bytes(tokenizer)
    learned = Counter(token for answer in answers for token in answer)
    ends = [t for t, _ in learned.most_common() if texts[t] is None and t != tokenizer.unk_token_id]
    eos: Any = tokenizer.eos_token_id
    return AnswerSymbols(texts, ends if eos is None or eos in ends else [*ends, eos])


def used_tokens(labels: SoftLabels, answers: Iterable[int]) -> set[int]:
    """All tokens of some answers and of their soft labels."""
    used: set[int] = set()
    for index in answers:
        answer = labels.of(index)
        used.update(np.union1d(answer.top_ids, answer.tokens).tolist())
    return used
