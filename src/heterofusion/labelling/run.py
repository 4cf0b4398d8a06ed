"""The labelling itself: score experts on the replay, choose who labels what, let them answer, write it.

output_dir/<task>.jsonl    prompts with their labels, in the order of the prompts
output_dir/routing.json    scores and which source labels which task; written as soon as it is known
output_dir/labels.json     counts, hashes, settings, cost; written last: where it stands, the labels are complete
output_dir/soft/           with --top_k_logits, see `heterofusion.experts.soft`
output_dir/parts/<key>/    answers as they came, by a hash of all that they depend on: another routing costs nothing
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState

from heterofusion.data.labels import ANCHOR, LABELS_FILE
from heterofusion.evaluation.datasets import EvalSet, check_references, is_file_name
from heterofusion.evaluation.results import metric_record
from heterofusion.evaluation.rows import BASE_NAME
from heterofusion.experts.answering import ExpertAnswerer, Questions, ask
from heterofusion.experts.examples import Prompts
from heterofusion.experts.expert import Expert, ExpertRunner
from heterofusion.experts.generation import Answer, Sampling
from heterofusion.experts.soft import FOLDER as SOFT
from heterofusion.experts.soft import INDEX_FILE as SOFT_INDEX
from heterofusion.experts.soft import OwnLabel, check_soft, store_soft_labels
from heterofusion.labelling.arguments import LabelArguments
from heterofusion.labelling.prompts import Template, draw_seed, find_template, invented_prompts, longest_input
from heterofusion.labelling.record import TaskLabels, label_records
from heterofusion.labelling.routing import Routing, labellers, read_map, route, with_control
from heterofusion.labelling.tasks import LabelTask, asked, file_name, load_tasks
from heterofusion.publish.record import library_versions
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.files import (
    check_output_dir,
    display_name,
    read_json,
    staging_folder,
    write_json,
    write_lines,
)
from heterofusion.runtime.ranks import all_together, cost_record

logger = logging.getLogger(__name__)

ROUTING_FILE = "routing.json"
ROUTING_PICTURE = "routing.png"
PARTS = "parts"
STAGING = ".labels-"
_FORMAT = 3  # of part files; another number is another folder


class Labelling:
    """A labelling whose flags, files and adapters are in order; nothing is written and no weights are loaded yet.

    All processes construct and run it together.
    """

    def __init__(self, arguments: LabelArguments, ranks: PartialState) -> None:
        self.arguments, self.ranks = arguments, ranks
        self.folder = Path(arguments.output.output_dir).expanduser().absolute()
        self._encoded: dict[tuple[Any, ...], Prompts] = {}
        self._seconds: dict[Path, float] = {}  # of generation, in all runs; the same questions may be asked twice
        with all_together(ranks):
            self._check_folder()
            names, labels = arguments.model.names(), arguments.data.labels()
            self.mapped = read_map(arguments.routing.routing, labels, names) if arguments.routing.routing else {}
            self._check_routing(labels)
            self.tasks = load_tasks(arguments.data)
            self.templates = self._templates()
            self.experts = arguments.model.experts(arguments.generation)
            self.sources = [expert for name, expert in self.experts.items() if name != ANCHOR]
            self.scored = [expert for expert in [self.experts.get(ANCHOR), *self.sources] if expert is not None]
            if arguments.routing.control == "bases":
                self._check_adapters()
            if len(self.mapped) == len(labels):
                self._controlled(self._routing({}))
            if arguments.output.top_k_logits:
                check_soft([e for e in self.experts.values() if e.name != ANCHOR or self._anchor_may_label])
            self._encode_all()
        self.runner = ExpertRunner(ranks.device)

    # ---- before anything is loaded ----

    def _check_folder(self) -> None:
        output, data, ours = self.arguments.output, self.arguments.data, (LABELS_FILE, ROUTING_FILE, PARTS)
        if self.ranks.is_main_process:
            check_output_dir(str(self.folder), output.resume, output.overwrite, resume_flag="--resume")
            if output.resume and self.folder.is_dir() and any(self.folder.iterdir()):
                if not any((self.folder / name).exists() for name in ours):
                    raise UserError(f"--resume: {self.folder} holds no labels ({', '.join(ours)}); name another")
                read_json(self.folder / LABELS_FILE)
        # a task has the name of its replay's file by default, and so has the file of its labels
        read = {Path(name).expanduser().resolve() for name in (*data.dataset_name, *data.prompts)}
        for written in (file_name(self.folder, label) for label in data.labels()):
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
        if not measured and not any(self.mapped.values()):
            raise UserError(f"--routing {routing.routing} gives no task to any source; name one")
        if not measured and routing.anchor_labels:
            raise UserError(
                f"--anchor_labels is of tasks that are measured, but --routing {routing.routing} names all: write "
                f"{ANCHOR} there for those that the anchor is to label, and leave --anchor_labels out"
            )
        if measured and not data.dataset_name:
            raise UserError(
                f"without --dataset_name no source can be scored, so --routing must name the sources of every task; "
                f"it lacks {', '.join(measured)}"
            )
        if measured and model.target_adapter is None:
            raise UserError(
                f"--target_adapter is missing: sources have to beat the anchor on {', '.join(measured)}; give it with "
                "its --model_name_or_path, or name the sources of all tasks in --routing"
            )

    def _check_adapters(self) -> None:
        for source in self.sources:
            if source.adapter is None:
                raise UserError(
                    f"--control bases: {source.name} is a base without an adapter, so its base would give the same "
                    "labels; give its adapter, or leave the source out"
                )

    @property
    def _anchor_may_label(self) -> bool:
        routing = self.arguments.routing
        named = any(ANCHOR in names for names in self.mapped.values())
        return named or routing.anchor_labels or routing.control == ANCHOR

    def _may_label(self, task: str) -> list[str]:
        """Names of all that may have to write or answer a task's prompts."""
        routing, sources = self.arguments.routing, [source.name for source in self.sources]
        names = self.mapped.get(task, [*sources, *([ANCHOR] if routing.anchor_labels else [])])
        if names and routing.control == "shuffle":
            names = [*sources, *names]
        return [*dict.fromkeys([*names, *([ANCHOR] if names and routing.control == ANCHOR else [])])]

    def _templates(self) -> dict[str, Template]:
        tasks = self.tasks if self.arguments.data.self_prompt else []
        return {
            task.name: find_template(task.replay, asked(task.replay))
            for task in tasks
            if task.replay is not None and self.mapped.get(task.name) != []
        }

    def _encode_all(self) -> None:
        """Everything that may be asked, in the words of everyone who may be: what cannot be is told before."""
        for task in self.tasks:
            for expert in self.scored if task.name not in self.mapped and task.replay is not None else []:
                self._encode(expert, task.replay)
            for name in self._may_label(task.name):
                if task.prompts is not None:
                    self._encode(self.experts[name], task.prompts)
                else:
                    self._drawing(self.experts[name], self.experts[name], task, 1)

    def _encode(self, expert: Expert, examples: EvalSet | None) -> Prompts:
        """Prompts in an expert's words; experts with the same tokenizer share them."""
        assert examples is not None  # for the type checker: who is asked, is asked something
        key = (expert.tokenizer.name_or_path, expert.base.model_name_or_path, expert.limit, id(examples))
        if key not in self._encoded:
            self._encoded[key] = expert.encode(examples)
            check_references(examples, self._encoded[key])
        return self._encoded[key]

    # ---- the work ----

    def run(self) -> tuple[Routing, dict[str, Any]]:
        """Route, label and write; gives the routing and the content of `labels.json`."""
        output = self.arguments.output
        if output.overwrite:
            self._clear()
        routing = self._route()
        self._tell(routing)
        counts = self._invent(routing) if self.templates else {}
        answering = labellers(self.experts, routing.control)
        made = self._label(routing, answering, counts)
        self.runner.release()
        if not any(labels.records for labels in made):
            raise UserError(
                "--self_prompt: no invented input is new and keeps to its template; give --prompts, or a larger number"
            )
        seconds = sum(self._seconds.values())
        if output.top_k_logits:
            experts = {expert.name: expert for expert in answering.values()}
            own: dict[str, list[OwnLabel]] = {}
            for labels in made:
                for line, record in enumerate(labels.records):
                    own.setdefault(record["source"], []).append(OwnLabel(labels.task.name, line, record))
            size, device = output.teacher_batch_size, self.ranks.device
            seconds += store_soft_labels(self.folder, experts, own, output.top_k_logits, size, device)["seconds"]
        told = self._record(made, routing, seconds)
        with all_together(self.ranks):
            if self.ranks.is_main_process:
                self._write(made, told)
        return routing, told

    def _clear(self) -> None:
        """Remove what an earlier run wrote, once the first model is loaded: the last thing that may be wrong."""
        needed = [name for task in self.tasks for name in self.mapped.get(task.name, [])]
        first = self.scored[0] if len(self.mapped) < len(self.tasks) else self.experts[needed[0]]
        with all_together(self.ranks):
            self.runner.load(first.base)
        with all_together(self.ranks):
            if self.ranks.is_main_process:
                remove_labels(self.folder)

    def _questions(
        self, expert: Expert, ids: Sequence[Sequence[int]], length: int, sampling: Sampling | None = None
    ) -> Questions:
        """Prompts for an expert, whose answers are where all that they depend on says."""
        settings = {"max_new_tokens": length, "sampling": asdict(sampling) if sampling else None, "format": _FORMAT}
        key = json.dumps({**expert.identity(), **settings, "prompts": list(map(list, ids))}, sort_keys=True)
        folder = self.folder / PARTS / hashlib.sha256(key.encode()).hexdigest()[:24]
        return Questions(folder, ids, list(map(len, ids)), length, sampling)

    def _ask(self, expert: Expert, questions: Mapping[str, Questions], title: str) -> dict[str, list[Answer]]:
        """The answers of an expert by name, in the order of the questions."""
        answerer = ExpertAnswerer(expert, self.runner, self.arguments.generation, in_context=True)
        found = ask(self.ranks, answerer, questions, f"{expert.name}, {title}")
        self._seconds |= {questions[name].folder: answers.seconds for name, answers in found.items()}
        return {name: answers.answers for name, answers in found.items()}

    def _answers(self, expert: Expert, prompts: Mapping[str, Prompts], title: str) -> dict[str, list[Answer]]:
        most = self.arguments.generation.max_new_tokens
        return self._ask(expert, {n: self._questions(expert, p.ids, most) for n, p in prompts.items()}, title)

    def _route(self) -> Routing:
        replays = {t.name: t.replay for t in self.tasks if t.name not in self.mapped and t.replay is not None}
        scores: dict[str, dict[str, float]] = {}
        for expert in self.scored if replays else []:
            prompts = {name: self._encode(expert, replay) for name, replay in replays.items()}
            answers = self._answers(expert, prompts, "replay")
            scores[expert.name] = {
                name: metric_record(replay.metric, [a.text for a in answers[name]], prompts[name].references)["score"]
                for name, replay in replays.items()
            }
        return self._controlled(self._routing(scores))

    def _routing(self, scores: dict[str, dict[str, float]]) -> Routing:
        args, sources = self.arguments.routing, [source.name for source in self.sources]
        labels = self.arguments.data.labels()
        return route(labels, sources, scores, args.routing_margin, self.mapped, args.anchor_from, args.routing_share)

    def _controlled(self, routing: Routing) -> Routing:
        """With --control, somebody else in the place of the sources; where nobody labels anything, `_tell` says so."""
        kind = self.arguments.routing.control
        if kind is None or len(routing.unserved) == len(routing.tasks):
            return routing
        return with_control(routing, kind, self.arguments.data.seed)

    def _tell(self, routing: Routing) -> None:
        """Write and say who labels what."""
        with all_together(self.ranks):
            if self.ranks.is_main_process:
                write_json(self.folder / ROUTING_FILE, routing.record({t.name: t.metric for t in self.tasks}))
                logger.info("routing (bold: labels the task):\n%s", routing.table())
                if routing.control is not None:
                    logger.warning("CONTROL (%s): the labels are not of the sources that were chosen", routing.control)
                for task in routing.unserved:
                    logger.warning("NO LABELS FOR %s: %s", task, routing.reason(task))
        if len(routing.unserved) == len(routing.tasks):
            reasons = "; ".join(f"{task}: {routing.reason(task)}" for task in routing.tasks)
            raise UserError(f"no source labels any task: {reasons}")

    # ---- inputs that are invented ----

    def _drawing(self, source: Expert, writer: Expert, task: LabelTask, count: int) -> Questions:
        """A template's beginning, `count` times, to be continued by sampling."""
        assert task.replay is not None  # for the type checker: --self_prompt needs it
        data = self.arguments.data
        whole = self._encode(source, task.replay).ids
        head = self.templates[task.name].head(asked(task.replay).format, source.tokenizer)
        sampling = Sampling(draw_seed(data.seed, task.name, source.name), data.temperature, data.top_p)
        return self._questions(writer, [head] * count, longest_input(whole, head), sampling)

    def _invent(self, routing: Routing) -> dict[str, dict[str, int]]:
        """Let those that were chosen invent the prompts of their tasks, with --control too; counts by task."""
        total = self.arguments.data.self_prompt
        drawn: dict[str, list[Answer]] = {task: [] for task in routing.tasks}
        for name, source in self.experts.items():
            writer = source.without_adapter() if self.arguments.data.self_prompt_model == BASE_NAME else source
            questions = {}
            for task in self.tasks:
                chosen = routing.chosen[task.name]
                if name in chosen:
                    count = total // len(chosen) + (chosen.index(name) < total % len(chosen))
                    if count:
                        questions[task.name] = self._drawing(source, writer, task, count)
            for task_name, answers in self._ask(writer, questions, "inventing").items():
                drawn[task_name] += answers
        counts = {}
        for index, task in enumerate(self.tasks):
            if routing.chosen[task.name] and task.replay is not None:
                template, format = self.templates[task.name], asked(task.replay).format
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
        answers: dict[str, dict[str, list[Answer]]] = {}
        for name, expert in experts.items():
            encoded[name] = {
                task.name: self._encode(expert, task.prompts)
                for task in self.tasks
                if task.prompts is not None and name in routing.labelled_by[task.name]
            }
            answers[name] = self._answers(expert, encoded[name], "labelling")
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

    def _record(self, made: Sequence[TaskLabels], routing: Routing, seconds: float) -> dict[str, Any]:
        """What `labels.json` holds. Local paths are cut to their names."""
        data, anchor = self.arguments.data, self.experts.get(ANCHOR)
        names = ("max_prompts", "self_prompt", "temperature", "top_p", "seed", "dataset_seed")
        return {
            "control": routing.control,
            "tasks": {labels.task.name: labels.summary() for labels in made},
            "labels": sum(len(labels.records) for labels in made),
            "routing": routing.record({labels.task.name: labels.task.metric for labels in made}),
            "anchor": anchor.record() if anchor is not None else None,
            "sources": [source.record() for source in self.sources],
            "settings": {
                "max_new_tokens": self.arguments.generation.max_new_tokens,
                "prompts": [name if data.own_prompts else display_name(name) for name in data.prompts],
                "self_prompt_model": data.self_prompt_model if data.self_prompt else None,
                "top_k_logits": self.arguments.output.top_k_logits,
                **{name: getattr(data, name) for name in names},
            },
            "processes": self.ranks.num_processes,
            "cost": cost_record(seconds),
            "versions": library_versions(),
        }

    def _write(self, made: list[TaskLabels], record: dict[str, Any]) -> None:
        """All files anew beside their places, then moved; `labels.json` last, and meanwhile there is none."""
        earlier = _task_files(self.folder)
        with staging_folder(self.folder, STAGING) as staging:
            files = [file_name(staging, labels.task.name) for labels in made if labels.records]
            for path, labels in zip(files, [labels for labels in made if labels.records], strict=True):
                write_lines(path, labels.records)
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


def _task_files(folder: Path) -> list[Path]:
    """The files of labels that an earlier run finished."""
    tasks = (read_json(folder / LABELS_FILE) or {}).get("tasks") or {}
    return [file_name(folder, name) for name in tasks if is_file_name(name)]


def remove_labels(folder: Path) -> None:
    """Remove what an earlier labelling wrote, and nothing else."""
    try:
        files = _task_files(folder)
    except UserError:
        files = []
    for path in [*files, *(folder / name for name in (LABELS_FILE, ROUTING_FILE, ROUTING_PICTURE))]:
        path.unlink(missing_ok=True)
    for name in (PARTS, SOFT):
        shutil.rmtree(folder / name, ignore_errors=True)
