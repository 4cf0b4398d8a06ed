"""Models that read sequences of which only the ends change: what stays is not run again."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache


class CachedReader:
    """Reads a batch of sequences again and again, with the keys and values of what stayed the same kept.

    In the cache every sequence has columns of its own, padded on the left wherever another one got more tokens at
    once. Columns of tokens that are no longer part of their sequence are masked, and cropped off the cache as soon as
    they are at the end of all. Positions are those of the sequence, so that gaps make no difference; but a sliding
    window counts columns, so that of a sequence longer than the window, gaps take a few tokens out of it.

    Args:
        model: A causal LM, with or without a PEFT adapter, in evaluation mode.
        pad_id: A token for the padding.

    Attributes:
        tokens_run: Number of tokens that were run so far, without padding.
    """

    def __init__(self, model: Any, pad_id: int) -> None:
        self.model = model
        self.pad_id = pad_id
        self.device = next(model.parameters()).device
        self.tokens_run = 0
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
