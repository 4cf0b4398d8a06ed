"""The tasks of a labelling: how each is asked and scored, its prompts without answers, and labels as records."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from heterofusion.data.files import Records, load_records, sample_indices
from heterofusion.data.formats import Message, Part, detect_format, to_conversation
from heterofusion.evaluation.datasets import EvalDataArguments, EvalSet, load_eval_sets
from heterofusion.evaluation.glue import GLUE_LABELS, parse_label, parse_similarity
from heterofusion.evaluation.metrics import AUTO, EXACT_MATCH, UIE, choose_metric
from heterofusion.evaluation.uie import KINDS, normalize, parse_items, score_answers
from heterofusion.experts.generation import Answer
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.flags import check_ranges, flag

REPLAY = "replay"  # as a value of --prompts: the replay's own
_NO_ANSWER: Message = {"role": "assistant", "content": ""}
_TAGS = ("task", "kind")  # columns that labels have as the replay has them

FormatCheck = Callable[[Answer, str], bool]


@dataclass
class LabelDataArguments(EvalDataArguments):
    """The tasks: replay data that tells how each is asked and scored, and prompts without answers."""

    dataset_name: list[str] = flag(
        default_factory=list,
        help="The replay's data sets with the right answers, one per task: files, folders, or Hub ids. Without "
        "them --routing and --prompts have to be given.",
    )
    dataset_split: list[str] = flag(
        default_factory=lambda: ["train"],
        help="Split of each replay data set; a local file has no splits and is read whole.",
    )
    dataset_label: list[str] | None = flag(
        None,
        help="Name of each task, for files, tables and --routing; by default that of its replay or prompt file.",
    )
    max_examples: list[int] = flag(
        default_factory=lambda: [300],
        help="Number of replay examples per task that the routing is measured on at most; 0 takes all.",
    )
    prompts: list[str] = flag(
        default_factory=list,
        help="Prompts to label, one file per task in the order of --dataset_name, with column `prompt` or the "
        f"replay's columns, whose answers are not looked at; the word {REPLAY} takes the replay's own prompts.",
    )
    self_prompt: int = flag(
        0,
        help="In place of --prompts: how often the bases of a task's sources continue its template, to invent inputs.",
        range="[0, inf)",
    )
    max_prompts: int = flag(300, help="Number of --prompts of a task at most, sampled; 0 takes all.", range="[0, inf)")
    temperature: float = flag(1.0, help="Temperature of --self_prompt.", range="(0, inf)")
    top_p: float = flag(0.95, help="Probability mass that --self_prompt draws tokens from.", range="(0, 1]")
    seed: int = flag(
        42, help="Seed of the sample of prompts, of --self_prompt, and of --control shuffle.", range="[0, inf)"
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        if bool(self.prompts) == bool(self.self_prompt):
            raise UserError("give either --prompts (files, or replay) or --self_prompt (a number), and not both")
        if self.dataset_name:
            super().__post_init__()
            if self.prompts and not self.own_prompts and len(self.prompts) != len(self.dataset_name):
                raise UserError(
                    f"--prompts has {len(self.prompts)} values, but --dataset_name has {len(self.dataset_name)}: give "
                    f"one file per task, or the word {REPLAY}"
                )
        elif self.self_prompt or self.own_prompts:
            raise UserError(f"--self_prompt and --prompts {REPLAY} need the replay: give --dataset_name")
        else:
            self._named_by_prompts()

    def _named_by_prompts(self) -> EvalDataArguments:
        return EvalDataArguments(dataset_name=self.prompts, dataset_label=self.dataset_label, metric=self.metric)

    @property
    def own_prompts(self) -> bool:
        """Whether the replay's own prompts are labelled."""
        return self.prompts == [REPLAY]

    def labels(self) -> list[str]:
        return super().labels() if self.dataset_name else self._named_by_prompts().labels()

    def metrics(self) -> list[str]:
        return super().metrics() if self.dataset_name else self._named_by_prompts().metrics()


@dataclass(frozen=True)
class LabelTask:
    """One task."""

    name: str  # in files, tables and the routing
    metric: str | None  # None where nothing tells it
    replay: EvalSet | None  # its sample with the right answers
    prompts: EvalSet | None  # what is labelled, the answers empty; None until it is invented
    tags: Mapping[str, str]  # values of the columns `task` and `kind` of its labels

    def tags_of(self, position: int) -> dict[str, str]:
        """Values of these columns of a label: the prompt's own where it has them, else the task's."""
        row = self.prompts.records.rows[self.prompts.indices[position]] if self.prompts else {}
        return {**self.tags, **{tag: row[tag] for tag in _TAGS if isinstance(row.get(tag), str)}}

    def format_check(self) -> FormatCheck:
        """What tells its well-formed labels, by the replay's answers."""
        texts = []
        for _, answer in self.replay.examples if self.replay else []:
            said = answer if isinstance(answer, str) else [m["content"] for m in answer if m["role"] == "assistant"]
            texts.append(said if isinstance(said, str) else said[-1] if said else "")
        return format_check(self.metric, texts)


def load_tasks(args: LabelDataArguments) -> list[LabelTask]:
    """Read replay and prompts of all tasks."""
    replays: Sequence[EvalSet | None] = load_eval_sets(args) if args.dataset_name else [None] * len(args.prompts)
    tasks = []
    for index, (name, metric, replay) in enumerate(zip(args.labels(), args.metrics(), replays, strict=True)):
        prompts = None
        if args.prompts:
            if args.own_prompts and replay is not None:
                records, places = replay.records, replay.indices
            else:
                records = load_records(args.prompts[index], None, "train", "prompt")
                places = [*range(len(records.rows))]
            chosen = sample_indices(len(places), args.max_prompts or len(places), args.seed)
            prompts = prompt_set(name, records, [places[i] for i in chosen])
        known = replay.metric if replay else _metric_of_prompts(metric, prompts)
        tasks.append(LabelTask(name, known, replay, prompts, _tags(name, replay)))
    return tasks


def _metric_of_prompts(metric: str, prompts: EvalSet | None) -> str | None:
    """The metric that tells well-formed labels where there is no replay: as asked for, or by the prompts' `kind`."""
    rows = [prompts.records.rows[i] for i in prompts.indices] if prompts else []
    if prompts is None or (metric == AUTO and not any(row.get("kind") for row in rows)):
        return None
    return choose_metric(metric, rows, prompts.records.label)


def _tags(name: str, replay: EvalSet | None) -> dict[str, str]:
    """The columns that are the same in all of the replay."""
    rows = [replay.records.rows[i] for i in replay.indices] if replay else []
    values = {tag: {row.get(tag) for row in rows} for tag in _TAGS}
    found = {tag: value for tag, (value, *others) in values.items() if not others} if rows else {}
    return {"task": name, **{tag: value for tag, value in found.items() if isinstance(value, str)}}


# ---- prompts ----------------------------------------------------------------------------------------------------


def prompt_set(name: str, records: Records, indices: list[int]) -> EvalSet:
    """Records as prompts whose answers are empty, whatever the records hold."""
    format = _prompt_format(records.columns)
    if format is None:
        found = ", ".join(records.columns) or "none"
        raise UserError(
            f"{records.label} has no column of prompts (found: {found}): give it `prompt`, `messages` or `instruction`"
        )
    examples = [records.call(i, read_prompt, records.rows[i], format) for i in indices]
    digest = hashlib.sha256(json.dumps(examples, sort_keys=True).encode()).hexdigest()
    # the metric scores nothing here: of all metrics it is the one that takes empty answers
    return EvalSet(name, format, records, indices, examples, digest, {"max_examples": len(indices)}, EXACT_MATCH)


def asked(replay: EvalSet) -> EvalSet:
    """The replay's prompts without their answers."""
    return prompt_set(replay.label, replay.records, replay.indices)


def _prompt_format(columns: Sequence[str]) -> str | None:
    """As `detect_format`, but columns of answers may be missing."""
    whole = detect_format(columns)
    if whole not in (None, "text"):  # whatever other columns of prompts such records have
        return whole
    needed = {"messages": "messages", "prompt": "prompt_completion", "instruction": "alpaca"}
    return next((format for column, format in needed.items() if column in columns), None)


def read_prompt(row: Mapping[str, Any], format: str) -> tuple[Part, Part]:
    """The prompt of a record with an empty answer, in the form of `to_conversation`."""
    if format == "messages":
        turns: Any = to_conversation(dict(row), format)[1]
        question = turns[:-1] if turns and turns[-1]["role"] == "assistant" else turns
        _check_asked(question, "messages")
        return [], [*question, _NO_ANSWER]
    if format == "alpaca":
        return to_conversation({**row, "output": ""}, format)[0], [_NO_ANSWER]
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


def conversation(example: tuple[Any, Any]) -> list[Message]:
    """The turns of a prompt that is a conversation, up to its empty answer."""
    return [*example[0], *example[1]][:-1]


# ---- labels -----------------------------------------------------------------------------------------------------


def labelled_record(prompts: EvalSet, position: int, text: str, asked: str) -> dict[str, Any]:
    """A prompt with its label, in the columns of the prompt; `asked` is the prompt as the model read it.

    Of conversations the answer has no white space around it, which chat templates bring themselves.
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


def format_check(metric: str | None, references: Sequence[str]) -> FormatCheck:
    """A function of a label and its prompt that tells whether the label is one that the task's metric can read.

    Whatever the task, a label must not be empty and must have ended by itself. Of an extraction task every item must
    be `type: span` (of RE `relation: head, tail`) with a type that the replay's answers have or the prompt names; of a
    GLUE task it must be one of the task's labels.
    """
    if metric is not None and metric in GLUE_LABELS:
        labels = GLUE_LABELS[metric]
        return lambda label, prompt: (
            label.ended and (parse_label(label.text, labels) if labels else parse_similarity(label.text)) is not None
        )
    if metric in (*KINDS, UIE):
        kind = None if metric == UIE else metric
        known = frozenset(_type(item) for reference in references for item in parse_items(reference))
        return lambda label, prompt: label.ended and _is_extraction(label.text, prompt, kind, known)
    return lambda label, prompt: label.ended and bool(label.text.strip())


def _is_extraction(text: str, prompt: str, kind: str | None, known: frozenset[str]) -> bool:
    if score_answers([text], [text], kind)["format_failure_rate"]:
        return False
    named = normalize(prompt)
    return all(name in known or name in named for name in map(_type, parse_items(text)))


def _type(item: str) -> str:
    return item.partition(":")[0]
