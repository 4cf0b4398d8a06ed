"""Minimum edit distance (MinED): which token of the target's vocabulary stands for a token of another model.

A token of equal bytes (after the space marks are gone) if there is one, else the one of smallest
edit distance. Equally good ones are told apart by: the same text but for the space before it, the smaller difference
in length, the shorter spelling in the vocabulary (`A` before `<0x41>`), the lower token id.

Origin: FuseLLM, arXiv 2401.10491, section 3.3.
"""

import json
import logging
import os
import re
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from heterofusion.experts.identity import tokenizer_fingerprint
from heterofusion.experts.store import cache_key, naming
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.files import TEMPORARY

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


_WORD_MARK = "▁"


_CONTINUATION = "##"


_MARKED = {"Metaspace", "ByteFallback", "Unigram"}


logger = logging.getLogger(__name__)

UNMAPPED = -1
_FORMAT = 1  # of the files; another number is another file name

# A bit for each byte: one of their own for small letters and the space, 16 for the rest of ASCII, 21 for all others.
_BITS = np.array(
    [
        1
        << (byte - 97 if 97 <= byte <= 122 else 26 if byte == 32 else 27 + byte % 16 if byte < 128 else 43 + byte % 21)
        for byte in range(256)
    ],
    dtype=np.uint64,
)

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

    They lie in buckets by length. Lengths are tried in the order of their difference to the query's, until that alone
    is no better than what was found. In a bucket, only texts whose sets of bytes (folded to 64 bits) differ little
    enough are compared: a difference of n bytes needs n edits. Worst case of a query: O(vocabulary * length^2) in
    numpy; for most words a few hundred texts are left, which takes 2 to 3 ms with a vocabulary of 128,000 tokens.

    Args:
        texts: bytes by token id; tokens that are None or empty are never found.
        spellings: the tokens as the vocabulary writes them; of those alike, the shorter is taken.
    """

    def __init__(self, texts: Sequence[bytes | None], spellings: Sequence[str]) -> None:
        self.exact: dict[bytes, int] = {}
        self._rank: dict[int, int] = {}  # in the order of preference among equally near ones
        lengths: dict[int, list[int]] = defaultdict(list)
        for index in sorted(range(len(texts)), key=lambda i: (len(spellings[i]), i)):
            text = texts[index]
            if text:
                self._rank[index] = len(self._rank)
                self.exact.setdefault(text, index)
                lengths[len(text)].append(index)
        self._buckets: dict[int, tuple[list[int], NDArray[np.uint16], NDArray[np.uint64]]] = {}
        for length, ids in lengths.items():
            joined = b"".join(texts[i] or b"" for i in ids)
            columns = np.frombuffer(joined, dtype=np.uint8).reshape(len(ids), length).T.astype(np.uint16)
            self._buckets[length] = (ids, columns, _byte_sets(columns))
        self._longest = max(self._buckets, default=0)

    def nearest(self, text: bytes) -> int:
        """Id of the nearest token, by the order of preference that the module states; `UNMAPPED` if there is none."""
        if not text or not self.exact:
            return UNMAPPED
        respaced = text[1:] if text.startswith(b" ") else b" " + text
        for equal in (text, respaced):  # at distance 0, and at 1, where nothing is nearer
            if equal in self.exact:
                return self.exact[equal]
        query, query_set = list(text), _byte_sets(np.array([list(text)], dtype=np.uint16).T)[0]
        best, chosen = max(len(text), self._longest) + 1, UNMAPPED
        for gap in range(max(len(text), self._longest) + 1):
            if gap >= best:  # the distance is the gap at least, and of equal distances the smaller gap counts
                break
            found: list[tuple[int, int, int]] = []  # distance, rank, id
            limit = best - 1
            for length in {len(text) - gap, len(text) + gap} & self._buckets.keys():
                limit = self._search(query, query_set, length, limit, found)
            if found:
                best, _, chosen = min(found)
        return chosen

    def _search(
        self,
        query: list[int],
        query_set: np.uint64,
        length: int,
        limit: int,
        found: list[tuple[int, int, int]],
    ) -> int:
        """Add what one bucket has at a distance of `limit` at most; gives the smallest distance as the new limit."""
        ids, columns, sets = self._buckets[length]
        missing = np.bitwise_count(query_set & ~sets).astype(np.int64)  # (tokens,)
        for bit, count in Counter(_BITS[query].tolist()).items():
            if count > 1:  # each time that it stands there
                missing += (count - 1) * (sets & np.uint64(bit) == 0)
        bounds = np.maximum(missing, np.bitwise_count(sets & ~query_set))
        for bound in range(int(bounds.min()), limit + 1):
            if bound > limit:
                break
            chosen = np.flatnonzero(bounds == bound)
            if len(chosen) == 0:
                continue
            distances = edit_distances(query, columns[:, chosen], np.full(len(chosen), length))
            smallest = int(distances.min())
            if smallest <= limit:
                limit = smallest
                first = ids[chosen[int(distances.argmin())]]  # buckets are in the order of preference
                found.append((smallest, self._rank[first], first))
        return limit


def _byte_sets(columns: NDArray[np.uint16]) -> NDArray[np.uint64]:
    """Per column, the bits of the bytes that occur in it."""
    return np.bitwise_or.reduce(_BITS[columns], axis=0)


class VocabularyMap:
    """The map from one tokenizer's tokens to another's, made for tokens as they are asked for, and kept on disk.

    Special tokens have no text: one is mapped to the special token of the same name, if there is one.

    Args:
        source: tokenizer whose tokens are mapped.
        target: tokenizer that they are mapped to.
        folder: where the map is kept, in a file of the two tokenizers' fingerprints; None keeps it in memory.

    Attributes:
        seconds: that making it took, in earlier runs too.
        identity: whether the two tokenizers are the same, so that every token is its own.
    """

    def __init__(
        self, source: PreTrainedTokenizerBase, target: PreTrainedTokenizerBase, folder: Path | None = None
    ) -> None:
        names = [tokenizer_fingerprint(tokenizer) for tokenizer in (source, target)]
        self.identity = names[0] == names[1]
        self.seconds = 0.0
        self._source, self._target = source, target
        self._size = len(source)
        self._known: dict[int, int] = {}
        self._path: Path | None = None
        if folder is not None and not self.identity:
            key = cache_key({"format": _FORMAT, "source": names[0], "target": names[1]})
            self._path = folder / f"vocabulary-{key}.json"
            self._load(self._path)

    def map(self, tokens: Iterable[int], shown: bool = False) -> Mapping[int, int]:
        """Map tokens."""
        wanted = {int(token) for token in tokens}
        if self.identity:
            return {token: token if token < self._size else UNMAPPED for token in wanted}
        missing = sorted(wanted - self._known.keys())
        if missing:
            start = time.perf_counter()
            self._make(missing, shown)
            self.seconds += time.perf_counter() - start
            self._save()
        return {token: self._known[token] for token in wanted}

    def _make(self, missing: Sequence[int], shown: bool) -> None:
        texts = token_bytes(self._source)
        index = TokenIndex(token_bytes(self._target), _spellings(self._target))
        special = {str(name): int(i) for name, i in zip(*_special(self._target), strict=True)}
        names = dict(zip(*reversed(_special(self._source)), strict=True))
        by_text: dict[bytes, int] = {}  # many ids may stand for one text
        for token in tqdm(missing, desc="Mapping tokens", unit="token", delay=3, leave=False, disable=not shown):
            text = texts[token] if token < self._size else None
            if text is None:
                self._known[token] = special.get(names.get(token, ""), UNMAPPED)
            else:
                if text not in by_text:
                    by_text[text] = index.nearest(text)
                self._known[token] = by_text[text]

    def _load(self, path: Path) -> None:
        if path.is_file():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
                self._known = {int(token): int(target) for token, target in found["tokens"]}
                self.seconds = float(found["seconds"])
            except (ValueError, KeyError, TypeError) as error:
                logger.warning("%s is damaged (%s): it is made anew", path, error)

    def _save(self) -> None:
        if self._path is None:
            return
        content = json.dumps({"seconds": round(self.seconds, 3), "tokens": [*self._known.items()]})
        temporary = self._path.with_name(f"{self._path.name}.{uuid.uuid4().hex[:8]}{TEMPORARY}")  # others may write it
        with naming(self._path):
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                temporary.write_text(content, encoding="utf-8")
                os.replace(temporary, self._path)
            finally:
                temporary.unlink(missing_ok=True)


def _spellings(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    spellings = [""] * len(tokenizer)
    for token, index in tokenizer.get_vocab().items():
        if index < len(spellings):
            spellings[index] = token
    return spellings


def _special(tokenizer: PreTrainedTokenizerBase) -> tuple[list[str], list[int]]:
    """Names and ids of the special tokens, those that are only added as special included."""
    added = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    named = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)) | added
    return list(named.values()), list(named)


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


def _byte_alphabet() -> dict[str, int]:
    """The characters by which byte-level tokenizers write bytes (GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_ALPHABET = _byte_alphabet()


def _decode_byte_level(token: str) -> bytes:
    if all(character in _ALPHABET for character in token):
        return bytes(_ALPHABET[character] for character in token)
    return token.encode()


def _decode_marked(token: str) -> bytes:
    byte = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace(_WORD_MARK, " ").encode()


def _decode_word(token: str) -> bytes:
    return token.removeprefix(_CONTINUATION).encode() if token.startswith(_CONTINUATION) else f" {token}".encode()
