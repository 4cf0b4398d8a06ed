"""Answers of experts, kept in part files by a hash of everything that they depend on.

    output_dir/parts/<key>/rank-0.jsonl

Whoever asks the same of the same model finds what is there, and nothing else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState

from heterofusion.experts.answering import ExpertAnswerer, Questions, ask
from heterofusion.experts.expert import Expert, ExpertRunner
from heterofusion.experts.generation import Answer, GenerationArguments, Sampling

_FORMAT = 2  # of part files; another number is another folder


@dataclass(frozen=True)
class Asked:
    """What an expert is asked: prompts as its token ids, and how it answers; without `sampling` greedily."""

    ids: Sequence[Sequence[int]]
    max_new_tokens: int
    sampling: Sampling | None = None

    def identity(self) -> dict[str, Any]:
        """What answers depend on, the expert aside."""
        digest = hashlib.sha256()
        for row in self.ids:
            digest.update(np.asarray([len(row), *row], dtype=np.int64).tobytes())
        return {
            "prompts": digest.hexdigest(),
            "max_new_tokens": self.max_new_tokens,
            "sampling": asdict(self.sampling) if self.sampling else None,
        }


class Asking:
    """Asks one expert after the other. All processes use it together."""

    def __init__(
        self, ranks: PartialState, folder: Path, runner: ExpertRunner, generation: GenerationArguments
    ) -> None:
        self.ranks, self.folder, self.runner, self.generation = ranks, folder, runner, generation
        self._seconds: dict[Path, float] = {}  # the same questions may be asked twice

    @property
    def seconds(self) -> float:
        """Of generation, in all runs together."""
        return sum(self._seconds.values())

    def ask(self, expert: Expert, questions: Mapping[str, Asked], title: str) -> dict[str, list[Answer]]:
        """The answers of an expert by name, in the order of the questions."""
        identity = expert.identity()
        placed = {
            name: Questions(
                parts_folder(self.folder, {**identity, **asked.identity()}),
                asked.ids,
                list(map(len, asked.ids)),
                asked.max_new_tokens,
                asked.sampling,
            )
            for name, asked in questions.items()
        }
        answerer = ExpertAnswerer(expert, self.runner, self.generation, in_context=True)
        found = ask(self.ranks, answerer, placed, f"{expert.name}, {title}")
        self._seconds |= {placed[name].folder: seconds for name, (_, seconds) in found.items()}
        return {name: answers for name, (answers, _) in found.items()}


def parts_folder(folder: Path, identity: Mapping[str, Any]) -> Path:
    """Where answers with an identity are; other plain values are another folder."""
    key = json.dumps({"format": _FORMAT, **identity}, sort_keys=True)
    return folder / hashlib.sha256(key.encode()).hexdigest()[:24]
