"""Asking experts: what is missing is generated, shared by the processes; what is there is read from part files."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from tqdm.auto import tqdm

from heterofusion.evaluation.arguments import GenerationArguments
from heterofusion.evaluation.store import PartWriter
from heterofusion.experts.expert import Expert, OneModel
from heterofusion.experts.generation import longest_first
from heterofusion.experts.label_generation import Label, LabelGenerator, Sampling
from heterofusion.labelling.parts import parts_folder, read_parts, write_labels
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.ranks import all_together, from_main


@dataclass(frozen=True)
class Questions:
    """What an expert is asked.

    Args:
        ids: The prompts as its token ids.
        max_new_tokens: Most tokens in an answer.
        sampling: How to sample; None decodes greedily.
    """

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


class Answering:
    """Asks one expert after the other. All processes use it together.

    Args:
        ranks: The processes; they see the same folder.
        folder: Of the part files.
        model: Where models are loaded.
        generation: Batch size and cache.
    """

    def __init__(self, ranks: PartialState, folder: Path, model: OneModel, generation: GenerationArguments) -> None:
        self.ranks = ranks
        self.folder = folder
        self.model = model
        self.generation = generation
        self._seconds: dict[Path, float] = {}

    @property
    def seconds(self) -> float:
        """Of generation: what each set of questions that was asked once took, in all runs together."""
        return sum(self._seconds.values())

    def ask(self, expert: Expert, questions: Mapping[str, Questions], title: str) -> dict[str, list[Label]]:
        """The answers of an expert.

        Args:
            expert: The expert.
            questions: By name.
            title: Says what is going on, for the progress bar.

        Returns:
            The answers by name, in the order of the questions.

        Raises:
            ValueError: A model cannot be loaded, memory does not suffice, or part files cannot be shared.
            OSError: A file cannot be written.
        """
        identity = expert.identity()
        folders = {
            name: parts_folder(self.folder, {**identity, **asked.identity()}) for name, asked in questions.items()
        }
        known = self._read(folders)
        missing = {
            name: {i: len(ids) for i, ids in enumerate(asked.ids) if i not in known[name][0]}
            for name, asked in questions.items()
        }
        if any(missing.values()):
            with all_together(self.ranks):
                self._generate(expert, questions, missing, folders, title)
            known = self._read(folders)
        answers = {}
        for name, asked in questions.items():
            labels, seconds = known[name]
            lacking = [i for i in range(len(asked.ids)) if i not in labels]
            if lacking:
                raise UserError(
                    f"{folders[name]} lacks {len(lacking)} answers that were generated; all processes must write to "
                    "the same file system: check --output_dir, then --resume true"
                )
            answers[name] = [labels[i] for i in range(len(asked.ids))]
            self._seconds[folders[name]] = seconds  # the same questions may be asked twice
        return answers

    def _read(self, folders: Mapping[str, Path]) -> dict[str, tuple[dict[int, Label], float]]:
        """What is there, as the main process sees it: all others may be about to write."""
        found: dict[str, tuple[dict[int, Label], float]] | None = None
        with all_together(self.ranks):
            if self.ranks.is_main_process:
                found = {name: read_parts(folder) for name, folder in folders.items()}
        result: dict[str, tuple[dict[int, Label], float]] = from_main(self.ranks, found)
        return result

    def _generate(
        self,
        expert: Expert,
        questions: Mapping[str, Questions],
        missing: Mapping[str, Mapping[int, int]],
        folders: Mapping[str, Path],
        title: str,
    ) -> None:
        """Generate this rank's share of what is missing."""
        rank, ranks = self.ranks.process_index, self.ranks.num_processes
        # every n-th of all prompts by length, so that no rank gets the long ones
        shares = {name: longest_first(lengths)[rank::ranks] for name, lengths in missing.items()}
        total = sum(map(len, shares.values()))
        if not total:
            return
        with (
            self.model.running(expert) as model,
            tqdm(total=total, desc=f"{expert.name}, {title}", unit="prompt", disable=rank > 0) as bar,
        ):
            for name, share in shares.items():
                if not share:
                    continue
                asked = questions[name]
                bar.set_postfix_str(name)
                generator = LabelGenerator(
                    model,
                    expert.tokenizer,
                    asked.max_new_tokens,
                    self.generation.fixed_batch_size(),
                    self.generation.cache_implementation,
                    asked.sampling,
                )
                with PartWriter(folders[name] / f"rank-{rank}.jsonl") as part:
                    start = time.perf_counter()
                    for batch in generator.answers({i: asked.ids[i] for i in share}):
                        end = time.perf_counter()
                        write_labels(part, batch, end - start)
                        start = end
                        bar.update(len(batch))
