"""A merge of experts: all checks first, then the merge, the search of its hyper-parameters by score, what is told."""

import itertools
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from heterofusion.adapters.lora import AdapterError, LoraAdapter, check_base_fits, load_adapter
from heterofusion.data.markdown import markdown_table
from heterofusion.evaluation.datasets import check_file_names, check_references, load_eval_sets
from heterofusion.evaluation.results import metric_record
from heterofusion.experts.answering import ExpertAnswerer, Questions
from heterofusion.experts.expert import Expert, ExpertRunner, find_expert
from heterofusion.experts.generation import GenerationArguments
from heterofusion.merging.config import MergeArguments, MergeDataArguments, search_candidates
from heterofusion.merging.export import LowRank, added, linear_layers, low_rank
from heterofusion.merging.rules import RULES
from heterofusion.merging.rules.rule import Merged, Rule
from heterofusion.merging.tau import Updates
from heterofusion.publish.record import adapter_record, control_of, make_record
from heterofusion.publish.write import write_adapter
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.files import check_output_dir, display_name
from heterofusion.runtime.loading import base_skeleton
from heterofusion.runtime.ranks import cost_record

logger = logging.getLogger(__name__)

Scores = dict[str, dict[str, Any]]  # record of every data set, by label

_FUSE = "merging needs experts of one base model; recipes/train.py fuses experts of different ones"


@dataclass
class Trial:
    """A rule that was tried: the scores of each of its adapters, and the share of energy that the first one lost."""

    rule: Rule
    scores: list[Scores]
    lost: float = 0.0

    def row(self) -> dict[str, float]:
        """The score of every data set."""
        return {label: record["score"] for scores in self.scores for label, record in scores.items()}

    @property
    def mean(self) -> float:
        """The mean of these scores; 0 without any."""
        return statistics.fmean(self.row().values()) if self.scores else 0.0

    def record(self) -> dict[str, Any]:
        """What a search tells of it."""
        values = self.rule.hyperparameters()
        return {"hyperparameters": values, "scores": self.row(), "mean": self.mean, "truncation": self.lost}


class MergeRun:
    """A merge whose flags, adapters and data are in order; nothing is written and no base weights are loaded yet."""

    def __init__(
        self,
        flags: MergeArguments,
        values: Mapping[str, Any],
        data: MergeDataArguments,
        generation: GenerationArguments,
    ) -> None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError("a merge runs in one process; start it with python, or with --num_processes 1")
        if (flags.search or flags.dense) and not data.dataset_name:
            raise UserError("--search and --dense score merges on validation data: give --dataset_name")
        self.flags, self.per_task = flags, RULES[flags.method].per_task
        given = {name: value for name, value in values.items() if value is not None}
        self.candidates = search_candidates(flags.search, flags.method, given)
        self.labels = [data.labels()] if data.dataset_name else []  # the data sets of each adapter
        if self.per_task and data.dataset_name:
            self.labels = [[label] for label in data.labels()]
            if len(self.labels) != len(flags.adapters):
                raise UserError(
                    f"--dataset_name has {len(self.labels)} data sets for {len(flags.adapters)} adapters: with "
                    f"{flags.method} each expert's adapter answers its own, in the same order"
                )
        if flags.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: PyTorch finds no GPU here; give cpu, or auto")
        device = torch.device("cuda" if flags.device != "cpu" and torch.cuda.is_available() else "cpu")
        self.folder = Path(flags.output_dir).expanduser().absolute()
        check_output_dir(str(self.folder), resuming=False, overwrite=flags.overwrite)
        self.experts = [load_adapter(name) for name in flags.adapters]
        self.folders = self._folders()
        base = flags.base(use_cpu=device.type == "cpu")
        skeleton = base_skeleton(base, flags.trust_remote_code)
        check_experts(self.experts, skeleton)
        self.layers = linear_layers(skeleton)
        self.dtype = export_dtype(self.experts, flags.dtype)
        self.base_model = display_name(self.experts[0].base_model or flags.model_name_or_path)
        self.updates = Updates(self.experts, flags.weights, device)
        self.find = partial(find_expert, base, generation=generation)
        self.generation, self.runner = generation, ExpertRunner(device)
        self.sets = {examples.label: examples for examples in (load_eval_sets(data) if self.labels else [])}
        first = self.find(str(self.experts[0].folder)) if self.sets else None  # its tokenizer goes with the merge
        self.prompts = {label: first.encode(examples) for label, examples in self.sets.items() if first}
        for label, prompts in self.prompts.items():
            check_references(self.sets[label], prompts)
            if prompts.cut:
                logger.warning("%d prompts of %s were cut on the left, they are too long", prompts.cut, label)
        self.merged = lru_cache(maxsize=1)(self._merge)

    def _folders(self) -> dict[str, Path]:
        """Where adapters go, by the task that they are for; one by the name of the method, if it is for all."""
        folders = {self.flags.method: self.folder}
        if self.per_task:
            given = [expert.name for expert in self.experts]
            names = self.flags.names or [display_name(name.rstrip("/")).rpartition("/")[2] for name in given]
            folders = {name: self.folder / name for name in check_file_names(names, given, "adapter", "names")}
        for folder, expert in itertools.product(folders.values(), self.experts):
            if folder.resolve() == expert.folder.resolve():
                raise UserError(f"--output_dir {folder} is the folder of adapter {expert.name}; name another")
        return folders

    def run(self) -> str:
        """Merge, search, score and write; gives what the user is told: truncation, scores, the table of a search."""
        start = time.perf_counter()
        # those that differ in lambda alone follow each other: one merge serves them all
        units = [without_lambda(rule) for rule in self.candidates]
        order = sorted(range(len(units)), key=lambda index: units.index(units[index]))
        with (
            tempfile.TemporaryDirectory() as place,
            tqdm(order, "search", unit="merge", disable=len(order) == 1) as bar,
        ):
            found = {index: self._try(self.candidates[index], Path(place)) for index in bar}
        trials = [found[index] for index in range(len(found))]
        best = max(trials, key=lambda trial: trial.mean)  # of equals the first
        results, seconds = self.merged(without_lambda(best.rule))
        search = None
        if self.flags.search:
            seconds = time.perf_counter() - start
            told = [trial.record() for trial in trials]
            search = {"candidates": told, "chosen": trials.index(best), "validation_runs": len(trials)}
            search["seconds"] = round(seconds, 3)
        dense = Trial(best.rule, self._score_dense(best.rule) if self.flags.dense else [])
        for index, folder in enumerate(self.folders.values()):
            own, cut = (Trial(best.rule, trial.scores[index : index + 1]) for trial in (best, dense))
            validation: dict[str, Any] = {}
            if own.scores:
                validation = {"adapter": own.scores[0], "mean": own.mean, "dense": None, "dense_mean": None}
            if cut.scores:
                validation |= {"dense": cut.scores[0], "dense_mean": cut.mean}
            metrics = {f"eval_{label}": score for label, score in own.row().items()}
            self._write(
                folder, index, best.rule, seconds, metrics=metrics, search=search, validation=validation or None
            )
        logger.info("%s written to %s", "adapters" if self.per_task else "adapter", self.folder)
        return self._report(results, best, dense, search)

    def _merge(self, rule: Rule) -> tuple[list[LowRank], float]:
        """What a rule merges, but for its lambda, and in how many seconds."""
        start = time.perf_counter()
        return low_rank(rule.merge(self.updates), self.updates, self.flags.rank), time.perf_counter() - start

    def _try(self, rule: Rule, folder: Path) -> Trial:
        """Merge by a rule, and score it, if there are data, as it would be written."""
        (first, *_), _ = self.merged(without_lambda(rule))
        folders = [self._write(folder / str(index), index, rule) for index in range(len(self.labels))]
        scores = [self._score(self.find(str(f)), labels) for f, labels in zip(folders, self.labels, strict=True)]
        return Trial(rule, scores, first.lost())

    def _score_dense(self, rule: Rule) -> list[Scores]:
        """Scores of the merged updates before their rank is cut, one by one."""
        merged = rule.merge(self.updates)
        expert = self.find(str(self.experts[0].folder)).without_adapter()
        scores = []
        for index, labels in enumerate(self.labels):
            update = partial(dense_update, merged, rule.merge_lambda, index)
            with added(self.runner.load(expert.base), update, self.updates.modules):
                scores.append(self._score(expert, labels))
        return scores

    def _score(self, expert: Expert, labels: Sequence[str]) -> Scores:
        """Scores of an expert on some of the data sets."""
        asked = {name: self.prompts[name] for name in labels}
        questions = {
            name: Questions(Path(), prompts.ids, prompts.lengths, self.generation.max_new_tokens)
            for name, prompts in asked.items()
        }
        answerer = ExpertAnswerer(expert, self.runner, self.generation)
        scores = {}
        for name, batches in answerer.answer(questions, {name: range(len(p.ids)) for name, p in asked.items()}):
            bar = tqdm(batches, f"scoring {name}", unit="batch", leave=False)
            answers = {answer.index: answer.text for batch in bar for answer in batch}
            texts = [answers[index] for index in range(len(answers))]
            record = metric_record(self.sets[name].metric, texts, asked[name].references)
            scores[name] = {**record, "examples": len(texts), "sha256": self.sets[name].sha256}
        return scores

    def _write(self, folder: Path, index: int, rule: Rule, seconds: float = 0.0, **parts: Any) -> Path:
        """Write one of the adapters that a rule merges, with all that is known of it."""
        result = self.merged(without_lambda(rule))[0][index]
        record = make_record(
            "merge",
            self.flags.method,
            self.base_model,
            cost_record(seconds),
            seed=vars(rule).get("seed"),
            control=control_of(*self.experts),
            adapters=[adapter_record(e, weight=w) for e, w in zip(self.experts, self.updates.weights, strict=True)],
            hyperparameters=rule.hyperparameters(),
            task=[*self.folders][index] if self.per_task else None,
            needs_task_id=self.per_task,
            truncation=result.truncation() | {"dtype": str(self.dtype).removeprefix("torch.")},
            **parts,
        )
        return write_adapter(
            folder,
            result.state_dict(rule.merge_lambda, self.dtype),
            result.config(self.base_model, self.layers),
            record,
            about=_about(record),
            remedy="give --dtype float32, or a lower --merge_lambda",
            tokenizer=self.experts[0].folder,
        )

    def _report(self, results: Sequence[LowRank], best: Trial, dense: Trial, search: dict[str, Any] | None) -> str:
        blocks = []
        if search:
            rows = []
            for index, tried in enumerate(search["candidates"]):
                values = {name: f"{value:g}" for name, value in tried["hyperparameters"].items()}
                told = {"mean": tried["mean"], "energy lost": tried["truncation"]}
                rows.append({**values, **tried["scores"], **told, "": "chosen" if index == search["chosen"] else ""})
            blocks += [_table(rows), f"{search['validation_runs']} validation runs in {search['seconds']:.1f} s"]
        if self.per_task:
            blocks.append(f"{self.flags.method} needs the task at inference: one adapter per expert, by their names.")
        for name, result in zip(self.folders, results, strict=True):
            blocks.append((f"{name}: " if self.per_task else "") + truncation_text(result.truncation()))
        scored = {"adapter as written": best, "dense update": dense}
        if rows := [{"": name, **trial.row(), "mean": trial.mean} for name, trial in scored.items() if trial.scores]:
            blocks.append(_table(rows))
        return "\n\n".join(blocks)


def without_lambda(rule: Any) -> Any:
    """A rule with a factor of 1, if it has one."""
    return replace(rule, merge_lambda=1.0) if "merge_lambda" in vars(rule) else rule


def dense_update(merged: Merged, factor: float, index: int, path: str) -> Tensor:
    """A merged update of a module as one matrix, `factor` applied."""
    update = merged(path)[index]
    return update.mul(factor) if isinstance(update, Tensor) else (update[1] @ update[0]).mul_(factor)


def check_experts(experts: Sequence[LoraAdapter], base: nn.Module) -> None:
    """Refuse adapters that are not several LoRA experts of the given base (on the meta device)."""
    for other, expert in itertools.combinations(experts, 2):
        if other.sha256 == expert.sha256:
            raise UserError(
                f"{other.name} and {expert.name} have the same weights; give one, and --weights to count it more"
            )
        bases = [PureWindowsPath((e.base_model or "").rstrip("/\\")).name.lower() for e in (other, expert)]
        if all(bases) and bases[0] != bases[1]:  # the same model may be known by its Hub id and by a folder
            raise UserError(
                f"adapter {other.name} was trained on {other.base_model}, {expert.name} on {expert.base_model}: "
                f"{_FUSE}. If both are the same model, give both the same base_model_name_or_path"
            )
    for expert in experts:
        if expert.extra_tensors:
            raise UserError(
                f"adapter {expert.name} holds {min(expert.extra_tensors)} besides LoRA (modules_to_save, embeddings), "
                "which no method here merges; train it without"
            )
        try:
            check_base_fits(base, expert)
        except AdapterError as error:
            raise UserError(f"--adapters {expert.name}: {error}; {_FUSE}") from error


def export_dtype(experts: Sequence[LoraAdapter], wanted: str | None) -> torch.dtype:
    """Dtype of the written weights: as asked for, else the experts' own, float32 where they differ."""
    if wanted is not None:
        return getattr(torch, wanted)
    found = {tensor.dtype for expert in experts for m in expert.modules.values() for tensor in (m.lora_A, m.lora_B)}
    return found.pop() if len(found) == 1 and found < {torch.bfloat16, torch.float16} else torch.float32


def _about(record: Mapping[str, Any]) -> str:
    """What the card says of a merge."""
    values = {**record["hyperparameters"], "seed": record["made_by"]["seed"]}
    settings = "".join(f", {name} {value:g}" for name, value in values.items() if value is not None)
    count, base = len(record["adapters"]), record["base_model"] or "one base model"
    text = f"{count} LoRA experts of `{base}`, merged by `{record['made_by']['method']}`{settings}. "
    if record["task"] is not None:
        text += (
            f"\n\n**The task must be known at inference:** this is one of {count} adapters, the one for the task of "
            f"`{record['task']}`; the right one has to be chosen for every input.\n\n"
        )
    text += truncation_text(record["truncation"])
    return text + (
        " The hyper-parameters were chosen by the mean of the scores below." if record.get("search") else ""
    )


def truncation_text(told: Mapping[str, Any]) -> str:
    """One sentence on what was lost when the merged update was cut to its rank."""
    if told["exact"]:
        return f"Rank up to {told['rank']}: exact but for the rounding of the weights."
    return (
        f"Cut to rank {told['rank']} at most by SVD: {told['overall']:.2%} of the merged update's energy (squared "
        f"norm) is lost, {told['max']:.2%} in the module that loses most ({told['max_module']})."
    )


def _table(rows: Sequence[dict[str, Any]]) -> str:
    return markdown_table([*rows[0]], [[*row.values()] for row in rows])
