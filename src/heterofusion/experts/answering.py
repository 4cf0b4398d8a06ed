"""Asking experts: what is missing is generated, shared by the processes; what is there is read from part files.

    FOLDER/rank-0.jsonl   answers of one process as they come, so that a kill loses one batch at most

Processes on several machines need a common file system. Any number of processes goes on with what others left.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from accelerate import PartialState
from tqdm.auto import tqdm

from heterofusion.experts.examples import Examples, Prompts
from heterofusion.experts.expert import Expert, ExpertRunner
from heterofusion.experts.generation import Answer, AnswerGenerator, GenerationArguments, Sampling, longest_first
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.ranks import all_together, from_main

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Questions:
    """Prompts for somebody to answer."""

    folder: Path  # of the part files; it must tell apart all that the answers depend on
    ids: Sequence[Any]  # token ids of each prompt; of an ensemble, those of each member
    lengths: Sequence[int]  # of each prompt
    max_new_tokens: int
    sampling: Sampling | None = None  # None decodes greedily


class Answers(NamedTuple):
    """All answers to some questions, in their order, and the seconds that they took in all runs together."""

    answers: list[Answer]
    seconds: float
    generated: int  # how many of them now, by all processes


Answering = Iterator[tuple[str, Iterator[list[Answer]]]]  # by name of the questions, their answers batch by batch


class Answerer(Protocol):
    """Who answers: an expert, or several together."""

    @property
    def limit(self) -> int | None: ...  # tokens of a prompt at most
    def identity(self) -> dict[str, Any]: ...  # what its answers depend on, prompts aside; with `dtype`
    def encode(self, examples: Examples) -> Prompts: ...  # the prompts in its words
    def load(self) -> None: ...  # what may be missing or wrong
    def answer(self, questions: Mapping[str, Questions], shares: Mapping[str, Sequence[int]]) -> Answering: ...


@dataclass(frozen=True, kw_only=True)
class ExpertAnswerer(Expert):
    """An expert that answers in a place of its own or one that others use as well."""

    runner: ExpertRunner
    generation: GenerationArguments
    in_context: bool = False  # see `AnswerGenerator`

    def load(self) -> None:
        """Load the base."""
        self.runner.load(self.base)

    def answer(self, questions: Mapping[str, Questions], shares: Mapping[str, Sequence[int]]) -> Answering:
        """By name of the questions, the answers to a share of the prompts, batch by batch."""
        size = self.generation.fixed_batch_size()
        with self.runner.running(self) as model:
            for name, share in shares.items():
                asked, how = questions[name], (size, questions[name].sampling, self.in_context)
                generator = AnswerGenerator(model, self.tokenizer, asked.max_new_tokens, *how)
                yield name, generator.answers({i: asked.ids[i] for i in share})


def ask(ranks: PartialState, answerer: Answerer, questions: Mapping[str, Questions], title: str) -> dict[str, Answers]:
    """The answers to questions, by their name. All processes call it together; they see the same folders.

    The answerer is asked for what is missing; nothing of it is loaded where nothing is.
    """
    known = _read(ranks, questions)
    missing = {
        name: {i: length for i, length in enumerate(asked.lengths) if i not in known[name][0]}
        for name, asked in questions.items()
    }
    if any(missing.values()):
        with all_together(ranks):
            _answer_share(ranks, answerer, questions, missing, title)
        known = _read(ranks, questions)
    found = {}
    for name, (answers, seconds) in known.items():
        if len(answers) < len(questions[name].ids):
            raise UserError(
                f"{questions[name].folder} lacks answers that were generated; all processes must write to the same "
                "file system: check --output_dir, then --resume true"
            )
        found[name] = Answers([answers[i] for i in range(len(answers))], seconds, len(missing[name]))
    return found


def _read(ranks: PartialState, questions: Mapping[str, Questions]) -> dict[str, tuple[dict[int, Answer], float]]:
    """What is there, as the main process sees it: all others may be about to write."""
    found: Any = None
    with all_together(ranks):
        if ranks.is_main_process:
            found = {name: read_parts(asked.folder) for name, asked in questions.items()}
    return dict(from_main(ranks, found))


def _answer_share(
    ranks: PartialState,
    answerer: Answerer,
    questions: Mapping[str, Questions],
    missing: Mapping[str, Mapping[int, int]],
    title: str,
) -> None:
    """Generate this process's share of what is missing."""
    rank = ranks.process_index
    # every n-th of all prompts by length, so that no process gets the long ones
    shares = {name: longest_first(lengths)[rank :: ranks.num_processes] for name, lengths in missing.items()}
    shares = {name: share for name, share in shares.items() if share}
    if not shares:
        return
    total = sum(map(len, shares.values()))
    answering: Any = answerer.answer(questions, shares)  # it holds models, and is closed in any case
    with closing(answering), tqdm(total=total, desc=title, unit="prompt", disable=rank > 0) as bar:
        for name, batches in answering:
            bar.set_postfix_str(name)
            with part_file(questions[name].folder / f"rank-{rank}.jsonl") as write:
                start = time.perf_counter()
                for batch in batches:
                    end = time.perf_counter()
                    write(batch, end - start)
                    start = end
                    bar.update(len(batch))


# ---- part files -------------------------------------------------------------------------------------------------


@contextmanager
def part_file(path: Path) -> Iterator[Callable[[Sequence[Answer], float], None]]:
    """Appends batches of answers, and the seconds of each; what a kill cut off at the file's end goes first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)

        def write(answers: Sequence[Answer], seconds: float) -> None:
            for answer in answers:
                record = {**asdict(answer), "seconds": round(seconds / len(answers), 6)}
                file.write((json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))
            file.flush()

        yield write


def read_parts(folder: Path) -> tuple[dict[int, Answer], float]:
    """Answers that all processes of all runs left, by index, and the seconds of the process that took longest."""
    answers: dict[int, Answer] = {}
    longest = 0.0
    for path in sorted(folder.glob("rank-*.jsonl")):
        seconds = 0.0
        for line in path.read_bytes().split(b"\n")[:-1]:  # without a line end, the last one was cut
            try:
                record = json.loads(line)
                seconds += record.pop("seconds")
                answers.setdefault(record["index"], Answer(**record))
            except (ValueError, KeyError, TypeError, AttributeError):
                logger.warning("%s holds a damaged line; it is generated again", path)
        longest = max(longest, seconds)
    return answers, longest
