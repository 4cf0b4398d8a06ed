"""A merge of experts: all checks first, then the merge, the search of its hyper-parameters by score, what is told."""

import itertools
import logging
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from heterofusion.adapters.lora import AdapterError, LoraAdapter, check_base_fits, load_adapter
from heterofusion.data.markdown import markdown_table
from heterofusion.evaluation.datasets import EvalSet, check_file_names, check_references, load_eval_sets
from heterofusion.evaluation.results import mean_score, metric_record
from heterofusion.experts.examples import Prompts
from heterofusion.experts.expert import BaseArguments, Expert, ExpertRunner, find_expert
from heterofusion.experts.generation import AnswerGenerator, GenerationArguments
from heterofusion.merging.config import MergeArguments, MergeDataArguments, search_candidates
from heterofusion.merging.export import LowRank, added, low_rank, merged_update
from heterofusion.merging.rules import RULES
from heterofusion.merging.rules.rule import Rule
from heterofusion.merging.tau import Updates
from heterofusion.publish.record import adapter_record, control_of, make_record
from heterofusion.publish.write import write_adapter
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.files import check_output_dir, display_name
from heterofusion.runtime.loading import base_skeleton, load_tokenizer
from heterofusion.runtime.ranks import cost_record

logger = logging.getLogger(__name__)

Scores = dict[str, dict[str, Any]]  # the record of every data set, by label

_FUSE = "merging needs experts of one base model; recipes/train.py fuses experts of different ones"


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
        self.flags, self.generation, self.per_task = flags, generation, RULES[flags.method].per_task
        if self.per_task and data.dataset_name:
            raise UserError(f"--dataset_name: adapters of {flags.method} need the task; score them by recipes/eval.py")
        given = {name: value for name, value in values.items() if value is not None}
        self.candidates = search_candidates(flags.search, flags.method, given)
        self.folder = Path(flags.output_dir).expanduser().absolute()
        check_output_dir(str(self.folder), resuming=False, overwrite=flags.overwrite, resume_flag=None)
        self.experts = [load_adapter(name) for name in flags.adapters]
        self.folders = self._folders()
        device = torch.device("cuda" if flags.device != "cpu" and torch.cuda.is_available() else "cpu")
        base = BaseArguments(
            model_name_or_path=flags.model_name_or_path,
            model_revision=flags.model_revision,
            dtype=flags.base_dtype,
            trust_remote_code=flags.trust_remote_code,
            use_cpu=device.type == "cpu",
        )
        skeleton = base_skeleton(base, flags.trust_remote_code)
        check_experts(self.experts, skeleton)
        self.modules = [path for path, _ in skeleton.named_modules()]
        self.tokenizer = load_tokenizer(base, self.experts[0].folder, flags.trust_remote_code)
        self.dtype = export_dtype(self.experts, flags.dtype)
        self.base_model = display_name(self.experts[0].base_model or flags.model_name_or_path)
        self.updates = Updates(self.experts, flags.weights, device)
        self.merged = lru_cache(maxsize=1)(self._merge)
        self.find, self.runner = partial(find_expert, base, generation=generation), ExpertRunner(device)
        self.questions: list[tuple[EvalSet, Prompts]] = []
        for examples in load_eval_sets(data) if data.dataset_name else []:
            prompts = self.find(str(self.experts[0].folder)).encode(examples)
            check_references(examples, prompts)
            if prompts.cut:
                logger.warning("%d prompts of %s were cut on the left, they are too long", prompts.cut, examples.label)
            self.questions.append((examples, prompts))

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
        tried: list[dict[str, Any]] = []
        scores: list[Scores] = []  # of each one that was tried
        with tempfile.TemporaryDirectory() as place:
            candidates = self.candidates if self.questions else []
            for rule in tqdm(candidates, "search", unit="merge", disable=len(candidates) < 2):
                found = self._score(self.find(str(self._write(Path(place), 0, rule))))  # as it would be written
                values, lost = rule.hyperparameters(), self.merged(rule)[0][0].lost
                told = {"scores": flat(found), "mean": mean_score(found), "lost": lost}
                tried.append({"hyperparameters": values, **told})
                scores.append(found)
        best = max(range(len(tried)), key=lambda index: tried[index]["mean"], default=0)  # of equals the first
        rule = self.candidates[best]
        results, seconds = self.merged(rule)
        blocks = [f"{name}: {truncation_text(one)}" for name, one in zip(self.folders, results, strict=True)]
        parts: dict[str, Any] = {}
        if self.flags.search:
            seconds = time.perf_counter() - start
            parts["search"] = {"candidates": tried, "chosen": best, "seconds": round(seconds, 3)}
            blocks.insert(0, search_table(tried, best))
        if self.questions:
            parts["metrics"] = {f"eval_{label}": score for label, score in flat(scores[best]).items()}
            validation = {"adapter": scores[best]} | ({"dense": self._score_dense(rule)} if self.flags.dense else {})
            parts["validation"] = validation
            rows = [{"": name, **flat(found), "mean": mean_score(found)} for name, found in validation.items()]
            blocks.append(_table(rows))
        if self.per_task:
            blocks.append(f"{self.flags.method} needs the task at inference: one adapter per expert, by their names.")
        for index, folder in enumerate(self.folders.values()):
            self._write(folder, index, rule, seconds, **parts)
        logger.info("%s written to %s", "adapters" if self.per_task else "adapter", self.folder)
        return "\n\n".join(blocks)

    def _merge(self, rule: Rule) -> tuple[list[LowRank], float]:
        """What a rule merges, and in how many seconds."""
        start = time.perf_counter()
        return low_rank(rule.merge(self.updates), self.updates, self.flags.rank), time.perf_counter() - start

    def _score_dense(self, rule: Rule) -> Scores:
        """Scores of the merged update before its rank is cut."""
        base = self.find(str(self.experts[0].folder)).without_adapter()
        update = partial(merged_update, rule.merge(self.updates), rule.merge_lambda)
        with added(self.runner.load(base.base), update, self.updates.modules):
            return self._score(base)

    def _score(self, expert: Expert) -> Scores:
        """Scores of an expert on the data sets."""
        scores, how = {}, self.generation
        with self.runner.running(expert) as model:
            generator = AnswerGenerator(model, expert.tokenizer, how.max_new_tokens, how.fixed_batch_size())
            for examples, prompts in self.questions:
                batches = generator.answers(dict(enumerate(prompts.ids)))
                bar = tqdm(batches, f"scoring {examples.label}", unit="batch", leave=False)
                answers = {answer.index: answer.text for batch in bar for answer in batch}
                record = metric_record(examples.metric, [answers[i] for i in range(len(answers))], prompts.references)
                scores[examples.label] = {**record, "examples": len(answers), "sha256": examples.sha256}
        return scores

    def _write(self, folder: Path, index: int, rule: Rule, seconds: float = 0.0, **parts: Any) -> Path:
        """Write one of the adapters that a rule merges, with all that is known of it."""
        result = self.merged(rule)[0][index]
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
            truncation={"rank": result.rank, "lost": result.lost, "dtype": str(self.dtype).removeprefix("torch.")},
            **parts,
        )
        return write_adapter(
            folder,
            result.state_dict(rule.merge_lambda, self.dtype),
            result.config(self.base_model, self.modules),
            record,
            about=_about(record, result),
            remedy="give --dtype float32, or a lower --merge_lambda",
            tokenizer=self.tokenizer,
        )


def flat(scores: Scores) -> dict[str, float]:
    """The score of every data set."""
    return {label: record["score"] for label, record in scores.items()}


def check_experts(experts: Sequence[LoraAdapter], base: nn.Module) -> None:
    """Refuse adapters that are not several LoRA experts of the given base (on the meta device)."""
    if len({expert.sha256 for expert in experts}) < len(experts):
        raise UserError("two of --adapters have the same weights; give each once, with --weights to count it more")
    bases = [expert.base_model for expert in experts if expert.base_model]
    # the same model may be known by its Hub id and by a folder
    if len({PureWindowsPath(name.rstrip("/\\")).name.lower() for name in bases}) > 1:
        raise UserError(
            f"--adapters were trained on {', '.join(dict.fromkeys(bases))}: {_FUSE}. If all are the same model, give "
            "all the same base_model_name_or_path"
        )
    for expert in experts:
        if expert.extra_tensors:
            raise UserError(
                f"adapter {expert.name} holds {min(expert.extra_tensors)} besides LoRA, which no method merges"
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


def _about(record: Mapping[str, Any], result: LowRank) -> str:
    """What the card of a merge tells."""
    values = {**record["hyperparameters"], "seed": record["made_by"]["seed"]}
    settings = "".join(f", {name} {value:g}" for name, value in values.items() if value is not None)
    count, base = len(record["adapters"]), record["base_model"] or "one base model"
    told = [f"{count} LoRA experts of `{base}`, merged by `{record['made_by']['method']}`{settings}."]
    if task := record["task"]:
        told.append(f"**The task must be known at inference:** this is the one of {count} adapters for `{task}`.")
    if record.get("search"):
        told.append("The hyper-parameters were chosen by the mean of the scores below.")
    return "\n\n".join([*told, truncation_text(result)])


def truncation_text(result: LowRank) -> str:
    """One sentence on what was lost when the merged update was cut to its rank."""
    if not result.lost:
        return f"Rank up to {result.rank}: exact but for the rounding of the weights."
    return f"Cut to rank {result.rank} by SVD: {result.lost:.2%} of the update's energy (squared norm) is lost."


def search_table(tried: Sequence[Mapping[str, Any]], best: int) -> str:
    """A row for each combination that was tried."""
    rows = []
    for index, one in enumerate(tried):
        values = {name: f"{value:g}" for name, value in one["hyperparameters"].items()}
        told = {"mean": one["mean"], "energy lost": one["lost"], "": "chosen" if index == best else ""}
        rows.append({**values, **one["scores"], **told})
    return _table(rows)


def _table(rows: Sequence[dict[str, Any]]) -> str:
    return markdown_table([*rows[0]], [[*row.values()] for row in rows])
