"""Tokens as bytes and MinED between them; the small tokenizers here serve the other tests of distillation."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from heterofusion.experts.expert import tokenizer_fingerprint
from heterofusion.experts.vocabulary import UNMAPPED, TokenIndex, VocabularyMap, token_bytes
from heterofusion.zoo import FAMILIES, zoo_path
from replay_builders import byte_level, word_level

TEXTS = ["w4 w5 w6", "w44 w45: w46; w7", "person: Ann; place: Bergen", "the answer is no"]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def sentencepiece_like(style: str = "metaspace", template: str | None = None, eos: str = "</s>", size: int = 340):
    """BPE with byte fallback and `▁` for spaces, put by a pre-tokenizer (Mistral) or a normalizer (Gemma)."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if style == "metaspace":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        strip = [decoders.Strip(" ", 1, 0)]
    else:
        backend.normalizer = normalizers.Replace(" ", "▁")
        strip = []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    special = ["<unk>", "<s>", eos, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    backend.train_from_iterator(TEXTS * 5, trainer)
    names = {**SPECIAL, "eos_token": eos}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **names)


def joined(tokenizer, text: str) -> bytes:
    pieces = token_bytes(tokenizer)
    assert len(pieces) == len(tokenizer)
    return b"".join(pieces[i] for i in tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("text", [*TEXTS, "Blåbærgrød 你好 \N{PILE OF POO}", "two  spaces and a line"])
def test_tokens_are_the_text_before_which_some_put_a_space(text):
    assert joined(byte_level(), text) == joined(sentencepiece_like("normalizer"), text) == text.encode()
    assert joined(sentencepiece_like(), text) == f" {text}".encode()


def test_special_tokens_have_no_bytes():
    for tokenizer in (byte_level(), sentencepiece_like(), word_level()):
        pieces = token_bytes(tokenizer)
        assert tokenizer.all_special_ids and all(pieces[i] is None for i in tokenizer.all_special_ids)


def test_tokens_that_were_added_are_read_as_they_are():
    tokenizer = byte_level()
    tokenizer.add_tokens(["Ġraw <tag>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    pieces = token_bytes(tokenizer)
    assert pieces[tokenizer.convert_tokens_to_ids("Ġraw <tag>")] == "Ġraw <tag>".encode()
    assert pieces[tokenizer.convert_tokens_to_ids("<|end|>")] is None


@pytest.mark.parametrize("family", FAMILIES)
def test_tokenizers_of_the_zoo(family):
    tokenizer = AutoTokenizer.from_pretrained(zoo_path(family))
    text = "plant: lomefar; name: Ori 12"
    assert joined(tokenizer, text).removeprefix(b" ") == text.encode()


def test_slow_tokenizer_raises():
    class Slow:
        name_or_path = "some/tokenizer"

    with pytest.raises(ValueError, match=r"'some/tokenizer' has no fast version; save one with a tokenizer\.json"):
        token_bytes(Slow())


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
