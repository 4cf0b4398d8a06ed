"""MinED: edit distances, the nearest token, and maps between tokenizers of three kinds that are kept on disk."""

import random

import pytest

from heterofusion.experts.identity import tokenizer_fingerprint
from heterofusion.experts.vocabulary import (
    UNMAPPED,
    TokenIndex,
    VocabularyMap,
    as_columns,
    edit_distances,
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


# ---- distances --------------------------------------------------------------------------------------------------


def test_edit_distances_are_levenshteins():
    candidates = [*words(60, 0), b"a", b"aaaaaaaaaaaaaaa"]
    columns, lengths = as_columns([list(word) for word in candidates])
    for query in [*words(20, 1), b"", b"abcdeabcdeabcde"]:
        found = edit_distances(list(query), columns, lengths)
        assert found.tolist() == [distance(query, word) for word in candidates]


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


def test_equal_texts_take_the_shorter_spelling_then_the_lower_id():
    index = TokenIndex([None, b"A", b"A", b"A", b""], ["<s>", "<0x41>", "A", "B", ""])
    assert index.nearest(b"A") == 2
    assert TokenIndex([None, b""], ["<s>", ""]).nearest(b"A") == UNMAPPED


# ---- maps -------------------------------------------------------------------------------------------------------

KINDS = {"bytes": byte_level, "pieces": sentencepiece_like, "words": word_level}


@pytest.mark.parametrize("target", KINDS)
@pytest.mark.parametrize("source", KINDS)
def test_map_is_equal_text_or_the_nearest(source, target):
    tokenizers = [KINDS[source](), KINDS[target]()]
    texts, target_texts = (token_bytes(tokenizer) for tokenizer in tokenizers)
    found = VocabularyMap(*tokenizers).map(range(len(texts)))
    for token, text in enumerate(texts):
        if source == target:
            assert found[token] == token
        elif text is not None:
            nearest = min(distance(text, other) for other in target_texts if other)
            assert distance(text, target_texts[found[token]]) == nearest
            assert nearest == 0 or text not in target_texts


def test_special_tokens_are_mapped_by_name_and_unknown_ids_not_at_all():
    source, target = byte_level(), sentencepiece_like()
    found = VocabularyMap(source, target).map([source.bos_token_id, source.convert_tokens_to_ids("<|user|>"), 99_999])
    assert found[source.bos_token_id] == target.bos_token_id
    assert found[99_999] == UNMAPPED
    assert VocabularyMap(source, source).map([99_999]) == {99_999: UNMAPPED}
    source.add_special_tokens({"additional_special_tokens": ["<|image|>"]})
    image = source.convert_tokens_to_ids("<|image|>")
    assert VocabularyMap(source, target).map([image]) == {image: UNMAPPED}


def test_only_what_is_asked_for_is_made_and_kept_on_disk(tmp_path, monkeypatch):
    source, target = byte_level(), sentencepiece_like()
    asked = []
    nearest = TokenIndex.nearest
    monkeypatch.setattr(TokenIndex, "nearest", lambda self, text: asked.append(text) or nearest(self, text))
    first = VocabularyMap(source, target, tmp_path).map([300, 301])
    assert len(asked) == 2
    again = VocabularyMap(source, target, tmp_path)
    assert again.map([300, 301, 302])[300] == first[300] and len(asked) == 3
    assert again.seconds > 0
    assert VocabularyMap(source, target, tmp_path).map([302]) == again.map([302]) and len(asked) == 3
    assert VocabularyMap(target, source, tmp_path).map([300]) and len(asked) == 4
    assert len(list(tmp_path.iterdir())) == 2


def test_damaged_map_is_made_anew(tmp_path, caplog):
    source, target = byte_level(), sentencepiece_like()
    made = VocabularyMap(source, target, tmp_path).map(range(300, 320))
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    assert VocabularyMap(source, target, tmp_path).map(range(300, 320)) == made
    assert f"{path} is damaged" in caplog.text and "made anew" in caplog.text
    assert path.read_bytes() != content


def test_fingerprint_is_of_the_tokens_alone():
    tokenizer = byte_level()
    print_before = tokenizer_fingerprint(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer(["a", "the answer"], padding=True, truncation=True, max_length=3)  # leaves both set in the backend
    tokenizer.chat_template = "{{ messages }}"
    assert tokenizer_fingerprint(tokenizer) == print_before
    tokenizer.add_tokens(["more"])
    assert tokenizer_fingerprint(tokenizer) != print_before


def test_map_is_not_written_where_it_cannot_be(tmp_path, monkeypatch):
    def full(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match=r"--logits_cache: .*vocabulary-.* could not be written \(no space left"):
        VocabularyMap(byte_level(), sentencepiece_like(), tmp_path).map([300])
    assert not list(tmp_path.iterdir())
