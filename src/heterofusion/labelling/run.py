"""The labelling itself: score experts on the replay, choose who labels what, let them answer, write it.

output_dir/<task>.jsonl    prompts with their labels, in the order of the prompts
output_dir/routing.json    scores and which source labels which task; written as soon as it is known
output_dir/labels.json     counts, hashes, settings, cost; written last: where it stands, the labels are complete
output_dir/soft/           with --top_k_logits, see `soft.py`
output_dir/parts/          answers as they came, see `parts.py`; kept, so that another routing costs nothing
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import PartialState

from heterofusion.data.labels import ANCHOR, LABELS_FILE
from heterofusion.evaluation.arguments import BASE_NAME, is_file_name
from heterofusion.evaluation.datasets import EvalSet, check_references
from heterofusion.evaluation.results import metric_record
from heterofusion.evaluation.store import read_json, write_json, write_lines
from heterofusion.experts.examples import Prompts
from heterofusion.experts.expert import Expert, ExpertRunner
from heterofusion.experts.generation import Answer as Label
from heterofusion.experts.generation import Sampling
from heterofusion.experts.soft import FOLDER as SOFT
from heterofusion.experts.soft import INDEX_FILE as SOFT_INDEX
from heterofusion.experts.soft import check_soft, store_soft_labels
from heterofusion.labelling.arguments import LabelArguments
from heterofusion.labelling.controls import check_bases, labellers, with_control
from heterofusion.labelling.experts import find_experts
from heterofusion.labelling.parts import Asked, Asking
from heterofusion.labelling.record import TaskLabels, label_records, labels_record, own_labels
from heterofusion.labelling.routing import Routing, read_map, route
from heterofusion.labelling.self_prompt import (
    Template,
    draw_seed,
    find_template,
    invented_prompts,
    longest_input,
)
from heterofusion.labelling.tasks import LabelTask, file_name, load_tasks, prompt_set
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.files import check_output_dir, staging_folder
from heterofusion.runtime.ranks import all_together

logger = logging.getLogger(__name__)

ROUTING_FILE = "routing.json"
ROUTING_PICTURE = "routing.png"
PARTS = "parts"
STAGING = ".labels-"


class Labelling:
    """A labelling whose flags, files and adapters are in order; nothing is written and no weights are loaded yet.

    Args:
        arguments: Who labels what, how, and where labels go.
        ranks: The processes; all of them construct and run this together.

    Raises:
        ValueError: A flag, a file, a record or an adapter is not what it has to be, or `output_dir` holds something
            else; the message says which and what to do.
    """

    def __init__(self, arguments: LabelArguments, ranks: PartialState) -> None:
        self.arguments, self.ranks = arguments, ranks
        self.folder = Path(arguments.output.output_dir).expanduser().absolute()
        self._encoded: dict[tuple[Any, ...], Prompts] = {}
        with all_together(ranks):
            self._check_folder()
            names = arguments.model.names()
            labels = arguments.data.labels()
            self.mapped = read_map(arguments.routing.routing, labels, names) if arguments.routing.routing else {}
            self._check_routing(labels)
            self._check_inputs_stay(labels)
            self.tasks = load_tasks(arguments.data)
            self.templates = self._templates()
            anchor, sources = find_experts(arguments.model, arguments.generation)
            self.anchor = anchor
            self.sources = {source.name: source for source in sources}
            self.experts = {**self.sources, **({ANCHOR: anchor} if anchor is not None else {})}
            if arguments.routing.control == "bases":
                check_bases(sources)
            if len(self.mapped) == len(labels):
                self._controlled(self._routing({}))
            if arguments.output.top_k_logits:
                check_soft([*sources, *([anchor] if anchor is not None and self._anchor_may_label else [])])
            self._encode_all()
        self.model = ExpertRunner(ranks.device)
        self.answering = Asking(ranks, self.folder / PARTS, self.model, arguments.generation)

    # ---- before anything is loaded ----

    def _check_folder(self) -> None:
        output = self.arguments.output
        if not self.ranks.is_main_process:
            return
        check_output_dir(str(self.folder), output.resume, output.overwrite, resume_flag="--resume")
        ours = (LABELS_FILE, ROUTING_FILE, PARTS)
        if output.resume and self.folder.is_dir() and any(self.folder.iterdir()):
            if not any((self.folder / name).exists() for name in ours):
                raise UserError(f"--resume: {self.folder} holds no labels ({', '.join(ours)}); name another folder")
            read_json(self.folder / LABELS_FILE)

    def _check_inputs_stay(self, labels: list[str]) -> None:
        """A task has the name of its replay's file by default, and so has the file of its labels."""
        data = self.arguments.data
        read = {Path(name).expanduser().resolve() for name in (*data.dataset_name, *data.prompts)}
        for written in (file_name(self.folder, label) for label in labels):
            if written.resolve() in read:
                raise UserError(
                    f"--output_dir {self.folder}: labels would be written over {written}, which is read; name another "
                    "folder"
                )

    def _check_routing(self, labels: list[str]) -> None:
        measured = [label for label in labels if label not in self.mapped]
        model, data, routing = self.arguments.model, self.arguments.data, self.arguments.routing
        own = [task for task, names in self.mapped.items() if ANCHOR in names]
        if model.target_adapter is None and (own or routing.control == ANCHOR):
            who = f"--routing {routing.routing} gives {', '.join(own)} to the anchor" if own else "--control is anchor"
            raise UserError(
                f"{who}, but --target_adapter is missing: give it with its --model_name_or_path, or let sources label"
            )
        if not measured:
            if not any(self.mapped.values()):
                raise UserError(f"--routing {routing.routing} gives no task to any source; name one")
            if routing.anchor_labels:
                raise UserError(
                    f"--anchor_labels is of tasks that are measured, but --routing {routing.routing} names all: write "
                    f"{ANCHOR} there for those that the anchor is to label, and leave --anchor_labels out"
                )
            return
        if not data.dataset_name:
            raise UserError(
                f"without --dataset_name no source can be scored, so --routing must name the sources of every task; "
                f"it lacks {', '.join(measured)}"
            )
        if model.target_adapter is None:
            raise UserError(
                f"--target_adapter is missing: sources have to beat the anchor on {', '.join(measured)}; give it with "
                "its --model_name_or_path, or name the sources of all tasks in --routing"
            )

    @property
    def _anchor_may_label(self) -> bool:
        routing = self.arguments.routing
        named = any(ANCHOR in names for names in self.mapped.values())
        return named or routing.anchor_labels or routing.control == ANCHOR

    def _may_label(self, task: str) -> list[str]:
        """Names of all that may have to write or answer a task's prompts."""
        routing = self.arguments.routing
        names = self.mapped.get(task, [*self.sources, *([ANCHOR] if routing.anchor_labels else [])])
        if names and routing.control == "shuffle":
            names = [*self.sources, *names]
        return [*dict.fromkeys([*names, *([ANCHOR] if names and routing.control == ANCHOR else [])])]

    def _templates(self) -> dict[str, Template]:
        if not self.arguments.data.self_prompt:
            return {}
        return {
            task.name: find_template(task.replay, _asked(task.replay))
            for task in self.tasks
            if task.replay is not None and self.mapped.get(task.name) != []
        }

    def _encode_all(self) -> None:
        """Everything that may be asked, in the words of everyone who may be: what cannot be is told before."""
        for task in self.tasks:
            if task.name not in self.mapped and task.replay is not None:
                for expert in [*([self.anchor] if self.anchor else []), *self.sources.values()]:
                    self._encode(expert, task.replay)
            for name in self._may_label(task.name):
                if task.prompts is not None:
                    self._encode(self.experts[name], task.prompts)
                else:
                    self._drawing(self.experts[name], task, 1)

    def _encode(self, expert: Expert, examples: EvalSet) -> Prompts:
        """Prompts in an expert's words; experts with the same tokenizer share them."""
        key = (expert.tokenizer.name_or_path, expert.base.model_name_or_path, expert.limit, id(examples))
        if key not in self._encoded:
            self._encoded[key] = expert.encode(examples)
            check_references(examples, self._encoded[key])
        return self._encoded[key]

    # ---- the work ----

    def run(self) -> tuple[Routing, dict[str, Any]]:
        """Route, label and write.

        Returns:
            The routing, and the content of `labels.json`.

        Raises:
            ValueError: No source serves any task, a model cannot be loaded, or memory does not suffice.
            OSError: A file cannot be written.
        """
        if self.arguments.output.overwrite:
            self._clear()
        routing = self._route()
        self._tell(routing)
        counts = self._invent(routing) if self.templates else {}
        answering = labellers(self.experts, routing.control)
        made = self._label(routing, answering, counts)
        self.model.release()
        if not any(labels.records for labels in made):
            raise UserError(
                "--self_prompt: no invented input is new and keeps to its template; give --prompts, or a larger number"
            )
        output, seconds = self.arguments.output, self.answering.seconds
        if output.top_k_logits:
            experts = {expert.name: expert for expert in answering.values()}
            batch_size = output.teacher_batch_size
            index = store_soft_labels(
                self.folder, experts, own_labels(made), output.top_k_logits, batch_size, self.ranks.device
            )
            seconds += index["seconds"]
        record = labels_record(
            self.arguments,
            made,
            routing,
            self.anchor,
            [*self.sources.values()],
            seconds,
            self.ranks.num_processes,
        )
        with all_together(self.ranks):
            if self.ranks.is_main_process:
                self._write(made, record)
        return routing, record

    def _clear(self) -> None:
        """Remove what an earlier run wrote, once the first model is loaded: the last thing that may be wrong."""
        needed = [name for task in self.tasks for name in self.mapped.get(task.name, [])]
        first = self.anchor if len(self.mapped) < len(self.tasks) else self.experts[needed[0]]
        with all_together(self.ranks):
            if first is not None:
                self.model.load(first.base)
        with all_together(self.ranks):
            if self.ranks.is_main_process:
                remove_labels(self.folder)

    def _route(self) -> Routing:
        measured = [task for task in self.tasks if task.name not in self.mapped]
        scores: dict[str, dict[str, float]] = {}
        for expert in [*([self.anchor] if self.anchor else []), *self.sources.values()] if measured else []:
            replays = {task.name: (task, task.replay) for task in measured if task.replay is not None}
            prompts = {name: self._encode(expert, replay) for name, (_, replay) in replays.items()}
            answers = self.answering.ask(expert, self._questions(prompts), "replay")
            scores[expert.name] = {
                name: metric_record(replay.metric, [a.text for a in answers[name]], prompts[name].references)["score"]
                for name, (_, replay) in replays.items()
            }
        return self._controlled(self._routing(scores))

    def _routing(self, scores: dict[str, dict[str, float]]) -> Routing:
        args, names = self.arguments.routing, self.arguments.data.labels()
        return route(
            names, [*self.sources], scores, args.routing_margin, self.mapped, args.anchor_from, args.routing_share
        )

    def _controlled(self, routing: Routing) -> Routing:
        """With --control, somebody else in the place of the sources; where nobody labels anything, `_tell` says so."""
        kind = self.arguments.routing.control
        if kind is None or len(routing.unserved) == len(routing.tasks):
            return routing
        return with_control(routing, kind, self.arguments.data.seed)

    def _questions(self, prompts: Mapping[str, Prompts]) -> dict[str, Asked]:
        most = self.arguments.generation.max_new_tokens
        return {name: Asked(asked.ids, most) for name, asked in prompts.items()}

    def _tell(self, routing: Routing) -> None:
        """Write and say who labels what.

        Raises:
            ValueError: No source labels anything.
        """
        with all_together(self.ranks):
            if self.ranks.is_main_process:
                write_json(self.folder / ROUTING_FILE, routing.record({t.name: t.metric for t in self.tasks}))
                logger.info("routing (bold: labels the task):\n%s", routing.table())
                if routing.control is not None:
                    logger.warning("CONTROL (%s): the labels are not of the sources that were chosen", routing.control)
                for task in routing.unserved:
                    logger.warning("NO LABELS FOR %s: %s", task, routing.reason(task))
        if len(routing.unserved) == len(routing.tasks):
            raise UserError(
                "no source labels any task: " + "; ".join(f"{task}: {routing.reason(task)}" for task in routing.tasks)
            )

    # ---- inputs that are invented ----

    def _drawing(self, expert: Expert, task: LabelTask, count: int) -> Asked:
        """A template's beginning, `count` times, to be continued by sampling."""
        assert task.replay is not None  # for the type checker: --self_prompt needs it
        data = self.arguments.data
        whole = self._encode(expert, task.replay).ids
        head = self.templates[task.name].head(_asked(task.replay).format, expert.tokenizer)
        sampling = Sampling(draw_seed(data.seed, task.name, expert.name), data.temperature, data.top_p)
        return Asked([head] * count, longest_input(whole, head), sampling)

    def _invent(self, routing: Routing) -> dict[str, dict[str, int]]:
        """Let those that were chosen invent the prompts of their tasks, with --control too; counts by task."""
        total = self.arguments.data.self_prompt
        drawn: dict[str, list[Label]] = {task: [] for task in routing.tasks}
        for name, source in self.experts.items():
            writer = source.without_adapter() if self.arguments.data.self_prompt_model == BASE_NAME else source
            questions = {}
            for task in self.tasks:
                chosen = routing.chosen[task.name]
                if name in chosen:
                    place = chosen.index(name)
                    count = total // len(chosen) + (place < total % len(chosen))
                    if count:
                        questions[task.name] = self._drawing(source, task, count)
            for task_name, labels in self.answering.ask(writer, questions, "inventing").items():
                drawn[task_name] += labels
        counts = {}
        for index, task in enumerate(self.tasks):
            if not routing.chosen[task.name]:
                continue
            assert task.replay is not None  # for the type checker
            format = _asked(task.replay).format
            template = self.templates[task.name]
            prompts, counts[task.name] = invented_prompts(task.name, template, format, drawn[task.name])
            told = ", ".join(f"{key} {value}" for key, value in counts[task.name].items())
            if self.ranks.is_main_process:
                (logger.info if prompts else logger.warning)("invented inputs of %s: %s", task.name, told)
            self.tasks[index] = replace(task, prompts=prompts)
        return counts

    # ---- labels ----

    def _label(
        self, routing: Routing, experts: Mapping[str, Expert], counts: Mapping[str, dict[str, int]]
    ) -> list[TaskLabels]:
        encoded: dict[str, dict[str, Prompts]] = {}
        answers: dict[str, dict[str, list[Label]]] = {}
        for name, expert in experts.items():
            encoded[name] = {
                task.name: self._encode(expert, task.prompts)
                for task in self.tasks
                if task.prompts is not None and name in routing.labelled_by[task.name]
            }
            answers[name] = self.answering.ask(expert, self._questions(encoded[name]), "labelling")
        made = []
        for task in self.tasks:
            names = [name for name in routing.labelled_by[task.name] if task.name in answers[name]]
            texts = {experts[name].name: encoded[name][task.name] for name in names}
            labels = {experts[name].name: answers[name][task.name] for name in names}
            cut = max((prompts.cut for prompts in texts.values()), default=0)
            if cut and self.ranks.is_main_process:
                logger.warning("%s: %d prompts were cut on the left to fit a source's context", task.name, cut)
            records = label_records(task, texts, labels, routing.control)
            made.append(TaskLabels(task, records, counts.get(task.name), cut))
        return made

    def _write(self, made: list[TaskLabels], record: dict[str, Any]) -> None:
        """All files anew beside their places, then moved; `labels.json` last, and meanwhile there is none."""
        earlier = _task_files(self.folder)
        with staging_folder(self.folder, STAGING) as staging:
            files = []
            for labels in made:
                if labels.records:
                    files.append(file_name(staging, labels.task.name))
                    write_lines(files[-1], labels.records)
            files.append(staging / LABELS_FILE)
            write_json(files[-1], record)
            (self.folder / LABELS_FILE).unlink(missing_ok=True)
            for path in earlier:
                if path.name not in [new.name for new in files]:
                    path.unlink(missing_ok=True)
            if not self.arguments.output.top_k_logits:  # those of an earlier run are kept, but not of these labels
                (self.folder / SOFT / SOFT_INDEX).unlink(missing_ok=True)
            for path in files:
                os.replace(path, self.folder / path.name)


def _asked(replay: EvalSet) -> EvalSet:
    """The replay's prompts without their answers."""
    return prompt_set(replay.label, replay.records, replay.indices)


def _task_files(folder: Path) -> list[Path]:
    """The files of labels that an earlier run finished."""
    record = read_json(folder / LABELS_FILE) or {}
    tasks = record.get("tasks")
    return [file_name(folder, name) for name in tasks if is_file_name(name)] if isinstance(tasks, dict) else []


def remove_labels(folder: Path) -> None:
    """Remove what an earlier labelling wrote, and nothing else."""
    try:
        files = _task_files(folder)
    except ValueError:
        files = []
    for path in [*files, *(folder / name for name in (LABELS_FILE, ROUTING_FILE, ROUTING_PICTURE))]:
        path.unlink(missing_ok=True)
    for name in (PARTS, SOFT):
        shutil.rmtree(folder / name, ignore_errors=True)
