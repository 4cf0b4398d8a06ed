"""The tasks of a labelling: how each is asked and scored, its prompts without answers, and labels as records."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from heterofusion.data.files import Records, load_records, sample_indices
from heterofusion.data.formats import Message, Part, detect_format, to_conversation
from heterofusion.evaluation.datasets import EvalSet, load_eval_sets
from heterofusion.evaluation.metrics import AUTO, EXACT_MATCH, choose_metric
from heterofusion.labelling.arguments import LabelDataArguments
from heterofusion.runtime.errors import UserError

_NO_ANSWER: Message = {"role": "assistant", "content": ""}
_TAGS = ("task", "kind")  # columns that labels have as the replay has them


@dataclass(frozen=True)
class LabelTask:
    """One task.

    Args:
        name: In files, tables and the routing.
        metric: One of `heterofusion.evaluation.metrics.METRICS`; None without replay, where nothing tells it.
        replay: Its replay sample with the right answers; None without replay.
        prompts: What is labelled, the answers empty; None until it is invented.
        tags: Values of the columns `task` and `kind` of its labels.
    """

    name: str
    metric: str | None
    replay: EvalSet | None
    prompts: EvalSet | None
    tags: Mapping[str, str]


def load_tasks(args: LabelDataArguments) -> list[LabelTask]:
    """Read replay and prompts of all tasks.

    Args:
        args: The flags.

    Returns:
        The tasks, in order.

    Raises:
        ValueError: A file or a record is not what it has to be; names it.
    """
    replays: Sequence[EvalSet | None] = load_eval_sets(args) if args.dataset_name else [None] * len(args.prompts)
    tasks = []
    for index, (name, metric, replay) in enumerate(zip(args.labels(), args.metrics(), replays, strict=True)):
        prompts = None
        if args.own_prompts and replay is not None:
            chosen = sample_indices(len(replay.indices), args.max_prompts or len(replay.indices), args.seed)
            prompts = prompt_set(name, replay.records, [replay.indices[i] for i in chosen])
        elif args.prompts:
            records = load_records(args.prompts[index], None, "train", "prompt")
            total = len(records.rows)
            prompts = prompt_set(name, records, sample_indices(total, args.max_prompts or total, args.seed))
        if replay is not None:
            known: str | None = replay.metric
        else:
            assert prompts is not None  # for the type checker: the flags ask for prompts where there is no replay
            known = _metric_of_prompts(metric, prompts)
        tasks.append(LabelTask(name, known, replay, prompts, _tags(name, replay)))
    return tasks


def _metric_of_prompts(metric: str, prompts: EvalSet) -> str | None:
    """The metric that tells well-formed labels where there is no replay: as asked for, or by the prompts' `kind`."""
    rows = [prompts.records.rows[i] for i in prompts.indices]
    if metric == AUTO and not any(row.get("kind") for row in rows):
        return None
    return choose_metric(metric, rows, prompts.records.label)


def _tags(name: str, replay: EvalSet | None) -> dict[str, str]:
    tags = {"task": name}
    if replay is not None:
        rows = [replay.records.rows[i] for i in replay.indices]
        for tag in _TAGS:
            values = {row.get(tag) for row in rows}
            value = values.pop() if len(values) == 1 else None
            if isinstance(value, str):
                tags[tag] = value
    return tags


# ---- prompts ----------------------------------------------------------------------------------------------------


def prompt_set(name: str, records: Records, indices: list[int]) -> EvalSet:
    """Records as prompts without answers.

    Args:
        name: Of the task.
        records: Where they are from.
        indices: Those that are taken.

    Returns:
        A data set whose answers are empty, whatever the records hold.

    Raises:
        ValueError: The columns are not known, or a record has no prompt; names it.
    """
    rows = records.rows
    columns = rows.column_names if isinstance(rows, Dataset) else list(rows[0])
    format = _prompt_format(columns)
    if format is None:
        raise UserError(
            f"{records.label} has no column of prompts (found: {', '.join(columns) or 'none'}): give it `prompt`, "
            "`messages` or `instruction`"
        )
    examples = [records.call(i, read_prompt, rows[i], format) for i in indices]
    digest = hashlib.sha256(json.dumps(examples, sort_keys=True).encode()).hexdigest()
    # the metric scores nothing here: of all metrics it is the one that takes empty answers
    return EvalSet(name, format, records, indices, examples, digest, {"max_examples": len(indices)}, EXACT_MATCH)


def _prompt_format(columns: Sequence[str]) -> str | None:
    """As `heterofusion.data.formats.detect_format`, but columns of answers may be missing."""
    whole = detect_format(columns)
    if whole not in (None, "text"):  # whatever other columns of prompts such records have
        return whole
    needed = {"messages": "messages", "prompt": "prompt_completion", "instruction": "alpaca"}
    return next((format for column, format in needed.items() if column in columns), None)


def read_prompt(row: Mapping[str, Any], format: str) -> tuple[Part, Part]:
    """The prompt of a record, with an empty answer.

    Args:
        row: The record; an answer in it is not looked at.
        format: `messages`, `prompt_completion` or `alpaca`.

    Returns:
        Prompt and empty answer, in the form of `heterofusion.data.formats.to_conversation`.

    Raises:
        ValueError: A field is missing or of another type, or nothing is asked.
    """
    if format == "messages":
        _, turns = to_conversation(dict(row), format)
        assert isinstance(turns, list)  # for the type checker
        asked = turns[:-1] if turns and turns[-1]["role"] == "assistant" else turns
        _check_asked(asked, "messages")
        return [], [*asked, _NO_ANSWER]
    if format == "alpaca":
        prompt, _ = to_conversation({**row, "output": ""}, format)
        return prompt, [_NO_ANSWER]
    given = row.get("prompt")
    prompt, _ = to_conversation({"prompt": given, "completion": [] if isinstance(given, list) else ""}, format)
    if isinstance(prompt, str):
        if not prompt.strip():
            raise UserError("`prompt` is empty: fill it or leave the record out")
        return prompt, ""
    _check_asked(prompt, "prompt")
    return prompt, [_NO_ANSWER]


def _check_asked(turns: Sequence[Message], field: str) -> None:
    last = turns[-1]["role"] if turns else None
    if last in (None, "assistant", "system"):
        found = f"a turn of the {last}" if last else "no turn"
        raise UserError(f"`{field}` ends with {found} where an answer is to follow: end it with the user's turn")


def conversation(example: tuple[Part, Part]) -> list[Message]:
    """The turns of a prompt that is a conversation, up to its empty answer."""
    prompt, answer = example
    assert isinstance(prompt, list) and isinstance(answer, list)  # for the type checker
    return [*prompt, *answer][:-1]


# ---- labels -----------------------------------------------------------------------------------------------------


def labelled_record(prompts: EvalSet, position: int, text: str, asked: str) -> dict[str, Any]:
    """A prompt with its label, in the columns of the prompt.

    Args:
        prompts: The prompts.
        position: Of this one in `prompts.examples`.
        text: What was generated for it.
        asked: The prompt as the model read it, after which the text comes.

    Returns:
        The columns of prompt and answer. Of conversations the answer has no white space around it, which chat
        templates bring themselves.
    """
    prompt, _ = prompts.examples[position]
    answer = [{"role": "assistant", "content": text.strip()}]
    if isinstance(prompt, str):
        # a space at the prompt's end may have been left to the model, which then wrote it
        whole = asked + text
        return {"prompt": prompt, "completion": whole[len(prompt) :] if whole.startswith(prompt) else text}
    if prompts.format == "messages":
        return {"messages": [*conversation(prompts.examples[position]), *answer]}
    if prompts.format == "alpaca":
        row = prompts.records.rows[prompts.indices[position]]
        kept = {name: row[name] for name in ("instruction", "input", "history") if row.get(name)}
        return {**kept, "output": text.strip()}
    return {"prompt": prompt, "completion": answer}


def tags_of(task: LabelTask, position: int) -> dict[str, str]:
    """Values of the columns `task` and `kind` of a label: the prompt's own where it has them, else the task's."""
    assert task.prompts is not None  # for the type checker
    row = task.prompts.records.rows[task.prompts.indices[position]]
    own = {tag: row[tag] for tag in _TAGS if isinstance(row.get(tag), str)}
    return {**task.tags, **own}


def file_name(path: Path, task: str) -> Path:
    """The file of a task's labels."""
    return path / f"{task}.jsonl"
