"""The labelling itself: score experts on the replay, choose who labels what, let them answer, write it.

output_dir/<task>.jsonl    prompts with their labels, in the order of the prompts
output_dir/routing.json    scores and which source labels which task; written as soon as it is known
output_dir/labels.json     counts, hashes, settings, cost; written last: where it stands, the labels are complete
output_dir/soft/           with --top_k_logits, see `heterofusion.experts.soft`
output_dir/parts/<key>/    answers as they came, by a hash of all that they depend on: another routing costs nothing
"""

import contextlib
import hashlib
import json
import logging
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState

from heterofusion.data.labels import ANCHOR, CONTROL_COLUMN, LABELS_FILE
from heterofusion.data.markdown import markdown_table
from heterofusion.evaluation.datasets import EvalSet, check_references, is_file_name
from heterofusion.evaluation.results import metric_record
from heterofusion.experts.answering import ExpertAnswerer, Questions, ask
from heterofusion.experts.examples import Prompts
from heterofusion.experts.expert import Expert, ExpertRunner
from heterofusion.experts.generation import Answer, Sampling
from heterofusion.experts.soft import FOLDER as SOFT
from heterofusion.experts.soft import INDEX_FILE as SOFT_INDEX
from heterofusion.experts.soft import store_soft_labels
from heterofusion.experts.soft_labels import check_alignable
from heterofusion.labelling.arguments import LabelArguments
from heterofusion.labelling.prompts import find_template, invented_prompts
from heterofusion.labelling.routing import Routing, most_confident, read_map, route, with_control
from heterofusion.labelling.tasks import LabelTask, asked, labelled_record, load_tasks
from heterofusion.publish.record import library_versions
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.files import check_output_dir, display_name, read_json, write_json, write_lines
from heterofusion.runtime.program import release_logging
from heterofusion.runtime.ranks import all_together, cost_record

logger = logging.getLogger(__name__)

ROUTING_FILE = "routing.json"
ROUTING_PICTURE = "routing.png"
PARTS = "parts"
_FORMAT = 3  # of part files; another number is another folder
_ROOM = 4  # tokens that an invented input may have more than the replay's longest


def label(arguments: LabelArguments, ranks: PartialState) -> tuple[Routing, dict[str, Any]]:
    """Label; all processes call it together. Gives the routing and the content of `labels.json`.

    Everything that can be checked is checked before any model is loaded or anything is written.
    """
    labelling = _Labelling(arguments, ranks)
    release_logging()
    return labelling.run()


class _Labelling:
    """A labelling whose flags, files and adapters are in order; nothing is written and no weights are loaded yet."""

    def __init__(self, arguments: LabelArguments, ranks: PartialState) -> None:
        self.arguments, self.ranks = arguments, ranks
        self.folder = Path(arguments.output.output_dir).expanduser().absolute()
        self._encoded: dict[tuple[int, int], Prompts] = {}
        self._seconds: dict[Path, float] = {}  # of generation, in all runs; the same questions may be asked twice
        with all_together(ranks):
            self.labels, routing = arguments.data.labels(), arguments.routing.routing
            self.mapped = read_map(routing, self.labels, arguments.model.names()) if routing else {}
            self._check_flags()
            self.tasks = load_tasks(arguments.data)
            self.templates = {
                task.name: find_template(task.replay, asked(task.replay))
                for task in self.tasks
                if arguments.data.self_prompt and task.replay is not None and self.mapped.get(task.name) != []
            }
            self.experts = arguments.model.experts(arguments.generation)
            self.sources = [expert for name, expert in self.experts.items() if name != ANCHOR]
            if arguments.routing.control == "bases" and any(source.adapter is None for source in self.sources):
                raise UserError("--control bases needs sources with adapters: leave out the one that is a base alone")
            if len(self.mapped) == len(self.labels):
                self._routing({})  # tells of a control that cannot be
            if arguments.output.top_k_logits:
                for name in dict.fromkeys(name for label in self.labels for name in self._may_label(label)):
                    check_alignable(self.experts[name])
            self._encode_all()
        self.runner = ExpertRunner(ranks.device)

    # ---- before anything is loaded ----

    def _check_flags(self) -> None:
        output, data, model = self.arguments.output, self.arguments.data, self.arguments.model
        if self.ranks.is_main_process:
            check_output_dir(str(self.folder), output.resume, output.overwrite, resume_flag="--resume")
            found = {path.name for path in self.folder.iterdir()} if self.folder.is_dir() else set()
            if output.resume and found and not found & {LABELS_FILE, ROUTING_FILE, PARTS}:
                raise UserError(f"--resume: {self.folder} holds no labels; name another folder")
        # a task has the name of its replay's file by default, and so has the file of its labels
        read = {Path(name).expanduser().resolve() for name in (*data.dataset_name, *data.prompts)}
        for written in (self._file(label).resolve() for label in self.labels):
            if written in read:
                raise UserError(f"--output_dir: labels would be written over {written}, which is read; name another")
        measured = [label for label in self.labels if label not in self.mapped]
        if measured and not data.dataset_name:
            raise UserError(
                f"without --dataset_name no source can be scored, so --routing must name the sources of every task; "
                f"it lacks {', '.join(measured)}"
            )
        if not measured and not any(self.mapped.values()):
            raise UserError(f"--routing {self.arguments.routing.routing} gives no task to any source; name one")
        beside = [label for label in self.labels if label in measured or ANCHOR in self._may_label(label)]
        if model.target_adapter is None and beside:
            raise UserError(
                f"--target_adapter is missing, which sources have to beat, or which labels, {', '.join(beside)}: give "
                "it with its --model_name_or_path, or name sources in --routing"
            )

    def _file(self, task: str) -> Path:
        """The file of a task's labels."""
        return self.folder / f"{task}.jsonl"

    def _may_label(self, task: str) -> list[str]:
        """Names of all that may have to write or answer a task's prompts."""
        args, sources = self.arguments.routing, self.arguments.model.names()
        names = self.mapped.get(task, [*sources, *([ANCHOR] if args.anchor_labels else [])])
        others = {"shuffle": sources, "anchor": [ANCHOR]}.get(args.control or "", [])
        return [*dict.fromkeys([*names, *others])] if names else []

    def _encode_all(self) -> None:
        """Everything that may be asked, in the words of everyone who may be: what cannot be is told before."""
        for task in self.tasks:
            if task.name not in self.mapped:
                for expert in self.experts.values():
                    self._encode(expert, task.replay)
            for expert in map(self.experts.__getitem__, self._may_label(task.name)):
                if task.prompts is None:
                    self._drawing(expert, task, 1)
                else:
                    self._encode(expert, task.prompts)

    def _encode(self, expert: Expert, examples: EvalSet | None) -> Prompts:
        """Prompts in an expert's words."""
        assert examples is not None  # for the type checker: who is asked, is asked something
        key = (id(expert.tokenizer), id(examples))
        if key not in self._encoded:
            self._encoded[key] = expert.encode(examples)
            check_references(examples, self._encoded[key])
        return self._encoded[key]

    # ---- the work ----

    def run(self) -> tuple[Routing, dict[str, Any]]:
        output, main = self.arguments.output, self.ranks.is_main_process
        if output.overwrite:
            mapped = [name for names in self.mapped.values() for name in names if name in self.experts]
            first = next(iter(self.experts)) if len(self.mapped) < len(self.labels) else mapped[0]
            with all_together(self.ranks):  # the last thing that may be wrong: until then, what is there stays
                self.runner.load(self.experts[first].base)
            with all_together(self.ranks):
                if main:
                    _remove_labels(self.folder)
        routing = self._route()
        with all_together(self.ranks):
            if main:
                self._tell(routing)
        if not any(routing.chosen.values()):
            reasons = "; ".join(f"{task}: {routing.reason(task)}" for task in routing.tasks)
            raise UserError(f"no source labels any task: {reasons}")
        counts = self._invent(routing) if self.templates else {}
        answering = dict(self.experts)
        if routing.control == "bases":  # which say so in their names
            answering |= {
                n: replace(e.without_adapter(), name=f"{n}-base") for n, e in answering.items() if n != ANCHOR
            }
        records, cut = self._label(routing, answering)
        self.runner.release()
        if not any(records.values()):
            raise UserError("--self_prompt: no invented input is new and keeps to its template; give --prompts")
        seconds = sum(self._seconds.values())
        if output.top_k_logits:
            experts = {expert.name: expert for expert in answering.values()}
            size, device = output.teacher_batch_size, self.ranks.device
            seconds += store_soft_labels(self.folder, experts, records, output.top_k_logits, size, device)
        tasks = {
            task.name: {**_summary(task, records[task.name], cut[task.name]), "invented": counts.get(task.name)}
            for task in self.tasks
        }
        told = self._record(tasks, routing, seconds)
        with all_together(self.ranks):
            if main:
                self._write(records, told)
        return routing, told

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
        how = self.arguments.generation
        answerer = ExpertAnswerer(**vars(expert), runner=self.runner, generation=how, in_context=True)
        found = ask(self.ranks, answerer, questions, f"{expert.name}, {title}")
        self._seconds |= {questions[name].folder: answers.seconds for name, answers in found.items()}
        return {name: answers.answers for name, answers in found.items()}

    def _answers(self, expert: Expert, prompts: Mapping[str, Prompts], title: str) -> dict[str, list[Answer]]:
        most = self.arguments.generation.max_new_tokens
        return self._ask(expert, {n: self._questions(expert, p.ids, most) for n, p in prompts.items()}, title)

    def _route(self) -> Routing:
        replays = {t.name: t.replay for t in self.tasks if t.name not in self.mapped and t.replay is not None}
        scores: dict[str, dict[str, float]] = {}
        anchor_first = sorted(self.experts.items(), key=lambda item: item[0] != ANCHOR)  # as tables show them
        for expert_name, expert in anchor_first if replays else []:
            prompts = {name: self._encode(expert, replay) for name, replay in replays.items()}
            answers = self._answers(expert, prompts, "replay")
            scores[expert_name] = {
                name: metric_record(replay.metric, [a.text for a in answers[name]], prompts[name].references)["score"]
                for name, replay in replays.items()
            }
        return self._routing(scores)

    def _routing(self, scores: dict[str, dict[str, float]]) -> Routing:
        """The routing by these scores and the map; with --control, somebody else in the place of the sources."""
        args, sources = self.arguments.routing, self.arguments.model.names()
        least = args.anchor_min_score if args.anchor_labels else None
        found = route(self.labels, sources, scores, args.routing_margin, self.mapped, least, args.routing_share)
        if args.control is None or not any(found.chosen.values()):
            return found
        return with_control(found, args.control, self.arguments.data.seed)

    def _tell(self, routing: Routing) -> None:
        """Write and say who labels what."""
        write_json(self.folder / ROUTING_FILE, routing.record({task.name: task.metric for task in self.tasks}))
        logger.info("routing (bold: labels the task):\n%s", routing.table())
        if routing.control is not None:
            logger.warning("CONTROL (%s): the labels are not of the sources that were chosen", routing.control)
        for task in routing.tasks:
            if not routing.chosen[task]:
                logger.warning("NO LABELS FOR %s: %s", task, routing.reason(task))

    # ---- inputs that are invented ----

    def _drawing(self, source: Expert, task: LabelTask, count: int) -> Questions:
        """A template's beginning, `count` times, to be continued by a source's base by sampling."""
        assert task.replay is not None  # for the type checker: --self_prompt needs it
        data = self.arguments.data
        head = self.templates[task.name].head(asked(task.replay).format, source.tokenizer)
        digest = hashlib.sha256(f"{data.seed} {task.name} {source.name}".encode()).digest()
        sampling = Sampling(int.from_bytes(digest[:6], "big"), data.temperature, data.top_p)
        longest = max(map(len, self._encode(source, task.replay).ids))
        return self._questions(source.without_adapter(), [head] * count, max(1, longest - len(head)) + _ROOM, sampling)

    def _invent(self, routing: Routing) -> dict[str, dict[str, int]]:
        """Let those that were chosen invent the prompts of their tasks, with --control too; counts by task."""
        total = self.arguments.data.self_prompt
        drawn: dict[str, list[Answer]] = {task: [] for task in routing.tasks}
        for name, source in self.experts.items():
            questions = {}
            for task in self.tasks:
                chosen = routing.chosen[task.name]
                count = total // len(chosen) + (chosen.index(name) < total % len(chosen)) if name in chosen else 0
                if count:
                    questions[task.name] = self._drawing(source, task, count)
            for task_name, answers in self._ask(source.without_adapter(), questions, "inventing").items():
                drawn[task_name] += answers
        counts = {}
        for index, task in enumerate(self.tasks):
            if routing.chosen[task.name] and task.replay is not None:
                template, format = self.templates[task.name], asked(task.replay).format
                prompts, counts[task.name] = invented_prompts(task.name, template, format, drawn[task.name])
                if self.ranks.is_main_process:
                    told = ", ".join(f"{key} {value}" for key, value in counts[task.name].items())
                    (logger.info if prompts else logger.warning)("invented inputs of %s: %s", task.name, told)
                self.tasks[index] = replace(task, prompts=prompts)
        return counts

    # ---- labels ----

    def _label(
        self, routing: Routing, experts: Mapping[str, Expert]
    ) -> tuple[dict[str, list[dict[str, Any]]], dict[str, int]]:
        """By task, its records, and how many prompts a source read without their beginning."""
        texts: dict[str, dict[str, Prompts]] = {task.name: {} for task in self.tasks}
        labels: dict[str, dict[str, list[Answer]]] = {task.name: {} for task in self.tasks}
        for name, expert in experts.items():
            served = [t for t in self.tasks if t.prompts is not None and name in routing.labelled_by[t.name]]
            prompts = {task.name: self._encode(expert, task.prompts) for task in served}
            for task_name, answers in self._answers(expert, prompts, "labelling").items():
                texts[task_name][expert.name], labels[task_name][expert.name] = prompts[task_name], answers
        cut = {name: max((prompts.cut for prompts in found.values()), default=0) for name, found in texts.items()}
        for name, count in cut.items():
            if count and self.ranks.is_main_process:
                logger.warning("%s: %d prompts were cut on the left to fit a source's context", name, count)
        return {t.name: _records(t, texts[t.name], labels[t.name], routing.control) for t in self.tasks}, cut

    def _record(self, tasks: dict[str, Any], routing: Routing, seconds: float) -> dict[str, Any]:
        """What `labels.json` holds. Local paths are cut to their names."""
        data, anchor = self.arguments.data, self.experts.get(ANCHOR)
        names = ("max_prompts", "self_prompt", "temperature", "top_p", "seed", "dataset_seed")
        return {
            "control": routing.control,
            "tasks": tasks,
            "labels": sum(task["labels"] for task in tasks.values()),
            "routing": routing.record({name: task["metric"] for name, task in tasks.items()}),
            "anchor": anchor.record() if anchor is not None else None,
            "sources": [source.record() for source in self.sources],
            "settings": {
                "max_new_tokens": self.arguments.generation.max_new_tokens,
                "prompts": [name if data.own_prompts else display_name(name) for name in data.prompts],
                "top_k_logits": self.arguments.output.top_k_logits,
                **{name: getattr(data, name) for name in names},
            },
            "processes": self.ranks.num_processes,
            "cost": cost_record(seconds),
            "versions": library_versions(),
        }

    def _write(self, records: Mapping[str, list[dict[str, Any]]], told: dict[str, Any]) -> None:
        """`labels.json` goes first and comes last: where it stands, the labels are complete."""
        _remove_tasks(self.folder)
        if not self.arguments.output.top_k_logits:  # those of an earlier run are kept, but not of these labels
            (self.folder / SOFT / SOFT_INDEX).unlink(missing_ok=True)
        for name, rows in records.items():
            if rows:
                write_lines(self._file(name), rows)
        write_json(self.folder / LABELS_FILE, told)


def _records(
    task: LabelTask, texts: Mapping[str, Prompts], labels: Mapping[str, list[Answer]], control: str | None
) -> list[dict[str, Any]]:
    """The records of a task's file: each prompt with the label of its most confident source."""
    if task.prompts is None or not labels:
        return []
    is_well_formed = task.format_check()
    records = []
    for position in range(len(task.prompts.examples)):
        first = next(iter(texts.values())).texts[position]
        source = most_confident({name: rows[position] for name, rows in labels.items()}, first, is_well_formed)
        answer, question = labels[source][position], texts[source].texts[position]
        records.append(
            {
                **labelled_record(task.prompts, position, answer.text, question),
                **task.tags_of(position),
                "source": source,
                "log_probability": round(answer.mean_log_probability, 6),
                "format_ok": is_well_formed(answer, question),
                **({} if control is None else {CONTROL_COLUMN: control}),
            }
        )
    return records


def _summary(task: LabelTask, records: Sequence[Mapping[str, Any]], cut: int) -> dict[str, Any]:
    """What `labels.json` tells of a task's labels."""
    count, failures = len(records), sum(not record["format_ok"] for record in records)
    return {
        "metric": task.metric,
        "labels": count,
        "sources": dict(Counter(record["source"] for record in records)),
        "format_failures": failures,
        "format_failure_rate": failures / count if count else None,
        "mean_log_probability": sum(r["log_probability"] for r in records) / count if count else None,
        "prompts_cut": cut,
        "prompts_sha256": task.prompts.sha256 if task.prompts is not None else None,
        "replay_sha256": task.replay.sha256 if task.replay is not None else None,
    }


def labels_table(record: Mapping[str, Any]) -> str:
    """Markdown table of `labels.json`: a row per task."""
    rows = []
    for name, task in record["tasks"].items():
        invented = task["invented"]
        sources = ", ".join(f"{source} {count}" for source, count in task["sources"].items())
        kept = f"{invented['kept']} of {invented['drawn']}" if invented else None
        told = (task["format_failure_rate"], task["mean_log_probability"], kept)
        rows.append([name, task["labels"], sources or None, *told])
    title = f"CONTROL {record['control']}: task" if record["control"] else "task"
    header = ["labels", "by source", "format failures", "log-probability per token", "invented inputs kept"]
    return markdown_table([title, *header], rows)


def _remove_tasks(folder: Path) -> None:
    """Remove the labels that an earlier run finished."""
    tasks: dict[str, Any] = {}
    with contextlib.suppress(UserError):  # a damaged record goes all the same
        tasks = (read_json(folder / LABELS_FILE) or {}).get("tasks") or {}
    (folder / LABELS_FILE).unlink(missing_ok=True)
    for name in filter(is_file_name, tasks):
        (folder / f"{name}.jsonl").unlink(missing_ok=True)


def _remove_labels(folder: Path) -> None:
    """Remove what an earlier labelling wrote, and nothing else."""
    _remove_tasks(folder)
    for name in (ROUTING_FILE, ROUTING_PICTURE):
        (folder / name).unlink(missing_ok=True)
    for name in (PARTS, SOFT):
        shutil.rmtree(folder / name, ignore_errors=True)
