"""Next tokens that models with different vocabularies choose together, compared by their bytes: GaC and UniTE."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from heterofusion.rivals.codec import AnswerCodec

END = 0  # index of the end of an answer in every union, whatever ends one for a member
# What stands for a token of the union in `UniTE.first_tokens`, beside ids of the member
_OWN, _NONE, _UNKNOWN = -1, -2, -3

# How members choose the next token: of every member, a next-token distribution (rows, vocabulary of the member), and
# (rows, members) which of them count, at least one in a row. Gives indices in the union. (rows,)
Vote = Callable[[Sequence[Tensor], Tensor], Tensor]


class Union:
    """The union of the vocabularies of several members, of which some token ids end an answer."""

    def __init__(
        self, codecs: Sequence[AnswerCodec], stops: Sequence[Iterable[int]], device: torch.device | str = "cpu"
    ) -> None:
        index: dict[bytes, int] = {b"": END}
        for codec, ends in zip(codecs, stops, strict=True):
            for token, piece in enumerate(codec.pieces):
                if piece and token not in ends:
                    index.setdefault(piece, len(index))
        self.pieces = [*index]  # bytes by index; those of `END` are empty
        # for each member (its vocabulary,): the index by its token id, `len(pieces)` for ids that stand for nothing
        self.columns = []
        for codec, ends in zip(codecs, stops, strict=True):
            columns = [index.get(piece, len(index)) if piece else len(index) for piece in codec.pieces]
            for token in ends:
                if token < len(columns):
                    columns[token] = END
            self.columns.append(torch.tensor(columns, device=device))

    def __len__(self) -> int:
        return len(self.pieces)

    def distribution(self, member: int, probabilities: Tensor) -> Tensor:
        """A member's distribution over the union, tokens with the same bytes added up: (rows, vocabulary) to
        (rows, union), which sums to less than 1 by what special tokens had.
        """
        sums = probabilities.new_zeros(len(probabilities), len(self) + 1)  # the last one is of what stands for nothing
        return sums.index_add_(1, self.columns[member], probabilities)[:, :-1]


class GaC:
    """The mean of the distributions over the union of the vocabularies, its largest entry (arXiv 2406.12585)."""

    def __init__(self, union: Union) -> None:
        self.union = union

    def mean(self, probabilities: Sequence[Tensor], voting: Tensor) -> Tensor:
        """Mean distribution of the voting members. (rows, union)"""
        mean = probabilities[0].new_zeros(len(voting), len(self.union))
        for member, weight in enumerate(_weights(voting).unbind(dim=1)):
            mean += weight[:, None] * self.union.distribution(member, probabilities[member])
        return mean

    def __call__(self, probabilities: Sequence[Tensor], voting: Tensor) -> Tensor:
        """As `Vote` says."""
        return self.mean(probabilities, voting).argmax(dim=1)


class UniTE:
    """The mean over the union of the members' top tokens, its largest entry (arXiv 2410.03777).

    A member whose vocabulary lacks a token of that union scores it by the first of the tokens into which its own
    tokenizer splits it. Its scores are normalized by a softmax of their logarithms, which is their share of the sum.
    """

    def __init__(self, union: Union, codecs: Sequence[AnswerCodec], top_k: int) -> None:
        self.union, self.codecs = union, codecs
        # tokens of the union that a member has not got are none of its top ones, however many are asked for
        self.top_k = [min(top_k, len(set(columns.tolist()) - {len(union)})) for columns in union.columns]
        # For each member what it scores a token of the union by: found when the token is first among the top ones.
        self.first_tokens: list[Tensor] = []
        for columns in union.columns:
            first = torch.full((len(union) + 1,), _UNKNOWN, device=columns.device)
            first[columns] = _OWN
            first[END] = _OWN  # who never ends an answer gives the end no probability
            self.first_tokens.append(first[:-1])

    def shares(self, probabilities: Sequence[Tensor], voting: Tensor) -> tuple[Tensor, Tensor]:
        """Candidates as ascending indices in the union, some twice, and the mean share of each, -1 of a second one.

        Both are (rows, members * top_k).
        """
        over_union = [self.union.distribution(member, p) for member, p in enumerate(probabilities)]
        top = torch.cat([p.topk(k, dim=1).indices for p, k in zip(over_union, self.top_k, strict=True)], dim=1)
        # of a member that does not vote, the candidates are those of one that does
        counts = voting.repeat_interleave(torch.tensor(self.top_k, device=voting.device), dim=1)
        candidates = torch.where(counts, top, top.gather(1, counts.long().argmax(dim=1, keepdim=True))).sort(dim=1)[0]
        again = torch.zeros_like(candidates, dtype=torch.bool)
        again[:, 1:] = candidates[:, 1:] == candidates[:, :-1]
        mean = torch.zeros_like(candidates, dtype=over_union[0].dtype)
        for member, weight in enumerate(_weights(voting).unbind(dim=1)):
            first = self._first_tokens(member, candidates)
            by_first = probabilities[member].gather(1, first.clamp(min=0)).masked_fill(first == _NONE, 0.0)
            scores = torch.where(first == _OWN, over_union[member].gather(1, candidates), by_first)
            scores = scores.masked_fill(again, 0.0)
            sums = scores.sum(dim=1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
            mean += weight[:, None] * scores / sums
        return candidates, mean.masked_fill(again, -1.0)

    def _first_tokens(self, member: int, candidates: Tensor) -> Tensor:
        """What a member scores candidates by; those that it has not seen yet are tokenized."""
        known = self.first_tokens[member]
        for index in candidates[known[candidates] == _UNKNOWN].unique().tolist():
            ids, _ = self.codecs[member].encode(self.union.pieces[index])
            known[index] = ids[0] if ids else _NONE
        return known[candidates]

    def __call__(self, probabilities: Sequence[Tensor], voting: Tensor) -> Tensor:
        """As `Vote` says."""
        candidates, shares = self.shares(probabilities, voting)
        return candidates.gather(1, shares.argmax(dim=1, keepdim=True))[:, 0]


def _weights(voting: Tensor) -> Tensor:
    """Weights of a mean over the voting members. (rows, members)"""
    counts = voting.float()
    return counts / counts.sum(dim=1, keepdim=True)
