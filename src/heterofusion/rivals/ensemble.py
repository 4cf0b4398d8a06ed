"""Greedy answers that several models write together, in batches."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from heterofusion.experts.generation import Answer, Batches
from heterofusion.rivals.codec import AnswerCodec
from heterofusion.rivals.reader import CachedReader
from heterofusion.rivals.voting import END, Union, Vote


@dataclass(frozen=True)
class Member:
    """One model of an ensemble."""

    model: Any  # in evaluation mode
    codec: AnswerCodec
    pad_id: int
    context: int | None = None  # most tokens of prompt and answer


@dataclass
class _Writing:
    """An answer that is being written: its bytes, and what each member takes them for."""

    prompts: Sequence[Sequence[int]]  # of the members
    text: bytes = b""
    new_tokens: int = 0
    ids: list[list[int]] = field(default_factory=list)  # of the answer alone, by member
    whole: list[bool] = field(default_factory=list)  # whether the ids say all of the text, by member

    def __post_init__(self) -> None:
        self.ids = [[] for _ in self.prompts]
        self.whole = [True] * len(self.prompts)

    def append(self, piece: bytes, members: Sequence[Member]) -> bool:
        """Write a token. Gives whether every member has room for one more."""
        self.text += piece
        for number, member in enumerate(members):
            self.ids[number], self.whole[number] = member.codec.append(
                self.ids[number], piece, self.text, self.whole[number]
            )
        return all(
            member.context is None or len(prompt) + len(ids) < member.context
            for member, prompt, ids in zip(members, self.prompts, self.ids, strict=True)
        )


class EnsembleGenerator:
    """Answers prompts by greedy decoding of several models together.

    All members continue the same text, each after a prompt in its own tokens, with a key-value cache of its own. A
    member that has the chosen token appends it; any other tokenizes the whole answer anew, and runs what changed. In
    the middle of a character, a member whose tokenizer has no bytes waits for the rest of it and does not vote.

    Args:
        members: The models, on one device.
        union: Of their vocabularies.
        vote: Chooses the tokens.
        max_new_tokens: Most tokens in an answer, each from the union of the vocabularies.
        batch_size: Prompts per batch; None begins with 64 and halves it whenever memory runs out.

    Attributes:
        tokens_run: Tokens that each member ran so far, prompts included.
        tokens_needed: Tokens that each would have run if it had every chosen token: the prompts, and the answers.
    """

    def __init__(
        self,
        members: Sequence[Member],
        union: Union,
        vote: Vote,
        max_new_tokens: int = 256,
        batch_size: int | None = None,
    ) -> None:
        self.members = members
        self.union = union
        self.vote = vote
        self.max_new_tokens = max_new_tokens
        self.batches = Batches(batch_size, max_new_tokens)
        self.tokens_run = [0] * len(members)
        self.tokens_needed = [0] * len(members)

    @property
    def dtype(self) -> str:
        """The first member's dtype, by torch's name without the prefix."""
        return str(self.members[0].model.dtype).removeprefix("torch.")

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
        answers = [_Writing(lists) for lists in prompts]
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
            self.tokens_needed[number] += sum(len(a.prompts[number]) + a.new_tokens - 1 for a in answers)
        return answers
