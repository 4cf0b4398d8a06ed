"""What the tokens of any tokenizer stand for, as bytes, so that vocabularies can be compared.

A byte-level tokenizer writes a space as `Ġ`, a sentencepiece one as `▁`, and one of whole words puts spaces between
its tokens; all of them come out the same here.
"""

import json
import re
from typing import Any

from transformers import PreTrainedTokenizerBase

from heterofusion.runtime.errors import UserError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_WORD_MARK = "▁"
_CONTINUATION = "##"


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> list[bytes | None]:
    """The bytes that each token adds to a text.

    A token that begins a word begins with a space. Tokens of byte-level and sentencepiece tokenizers may be parts of
    a character, so that they are no valid UTF-8.

    Args:
        tokenizer: a fast tokenizer: byte-level, sentencepiece-like, WordPiece, or of whole words.

    Returns:
        Bytes by token id, `len(tokenizer)` of them; None for special tokens and ids without a token.

    Raises:
        ValueError: the tokenizer is not a fast one.
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


_MARKED = {"Metaspace", "ByteFallback", "Unigram"}


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
