"""MinED: edit distances, the nearest token, and maps between tokenizers of three kinds."""

import random

import pytest

from heterofusion.experts.expert import tokenizer_fingerprint
from heterofusion.experts.vocabulary import (
    UNMAPPED,
    TokenIndex,
    VocabularyMap,
    token_bytes,
)
from replay_builders import byte_level, word_level
from test_tokens import sentencepiece_like


def distance(a: bytes, b: bytes) -> int:
    """Levenshtein, from its recursion."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        previous, row = row, [i]
        for j, y in enumerate(b, start=1):
            row.append(min(previous[j] + 1, row[-1] + 1, previous[j - 1] + (x != y)))
    return row[-1]


def words(count: int, seed: int, letters: str = "abcde ", longest: int = 7) -> list[bytes]:
    generator = random.Random(seed)
    return ["".join(generator.choices(letters, k=generator.randint(1, longest))).encode() for _ in range(count)]


def test_nearest_is_that_of_brute_force_with_the_stated_preference():
    texts = [*dict.fromkeys(words(300, 2))]
    spellings = [text.decode() + "#" * (i % 3) for i, text in enumerate(texts)]
    index = TokenIndex(texts, spellings)
    for query in words(120, 3, longest=9):
        respaced = query[1:] if query.startswith(b" ") else b" " + query

        def rank(i: int, query: bytes = query, respaced: bytes = respaced) -> tuple:
            gap = abs(len(texts[i]) - len(query))
            return distance(query, texts[i]), texts[i] != respaced, gap, len(spellings[i]), i

        assert index.nearest(query) == min(range(len(texts)), key=rank), query


KINDS = {"bytes": byte_level, "pieces": sentencepiece_like, "words": word_level}


@pytest.mark.parametrize("target", KINDS)
@pytest.mark.parametrize("source", KINDS)
def test_map_is_equal_text_or_the_nearest(source, target):
    tokenizers = [KINDS[source](), KINDS[target]()]
    texts, target_texts = (token_bytes(tokenizer) for tokenizer in tokenizers)
    found = VocabularyMap(*tokenizers)
    for token, text in enumerate(texts):
        if source == target:
            assert found[token] == token
        elif text is not None:
            nearest = min(distance(text, other) for other in target_texts if other)
            assert distance(text, target_texts[found[token]]) == nearest
            assert nearest == 0 or text not in target_texts


def test_special_tokens_are_mapped_by_name_and_unknown_ids_not_at_all():
    source, target = byte_level(), sentencepiece_like()
    found = VocabularyMap(source, target)
    assert found[source.bos_token_id] == target.bos_token_id
    assert found[99_999] == UNMAPPED
    assert VocabularyMap(source, source)[99_999] == UNMAPPED
    source.add_special_tokens({"additional_special_tokens": ["<|image|>"]})
    assert VocabularyMap(source, target)[source.convert_tokens_to_ids("<|image|>")] == UNMAPPED


def test_fingerprint_is_of_the_tokens_alone():
    tokenizer = byte_level()
    print_before = tokenizer_fingerprint(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer(["a", "the answer"], padding=True, truncation=True, max_length=3)  # leaves both set in the backend
    tokenizer.chat_template = "{{ messages }}"
    assert tokenizer_fingerprint(tokenizer) == print_before
    tokenizer.add_tokens(["more"])
    assert tokenizer_fingerprint(tokenizer) != print_before
