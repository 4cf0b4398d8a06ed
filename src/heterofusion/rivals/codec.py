"""An answer as bytes and as tokens of one tokenizer, apart from the prompt before it.

An answer is tokenized without the special tokens and the space that a tokenizer puts around and before a text.
"""

import re
from itertools import zip_longest
from typing import Any

from heterofusion.experts.vocabulary import token_bytes

# Texts after which an answer is tokenized where it cannot be alone; their own tokens are then taken off.
_ANCHORS = ("\n", ":", "x")


class AnswerCodec:
    """Bytes of an answer as tokens of one fast tokenizer, whose model has a vocabulary of `size` entries."""

    def __init__(self, tokenizer: Any, size: int) -> None:
        pieces = token_bytes(tokenizer)
        self.tokenizer = tokenizer
        # bytes by token id, None for special tokens and entries without a token
        self.pieces: list[bytes | None] = [*pieces[:size], *[None] * (size - len(pieces))]
        self.ids: dict[bytes, int] = {}  # token id by bytes
        spare = []
        for token, piece in enumerate(self.pieces):
            # a sentencepiece vocabulary has some characters twice, as themselves and as bytes such as `<0x0A>`
            if piece and len(piece) == 1 and str(tokenizer.convert_ids_to_tokens(token)).startswith("<0x"):
                spare.append((piece, token))
            elif piece:
                self.ids.setdefault(piece, token)
        self.ids = dict(spare) | self.ids

    def encode(self, answer: bytes) -> tuple[list[int], bool]:
        """Token ids of an answer, or of the beginning of one, and whether they say it all.

        They do not where the bytes end within a character of which the tokenizer has no parts.
        """
        ids: list[int] = []
        whole = True
        for part in split_characters(answer):
            if isinstance(part, str):
                ids += self._encode_text(part)
                whole = True  # what was missing before it never came
                continue
            found = [self.ids.get(bytes([byte])) for byte in part]
            ids += [token for token in found if token is not None]
            whole = None not in found
        return ids, whole

    def append(self, ids: list[int], piece: bytes, answer: bytes, whole: bool = True) -> tuple[list[int], bool]:
        """The tokens of an answer that grew by a piece, and whether they say it all, as `ids` did if `whole`.

        They are `ids` and one more where this tokenizer has the token, else all of the answer tokenized anew.
        """
        token = self.ids.get(piece)
        return ([*ids, token], True) if whole and token is not None else self.encode(answer)

    def _encode_text(self, text: str) -> list[int]:
        """The first tokenization that says exactly the text; of unknown words there is none, then the plain one."""
        wanted = text.encode()
        plain = self._tokens(text)
        if self._says(plain) == wanted:
            return plain
        for anchor in _ANCHORS:
            head, ids = self._tokens(anchor), self._tokens(anchor + text)
            if ids[: len(head)] == head and self._says(ids[len(head) :]) == wanted:
                return ids[len(head) :]
        return plain

    def _tokens(self, text: str) -> list[int]:
        # an answer may spell a special token, which does not make it one
        found = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        return [token for token in found if token < len(self.pieces)]

    def _says(self, ids: list[int]) -> bytes | None:
        pieces = [self.pieces[token] for token in ids]
        return None if None in pieces else b"".join(piece for piece in pieces if piece is not None)


def split_characters(data: bytes) -> list[str | bytes]:
    """Texts, and what between and after them is no UTF-8; encoded, they are the bytes again, and none is empty."""
    parts = re.split("([\udc80-\udcff]+)", data.decode(errors="surrogateescape"))
    others = [part.encode(errors="surrogateescape") for part in parts[1::2]]
    return [part for pair in zip_longest(parts[::2], others) for part in pair if part]
