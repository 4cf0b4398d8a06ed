"""Greedy answers that several models write together, in batches."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from heterofusion.experts.generation import Answer, Batches
from heterofusion.rivals.codec import AnswerCodec
from heterofusion.rivals.voting import END, Union, Vote


@dataclass(frozen=True)
class Member:
    """One model of an ensemble."""

    model: Any  # in evaluation mode
    codec: AnswerCodec
    pad_id: int
    context: int | None = None  # most tokens of prompt and answer


class CachedReader:
    """Reads a batch of sequences again and again, with the keys and values of what stayed the same kept.

    Every sequence is padded on the left wherever another one got more tokens at once. Columns of the cache with tokens
    that are no longer part of their sequence are masked, and cropped off as soon as they are at the end of all.
    Positions are those of the sequence, so that gaps make no difference but in a sliding window, which counts columns.
    """

    def __init__(self, model: Any, pad_id: int) -> None:
        self.model, self.pad_id, self.device = model, pad_id, next(model.parameters()).device
        self.tokens_run = 0  # so far, without padding
        # Full layers for all, sliding windows too: what a window left behind could not be cropped.
        self.cache = DynamicCache()
        self.mask = torch.zeros(0, 0, dtype=torch.long, device=self.device)  # (sequences, columns)
        self._ids: list[list[int]] = []
        self._columns: list[list[int]] = []  # of every token, by sequence
        known = inspect.signature(getattr(model, "get_base_model", lambda: model)().forward).parameters
        self._takes_positions = "position_ids" in known
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in known else {}

    @torch.no_grad()
    def read(self, sequences: Sequence[Sequence[int]]) -> torch.Tensor:
        """Next-token distributions in float32 after sequences of token ids, as many as before. (rows, vocabulary)"""
        if not self._ids:
            self._ids, self._columns = [[] for _ in sequences], [[] for _ in sequences]
            self.mask = self.mask.new_zeros(len(sequences), 0)
        kept = [_kept(old, new) for old, new in zip(self._ids, sequences, strict=True)]
        self._forget(kept)
        past = self.mask.shape[1]
        new = [[*sequence[keep:]] for sequence, keep in zip(sequences, kept, strict=True)]
        width = max(map(len, new))
        ids, mask, positions = [], [], []  # (sequences, width), padded on the left
        for row, (tokens, keep) in enumerate(zip(new, kept, strict=True)):
            pad = width - len(tokens)
            ids.append([self.pad_id] * pad + tokens)
            mask.append([0] * pad + [1] * len(tokens))
            positions.append([0] * pad + [*range(keep, keep + len(tokens))])
            self._columns[row] += range(past + pad, past + width)
            self._ids[row] += tokens
            self.tokens_run += len(tokens)
        self.mask = torch.cat([self.mask, torch.tensor(mask, device=self.device)], dim=1)
        place = {"position_ids": torch.tensor(positions, device=self.device)} if self._takes_positions else {}
        output = self.model(
            input_ids=torch.tensor(ids, device=self.device),
            attention_mask=self.mask,
            past_key_values=self.cache,
            use_cache=True,
            **place,
            **self._last_only,
        )
        return output.logits[:, -1].float().softmax(dim=-1)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with some of the sequences, by their numbers."""
        index = torch.tensor(rows, device=self.device)
        self.cache.batch_select_indices(index)
        self.mask = self.mask[index]
        self._ids = [self._ids[row] for row in rows]
        self._columns = [self._columns[row] for row in rows]

    def _forget(self, kept: Sequence[int]) -> None:
        """Forget all tokens of every sequence but the first ones."""
        stale = [(row, column) for row, keep in enumerate(kept) for column in self._columns[row][keep:]]
        if not stale:
            return
        rows, columns = zip(*stale, strict=True)
        self.mask[[*rows], [*columns]] = 0
        for row, keep in enumerate(kept):
            del self._ids[row][keep:], self._columns[row][keep:]
        last = max((columns[-1] for columns in self._columns if columns), default=-1)
        if surplus := self.mask.shape[1] - 1 - last:
            self.cache.crop(-surplus)
            self.mask = self.mask[:, : last + 1]


def _kept(old: Sequence[int], new: Sequence[int]) -> int:
    """How many tokens of a sequence stay; the last one of the new sequence always runs, as its logits are needed."""
    most = min(len(old), len(new) - 1)
    if old[:most] == new[:most]:  # by far the most frequent case, and fast
        return most
    return next(at for at in range(most) if old[at] != new[at])


@dataclass
class _Writing:
    """An answer that is being written: its bytes, and what each member takes them for."""

    prompts: Sequence[Sequence[int]]  # of the members
    ids: list[list[int]]  # of the answer alone, by member
    whole: list[bool]  # whether the ids say all of the text, by member
    text: bytes = b""
    new_tokens: int = 0

    def append(self, piece: bytes, members: Sequence[Member]) -> bool:
        """Write a token. Gives whether every member has room for one more."""
        self.text += piece
        for number, member in enumerate(members):
            known = self.ids[number], piece, self.text, self.whole[number]
            self.ids[number], self.whole[number] = member.codec.append(*known)
        return all(
            member.context is None or len(prompt) + len(ids) < member.context
            for member, prompt, ids in zip(members, self.prompts, self.ids, strict=True)
        )


class EnsembleGenerator:
    """Answers prompts by greedy decoding of several models together.

    All members continue the same text, each after a prompt in its own tokens, with a key-value cache of its own. A
    member that has the chosen token appends it; any other tokenizes the whole answer anew, and runs what changed. In
    the middle of a character, a member whose tokenizer has no bytes waits for the rest of it and does not vote.

    `tokens_run` tells how many tokens each member ran so far, prompts included.
    """

    def __init__(
        self,
        members: Sequence[Member],
        union: Union,
        vote: Vote,
        max_new_tokens: int = 256,
        batch_size: int | None = None,
    ) -> None:
        self.members, self.union, self.vote, self.max_new_tokens = members, union, vote, max_new_tokens
        self.batches = Batches(batch_size, max_new_tokens)
        self.tokens_run = [0] * len(members)

    def answers(self, prompts: Mapping[int, Sequence[Sequence[int]]]) -> Iterator[list[Answer]]:
        """Answers a batch at a time, longest prompts first; prompts are token ids of every member, by a key."""
        # by the member that takes most tokens, but none where one of them takes none
        lengths = {key: max(map(len, lists)) if all(lists) else 0 for key, lists in prompts.items()}

        def generate(batch: Sequence[int]) -> list[Answer]:
            written = self._generate([prompts[key] for key in batch])
            return [
                Answer(key, answer.text.decode(errors="replace"), answer.new_tokens)
                for key, answer in zip(batch, written, strict=True)
            ]

        yield from self.batches.run(lengths, generate)

    def _generate(self, prompts: Sequence[Sequence[Sequence[int]]]) -> list[_Writing]:
        """Write the answers to one batch of prompts."""
        readers = [CachedReader(member.model, member.pad_id) for member in self.members]
        answers = [_Writing(lists, [[] for _ in lists], [True for _ in lists]) for lists in prompts]
        alive = answers
        for _ in range(self.max_new_tokens):
            probabilities = [
                reader.read([[*answer.prompts[number], *answer.ids[number]] for answer in alive])
                for number, reader in enumerate(readers)
            ]
            voting = torch.tensor([answer.whole for answer in alive], device=probabilities[0].device)
            going_on = []
            for row, choice in enumerate(self.vote(probabilities, voting).tolist()):
                alive[row].new_tokens += 1
                if choice != END and alive[row].append(self.union.pieces[choice], self.members):
                    going_on.append(row)
            if not going_on:
                break
            if len(going_on) < len(alive):
                alive = [alive[row] for row in going_on]
                for reader in readers:
                    reader.keep(going_on)
        for number, reader in enumerate(readers):
            self.tokens_run[number] += reader.tokens_run
        return answers
