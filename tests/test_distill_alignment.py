"""DTW of two tokenizations of one answer, and the labels that come of it."""

import functools
import itertools

import numpy as np
import pytest

from heterofusion.experts.soft_labels import SoftLabel
from heterofusion.experts.token_alignment import (
    END,
    SPECIAL,
    Aligner,
    AnswerSymbols,
    dtw_path,
    mapped_distribution,
    one_to_one,
)
from heterofusion.experts.vocabulary import UNMAPPED, VocabularyMap
from replay_builders import CHAT, byte_level, encode, word_level
from test_tokens import sentencepiece_like


def symbols(*tokens: bytes) -> list[tuple[int, ...]]:
    return [tuple(token) for token in tokens]


def cheapest(costs: np.ndarray) -> int:
    """The cost of the best path, from DTW's recursion."""

    @functools.cache
    def total(i: int, j: int) -> float:
        if i == 0 and j == 0:
            return costs[0, 0]
        if i < 0 or j < 0:
            return float("inf")
        return costs[i, j] + min(total(i - 1, j - 1), total(i - 1, j), total(i, j - 1))

    return total(costs.shape[0] - 1, costs.shape[1] - 1)


@pytest.mark.parametrize("seed", range(8))
def test_path_is_monotone_complete_and_the_cheapest(seed):
    generator = np.random.default_rng(seed)
    shape = generator.integers(1, 12, size=2)
    costs = generator.integers(0, 6, size=shape)
    path = dtw_path(costs)
    assert path[0] == (0, 0) and path[-1] == (shape[0] - 1, shape[1] - 1)
    assert {(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(path)} <= {(1, 1), (1, 0), (0, 1)}
    assert sum(costs[step] for step in path) == cheapest(costs)


def test_a_split_word_is_not_one_to_one():
    source, target = symbols(b" Ann", b" met", b" Bob"), symbols(b" A", b"nn", b" met", b" Bob")
    assert one_to_one(source, target) == [(1, 2), (2, 3)]
    assert one_to_one(target, source) == [(2, 1), (3, 2)]
    assert one_to_one([], source) == []


def test_end_tokens_align_whatever_they_are_called():
    """One template closes the turn and breaks the line, the other does not."""
    source, target = sentencepiece_like(eos="<|done|>"), byte_level()
    word, end, newline = source.convert_tokens_to_ids(["w", "<|done|>", "<0x0A>"])
    symbols_of = AnswerSymbols(source, []).of
    assert symbols_of([word, end, newline]) == ([0, 1], [tuple(b"w"), END])
    assert symbols_of([word, end, newline, word, end])[0] == [0, 1, 3, 4]  # the line break between turns
    word, user, end = target.convert_tokens_to_ids(["w", "<|user|>", target.eos_token])
    assert AnswerSymbols(target, []).of([word, end]) == ([0, 1], [tuple(b"w"), END])
    assert AnswerSymbols(target, []).of([user, 99_999]) == ([0, 1], [SPECIAL, SPECIAL])
    assert AnswerSymbols(target, [[word, user]]).of([user, 99_999]) == ([0, 1], [END, SPECIAL])


def test_mapped_distribution_adds_up_what_meets_and_renormalizes():
    ids = np.array([5, 6, 7, 8], dtype=np.int32)
    log_probs = np.log(np.array([0.4, 0.2, 0.1, 0.05], dtype=np.float32))
    new_ids, probs = mapped_distribution(ids, log_probs, {5: 1, 6: 2, 7: UNMAPPED, 8: 2})
    assert new_ids.tolist() == [1, 2, 0, 0]
    np.testing.assert_allclose(probs, [0.4 / 0.65, 0.25 / 0.65, 0, 0], rtol=1e-6)
    assert mapped_distribution(ids, log_probs, dict.fromkeys(range(5, 9), UNMAPPED)) is None


RECORD = {"prompt": [{"role": "user", "content": "who?"}], "completion": [{"role": "assistant", "content": "Ann: no"}]}


def answer(tokenizer) -> np.ndarray:
    return np.array([label for label in encode(RECORD, tokenizer)[1] if label != -100], dtype=np.int32)


def distributions(source, target, labels: SoftLabel, tokens: np.ndarray):
    own = (AnswerSymbols(tokenizer, [answer(tokenizer).tolist()]) for tokenizer in (source, target))
    return Aligner(*own, VocabularyMap(source, target)).distributions(labels, tokens)


def soft_labels(tokens: np.ndarray, rivals: list[int]) -> SoftLabel:
    """0.75 for the token itself, the rest for rivals."""
    top = np.array([[token, *rivals] for token in tokens], dtype=np.int32)
    probs = np.array([0.75, *[0.2 / len(rivals)] * len(rivals)], dtype=np.float32)
    return SoftLabel(tokens, top, np.tile(np.log(probs), (len(tokens), 1)))


def test_labels_of_another_tokenizer_with_another_end_token():
    source, target = sentencepiece_like(template=CHAT, eos="<|done|>", size=420), byte_level(template=CHAT)
    tokens = answer(target)
    comma = source.convert_tokens_to_ids(";")
    found, aligned = distributions(source, target, soft_labels(answer(source), [comma]), tokens)
    assert 0 < len(found) <= aligned and len(found) < len(tokens)
    for place, (ids, probs) in found.items():  # the answer's own tokens are the most probable everywhere
        assert ids[0] == tokens[place] and probs.sum() == pytest.approx(1)
    assert tokens[-1] == target.eos_token_id and source.eos_token != target.eos_token
    ids, probs = found[len(tokens) - 1]
    np.testing.assert_allclose(probs, [0.75 / 0.95, 0.2 / 0.95], rtol=1e-5)
    assert ids[1] == target.convert_tokens_to_ids(";")


def test_a_false_pair_has_no_soft_label():
    """DTW pairs any two tokens that stand alone; a distribution over ` tilken`s says nothing of ` til`."""
    source, target = word_level(template=CHAT), byte_level(template=CHAT)
    unknown = np.array([source.convert_tokens_to_ids("q0")], dtype=np.int32)
    tokens = np.array([target.convert_tokens_to_ids("q")], dtype=np.int32)
    assert VocabularyMap(source, target)[int(unknown[0])] != tokens[0]
    assert distributions(source, target, soft_labels(unknown, [12]), tokens) == ({}, 1)
