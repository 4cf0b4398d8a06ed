"""Minimum edit distance (MinED): which token of the target's vocabulary stands for a token of another model.

A token of equal bytes (after the space marks are gone) if there is one, else the one of smallest
edit distance. Equally good ones are told apart by: the same text but for the space before it, the smaller difference
in length, the shorter spelling in the vocabulary (`A` before `<0x41>`), the lower token id.

Origin: FuseLLM, arXiv 2401.10491, section 3.3.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from heterofusion.experts.expert import tokenizer_fingerprint
from heterofusion.runtime.errors import UserError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_WORD_MARK = "▁"
_CONTINUATION = "##"
_MARKED = {"Metaspace", "ByteFallback", "Unigram"}

UNMAPPED = -1
# the 64 bits of a set of bytes: small letters, capital letters and digits meet in none with their own kind
_BITS = np.uint64(1) << (np.arange(256, dtype=np.uint64) & np.uint64(63))

Array = NDArray[np.int64]


def edit_distances(query: Sequence[int], columns: NDArray[np.uint16], lengths: Array) -> Array:
    """Levenshtein distances of one sequence to many.

    Args:
        query: symbols of the one, such as bytes.
        columns: (longest, candidates): one candidate a column, whatever below its end.
        lengths: (candidates,): number of symbols of each.

    Returns:
        (candidates,): insertions, deletions and replacements that make one of the other.
    """
    steps = np.arange(len(columns) + 1, dtype=np.int16)[:, None]  # (longest + 1, 1)
    row = np.broadcast_to(steps, (len(steps), columns.shape[1]))
    for position, symbol in enumerate(query, start=1):
        new = np.empty(row.shape, dtype=np.int16)
        new[0] = position
        np.minimum(row[1:] + 1, row[:-1] + (columns != symbol), out=new[1:], casting="unsafe")
        # what comes from above costs 1 a step: a running minimum of the costs less the steps does it at once
        row = np.minimum.accumulate(new - steps, axis=0) + steps
    return row[lengths, np.arange(columns.shape[1])].astype(np.int64)


def as_columns(sequences: Sequence[Sequence[int]]) -> tuple[NDArray[np.uint16], Array]:
    """Sequences as the columns and lengths that `edit_distances` takes."""
    lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
    columns = np.zeros((int(lengths.max(initial=0)), len(sequences)), dtype=np.uint16)
    for index, sequence in enumerate(sequences):
        columns[: len(sequence), index] = list(sequence)
    return columns, lengths


class TokenIndex:
    """Texts of a vocabulary, to find the nearest one.

    Two bounds of a distance are known at once for all texts: the difference in length, and of their sets of bytes
    (folded to 64 bits), as a difference of n bytes needs n edits. Texts are compared in the order of the larger bound,
    until it is no better than what was found. Worst case of a query: O(vocabulary * length^2) in numpy; for most words
    a few hundred texts are compared, which takes milliseconds with a vocabulary of 128,000 tokens.

    Args:
        texts: bytes by token id; tokens that are None or empty are never found.
        spellings: the tokens as the vocabulary writes them; of those alike, the shorter is taken.
    """

    def __init__(self, texts: Sequence[bytes | None], spellings: Sequence[str]) -> None:
        order = sorted(range(len(texts)), key=lambda index: (len(spellings[index]), index))
        self._ids = [index for index in order if texts[index]]  # in the order of preference among equally near ones
        self.exact: dict[bytes, int] = {texts[index] or b"": index for index in reversed(self._ids)}
        self._columns, self._lengths = as_columns([texts[index] or b"" for index in self._ids])
        self._sets = np.zeros(len(self._ids), dtype=np.uint64)
        for row, symbols in enumerate(self._columns):
            self._sets |= np.where(row < self._lengths, _BITS[symbols], np.uint64(0))

    def nearest(self, text: bytes) -> int:
        """Id of the nearest token, by the order of preference that the module states; `UNMAPPED` if there is none."""
        if not text or not self.exact:
            return UNMAPPED
        respaced = text[1:] if text.startswith(b" ") else b" " + text
        for equal in (text, respaced):  # at distance 0, and at 1, where nothing is nearer
            if equal in self.exact:
                return self.exact[equal]
        own = np.bitwise_or.reduce(_BITS[list(text)])
        missing = np.bitwise_count(own & ~self._sets).astype(np.int64)  # (tokens,)
        gaps = np.abs(self._lengths - len(text))
        bounds = np.maximum(np.maximum(missing, np.bitwise_count(self._sets & ~own)), gaps)
        best = (len(text) + len(self._columns) + 1, 0, 0)  # distance, gap, place in the order of preference
        for bound in range(int(bounds.min()), int(bounds.max()) + 1):
            if bound > best[0]:
                break
            # at a distance of the bound only what is nearer in length, or as near and preferred, can win
            chosen = np.flatnonzero((bounds == bound) & (gaps <= best[1]) if bound == best[0] else bounds == bound)
            if len(chosen):
                lengths = self._lengths[chosen]
                distances = edit_distances(text, self._columns[: lengths.max(), chosen], lengths)
                first = np.lexsort((chosen, gaps[chosen], distances))[0]
                best = min(best, (int(distances[first]), int(gaps[chosen[first]]), int(chosen[first])))
        return self._ids[best[2]]


class VocabularyMap(dict[int, int]):
    """The map from one tokenizer's tokens to another's, made for tokens as they are asked for.

    Special tokens have no text: one is mapped to the special token of the same name, if there is one.
    """

    def __init__(self, source: PreTrainedTokenizerBase, target: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.identity = tokenizer_fingerprint(source) == tokenizer_fingerprint(target)  # every token is its own
        self._texts = token_bytes(source)
        if not self.identity:
            spellings = [str(token) for token in target.convert_ids_to_tokens([*range(len(target))])]
            self._index = TokenIndex(token_bytes(target), spellings)
            self._names = _special(source)
            self._special = {name: token for token, name in _special(target).items()}

    def __missing__(self, token: int) -> int:
        self[token] = self._map(token)
        return self[token]

    def _map(self, token: int) -> int:
        if self.identity:
            return token if token < len(self._texts) else UNMAPPED
        text = self._texts[token] if token < len(self._texts) else None
        return self._special.get(self._names.get(token, ""), UNMAPPED) if text is None else self._index.nearest(text)


def _special(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Special tokens by id, those that are only added as special included."""
    added = {int(i): str(token) for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)) | added


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> list[bytes | None]:
    """The bytes that each token adds to a text.

    A token that begins a word begins with a space. Tokens of byte-level and sentencepiece tokenizers may be parts of
    a character, so that they are no valid UTF-8.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(f"tokenizer of {tokenizer.name_or_path!r} has no fast version; save one with a tokenizer.json")
    kinds = set(_types(json.loads(backend.to_str())))
    decode = _decode_byte_level if "ByteLevel" in kinds else _decode_marked if kinds & _MARKED else _decode_word
    special = set(tokenizer.all_special_ids)
    added: dict[int, Any] = tokenizer.added_tokens_decoder
    pieces: list[bytes | None] = [None] * len(tokenizer)
    for token, index in tokenizer.get_vocab().items():
        if index >= len(pieces):
            continue
        if decode is _decode_marked and _BYTE_TOKEN.fullmatch(token):  # which some tokenizers call special
            pieces[index] = decode(token)
        elif index not in special and not (index in added and added[index].special):
            pieces[index] = token.encode() if index in added else decode(token)
    return pieces


def _types(part: Any) -> list[str]:
    """All `type` fields of a tokenizer's parts, and `Metaspace` where a normalizer or decoder swaps the word mark."""
    if isinstance(part, list):
        return [kind for item in part for kind in _types(item)]
    if not isinstance(part, dict):
        return []
    found = [part["type"]] if isinstance(part.get("type"), str) else []
    if part.get("type") == "Replace" and _WORD_MARK in (
        part.get("content"),
        (part.get("pattern") or {}).get("String"),
    ):
        found.append("Metaspace")
    return found + [kind for key, item in part.items() if key not in ("vocab", "merges") for kind in _types(item)]


_ALPHABET = {character: byte for byte, character in bytes_to_unicode().items()}


def _decode_byte_level(token: str) -> bytes:
    if all(character in _ALPHABET for character in token):
        return bytes(_ALPHABET[character] for character in token)
    return token.encode()


def _decode_marked(token: str) -> bytes:
    byte = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace(_WORD_MARK, " ").encode()


def _decode_word(token: str) -> bytes:
    return token.removeprefix(_CONTINUATION).encode() if token.startswith(_CONTINUATION) else f" {token}".encode()
