"""Which tokens of two tokenizations of one answer stand for each other: dynamic time warping (DTW) on edit distance.

Origin: FuseLLM, arXiv 2401.10491, section 3.3: the cost of a pair of tokens is their edit distance, once the space
marks are gone. All steps of the path cost alike, and of equally good ones the diagonal is taken.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from heterofusion.experts.vocabulary import as_columns, edit_distances

Symbols = tuple[int, ...]

# Special tokens have no text. As single symbols that are no bytes, each is n edits away from a text of n bytes.
END: Symbols = (256,)
SPECIAL: Symbols = (257,)


class AnswerSymbols:
    """Turns the tokens of an answer into what is compared: their bytes, and one symbol for all that end a turn.

    Args:
        texts: bytes by token id, None for special tokens.
        ends: ids of the tokens that end an answer or a turn, whatever they are called.

    Attributes:
        ends: the same.
    """

    def __init__(self, texts: Sequence[bytes | None], ends: Sequence[int]) -> None:
        self.ends = tuple(ends)
        self._texts = texts

    def of(self, tokens: Sequence[int]) -> tuple[list[int], list[Symbols]]:
        """Positions in the answer that take part in an alignment, and their symbols.

        White space right after the end of a turn is left out: some chat templates write it, others do not.
        """
        positions: list[int] = []
        symbols: list[Symbols] = []
        after_end = False
        for position, token in enumerate(tokens):
            text = self._texts[token] if token < len(self._texts) else None
            if token in self.ends:
                symbol, after_end = END, True
            elif after_end and text is not None and not text.strip():
                continue
            else:
                symbol, after_end = SPECIAL if text is None else tuple(text), False
            positions.append(position)
            symbols.append(symbol)
        return positions, symbols


def one_to_one(source: Sequence[Symbols], target: Sequence[Symbols]) -> list[tuple[int, int]]:
    """Pairs of tokens that DTW aligns with each other and with nothing else.

    Args:
        source: symbols of each token.
        target: those of the other tokenization.

    Returns:
        (source index, target index), ascending.
    """
    if not source or not target:
        return []
    if list(source) == list(target):  # where the diagonal costs nothing
        return [(index, index) for index in range(len(source))]
    path = dtw_path(token_costs(source, target))
    of_source = np.bincount([i for i, _ in path])
    of_target = np.bincount([j for _, j in path])
    return [(i, j) for i, j in path if of_source[i] == 1 and of_target[j] == 1]


def token_costs(source: Sequence[Symbols], target: Sequence[Symbols]) -> NDArray[np.int64]:
    """Edit distances (source tokens, target tokens); each pair of different tokens is compared once."""
    rows, columns = list(dict.fromkeys(source)), list(dict.fromkeys(target))
    candidates = as_columns(columns)
    distances = np.stack([edit_distances(row, *candidates) for row in rows])  # (different rows, different columns)
    row_of, column_of = ({symbols: i for i, symbols in enumerate(kinds)} for kinds in (rows, columns))
    return distances[np.ix_([row_of[s] for s in source], [column_of[s] for s in target])]


def dtw_path(costs: NDArray[np.int64]) -> list[tuple[int, int]]:
    """The cheapest monotone path from the first pair to the last, through neighbouring pairs.

    O(rows * columns), a row at a time in numpy.

    Args:
        costs: (rows, columns), at least one each.

    Returns:
        The pairs (row, column) on the path, ascending; of equally cheap steps the diagonal is taken, then the one
        that stays in the column.
    """
    far = np.iinfo(np.int64).max // 4
    rows, columns = costs.shape
    total = np.full((rows + 1, columns + 1), far, dtype=np.int64)
    total[0, 0] = 0
    for i in range(rows):
        above = np.minimum(total[i, 1:], total[i, :-1])
        along = np.cumsum(costs[i])
        # staying in the row from column k to j costs the sum between: a running minimum finds the best k for every j
        total[i + 1, 1:] = along + np.minimum.accumulate(above - along + costs[i])
    i, j = rows, columns
    path = [(i - 1, j - 1)]
    while i > 1 or j > 1:
        steps = (total[i - 1, j - 1], total[i - 1, j], total[i, j - 1])
        step = int(np.argmin(steps))  # the first of equals
        i, j = i - (step != 2), j - (step != 1)
        path.append((i - 1, j - 1))
    return path[::-1]
