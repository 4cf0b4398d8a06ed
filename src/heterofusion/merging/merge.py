"""A merge of experts: all checks first, then the merge, the search of its hyper-parameters by score, what is told."""

import itertools
import logging
import os
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from heterofusion.adapters.lora import AdapterError, LoraAdapter, check_base_fits, load_adapter
from heterofusion.data.markdown import markdown_table
from heterofusion.evaluation.datasets import is_file_name
from heterofusion.evaluation.results import mean_score
from heterofusion.experts.generation import GenerationArguments
from heterofusion.merging.config import (
    MergeArguments,
    MergeDataArguments,
    hyperparameters,
    make_rule,
    search_candidates,
)
from heterofusion.merging.export import LowRank, linear_layers, low_rank
from heterofusion.merging.rules.rule import Merged, Rule
from heterofusion.merging.scoring import Scorer, Scores
from heterofusion.merging.tau import Updates
from heterofusion.publish.record import adapter_record, control_of, make_record
from heterofusion.publish.write import write_adapter
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.files import check_output_dir, display_name
from heterofusion.runtime.loading import base_skeleton
from heterofusion.runtime.ranks import cost_record

logger = logging.getLogger(__name__)

_FUSE = "merging needs experts of one base model; recipes/train.py fuses experts of different ones"


class MergeRun:
    """A merge whose flags, adapters and data are in order; nothing is written and no base weights are loaded yet.

    Args:
        flags: the experts, the method and the output.
        values: hyper-parameters by name; None for the method's own.
        data: validation data, if any.
        generation: how answers are generated.
    """

    def __init__(
        self,
        flags: MergeArguments,
        values: Mapping[str, Any],
        data: MergeDataArguments,
        generation: GenerationArguments,
    ) -> None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError("a merge runs in one process; start it with python, or with --num_processes 1")
        self.flags = flags
        given = {name: value for name, value in values.items() if value is not None}
        self.rule = make_rule(flags.method, given)
        self.candidates = search_candidates(flags.search, flags.method, given) or [self.rule]
        self._check_data(data)
        device = _device(flags.device)
        self.folder = Path(flags.output_dir).expanduser().absolute()
        check_output_dir(str(self.folder), resuming=False, overwrite=flags.overwrite)
        self.experts = [load_adapter(name) for name in flags.adapters]
        check_experts(self.experts)
        self.folders = self._folders()
        base = flags.base(use_cpu=device.type == "cpu")
        skeleton = base_skeleton(base, flags.trust_remote_code)
        check_experts_fit(skeleton, self.experts)
        self.layers = linear_layers(skeleton)
        self.dtype = export_dtype(self.experts, flags.dtype)
        self.base_model = display_name(self.experts[0].base_model or flags.model_name_or_path)
        self.scorer: Scorer | None = None
        if data.dataset_name:
            self.scorer = Scorer(base, data, generation, self.experts[0].folder, device)
        self.updates = Updates(self.experts, flags.weights, device)

    def _check_data(self, data: MergeDataArguments) -> None:
        sets, experts = len(data.dataset_name), len(self.flags.adapters)
        for flag in ("search", "dense"):
            if getattr(self.flags, flag) and not sets:
                raise UserError(f"--{flag} needs validation data to score on: give --dataset_name")
        if self.rule.per_task and sets not in (0, experts):
            raise UserError(
                f"--dataset_name has {sets} data sets, but --adapters has {experts}: with {self.flags.method} each "
                "expert's adapter answers its own, in the same order"
            )

    def _folders(self) -> dict[str, Path]:
        """Where adapters go, by the task that they are for; one by the name of the method, if it is for all."""
        folders = {self.flags.method: self.folder}
        if self.rule.per_task:
            names = self.flags.names or [display_name(e.name.rstrip("/")).rpartition("/")[2] for e in self.experts]
            folders = {name: self.folder / name for name in names}
            if len(folders) < len(names) or not all(map(is_file_name, names)):
                raise UserError(
                    f"{', '.join(map(repr, names))} cannot name the folders of the adapters; give --names, one per "
                    "expert, all different, of letters, digits and . _ + = -"
                )
        for folder in folders.values():
            for expert in self.experts:
                if folder.resolve() == expert.folder.resolve():
                    raise UserError(f"--output_dir {folder} is the folder of adapter {expert.name}; name another")
        return folders

    # ---- the work ----

    def run(self) -> str:
        """Merge, search, score and write; gives what the user is told: truncation, scores, the table of a search."""
        if self.scorer is not None:
            self.scorer.load()  # nothing is written before the last thing that may be wrong
        with tempfile.TemporaryDirectory() as trials:
            best, search = self._best(Path(trials))
        dense = self._score_dense(best.rule)
        for index, folder in enumerate(self.folders.values()):
            self._write(folder, best, index, search=search, validation=_validation(best, index, dense[index]))
        logger.info("%s written to %s", "adapters" if self.rule.per_task else "adapter", self.folder)
        return self._report(best, dense, search)

    def _best(self, trials: Path) -> tuple["Candidate", dict[str, Any] | None]:
        """Merge every candidate, and score it as it would be written; gives the best, of equals the first."""
        start, found = time.perf_counter(), {}
        best: Candidate | None = None
        last: tuple[Rule, list[LowRank]] | None = None
        # those that differ in lambda alone follow each other: one merge serves them all
        units = [without_lambda(rule) for rule in self.candidates]
        order = sorted(range(len(units)), key=lambda index: units.index(units[index]))
        for index in tqdm(order, desc="search", unit="merge", disable=len(order) == 1):
            begun = time.perf_counter()
            if last is None or last[0] != units[index]:
                last = units[index], low_rank(units[index].merge(self.updates), self.updates, self.flags.rank)
            candidate = Candidate(index, self.candidates[index], last[1], time.perf_counter() - begun)
            if self.scorer is not None:
                folders = [self._write(trials / str(number), candidate, number) for number in range(len(self.folders))]
                candidate.scores = [self.scorer.adapter(folder, self._labels(i)) for i, folder in enumerate(folders)]
                found[index] = candidate.record()
            if best is None or (found[index]["mean"], -index) > (found[best.index]["mean"], -best.index):
                best = candidate
        assert best is not None
        if not self.flags.search:
            return best, None
        best.seconds = time.perf_counter() - start
        return best, {
            "candidates": [found[index] for index in range(len(found))],
            "chosen": best.index,
            "validation_runs": len(found),
            "seconds": round(best.seconds, 3),
        }

    def _labels(self, index: int) -> list[str] | None:
        """The data sets of an adapter; all, unless each has its own."""
        return [[*self.scorer.sets][index]] if self.scorer and self.rule.per_task else None

    def _score_dense(self, rule: Rule) -> list[Scores | None]:
        """Scores of the merged updates before their rank is cut, one by one."""
        if self.scorer is None or not self.flags.dense:
            return [None for _ in self.folders]
        merged = rule.merge(self.updates)
        updates = [partial(dense_update, merged, rule.merge_lambda, index) for index in range(len(self.folders))]
        return [self.scorer.dense(update, self.updates.modules, self._labels(i)) for i, update in enumerate(updates)]

    def _write(self, folder: Path, candidate: "Candidate", index: int, **parts: Any) -> Path:
        """Write one adapter of a candidate, with all that is known of it."""
        result, rule = candidate.results[index], candidate.rule
        record = make_record(
            "merge",
            self.flags.method,
            self.base_model,
            cost_record(candidate.seconds),
            seed=vars(rule).get("seed"),
            control=control_of(*self.experts),
            adapters=[adapter_record(e, weight=w) for e, w in zip(self.experts, self.updates.weights, strict=True)],
            hyperparameters=hyperparameters(rule),
            task=[*self.folders][index] if self.rule.per_task else None,
            needs_task_id=self.rule.per_task,
            truncation=result.truncation() | {"dtype": str(self.dtype).removeprefix("torch.")},
            metrics={f"eval_{k}": score for k, score in _primary(candidate.scores[index : index + 1]).items()},
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

    def _report(self, best: "Candidate", dense: Sequence[Scores | None], search: dict[str, Any] | None) -> str:
        blocks = []
        if search:
            rows = []
            for index, tried in enumerate(search["candidates"]):
                values = {name: f"{value:g}" for name, value in tried["hyperparameters"].items()}
                told = {"mean": tried["mean"], "energy lost": tried["truncation"]}
                rows.append({**values, **tried["scores"], **told, "": "chosen" if index == search["chosen"] else ""})
            blocks += [_table(rows), f"{search['validation_runs']} validation runs in {search['seconds']:.1f} s"]
        if self.rule.per_task:
            blocks.append(f"{self.flags.method} needs the task at inference: one adapter per expert, by their names.")
        for name, result in zip(self.folders, best.results, strict=True):
            blocks.append((f"{name}: " if self.rule.per_task else "") + truncation_text(result.truncation()))
        if best.scores:
            rows = [{"": "adapter as written", **_primary(best.scores), "mean": mean_score(_together(best.scores))}]
            if found := [scores for scores in dense if scores]:
                rows.append({"": "dense update", **_primary(found), "mean": mean_score(_together(found))})
            blocks.append(_table(rows))
        return "\n\n".join(blocks)


@dataclass
class Candidate:
    """A rule that was tried: what it merged, in how many seconds, and the scores of each adapter."""

    index: int
    rule: Rule
    results: list[LowRank]
    seconds: float
    scores: list[Scores] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """What a search tells of it."""
        return {
            "hyperparameters": hyperparameters(self.rule),
            "scores": _primary(self.scores),
            "mean": mean_score(_together(self.scores)),
            "truncation": self.results[0].truncation()["overall"],
        }


def without_lambda(rule: Any) -> Any:
    """A rule with a factor of 1, if it has one."""
    return replace(rule, merge_lambda=1.0) if "merge_lambda" in vars(rule) else rule


def dense_update(merged: Merged, factor: float, index: int, path: str) -> Tensor:
    """A merged update of a module as one matrix, `factor` applied."""
    update = merged(path)[index]
    return update.mul(factor) if isinstance(update, Tensor) else (update[1] @ update[0]).mul_(factor)


# ---- checks -----------------------------------------------------------------------------------------------------


def check_experts(experts: Sequence[LoraAdapter]) -> None:
    """Refuse adapters that are not several LoRA experts of one base."""
    for expert in experts:
        if expert.extra_tensors:
            raise UserError(
                f"adapter {expert.name} holds {min(expert.extra_tensors)} besides LoRA (modules_to_save, embeddings), "
                "which no method here merges; train it without, or remove those tensors and modules_to_save"
            )
    for other, expert in itertools.combinations(experts, 2):
        if other.sha256 == expert.sha256:
            raise UserError(
                f"adapters {other.name} and {expert.name} have the same weights (sha256 {expert.sha256[:12]}); "
                "give each once, and --weights to count it more"
            )
        bases = [PureWindowsPath((e.base_model or "").rstrip("/\\")).name.lower() for e in (other, expert)]
        if all(bases) and bases[0] != bases[1]:  # the same model may be known by its Hub id and by a folder
            raise UserError(
                f"adapter {other.name} was trained on {other.base_model}, {expert.name} on {expert.base_model}: "
                f"{_FUSE}. If both are the same model, give both the same base_model_name_or_path in their "
                "adapter_config.json"
            )


def check_experts_fit(base: nn.Module, experts: Sequence[LoraAdapter]) -> None:
    """Refuse experts that are not of the given base (on the meta device)."""
    for expert in experts:
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


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no GPU here; give cpu, or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


# ---- what is told -----------------------------------------------------------------------------------------------


def _about(record: Mapping[str, Any]) -> str:
    """What the card says of a merge."""
    values = {**record["hyperparameters"], "seed": record["made_by"]["seed"]}
    settings = "".join(f", {name} {value:g}" for name, value in values.items() if value is not None)
    base, method = record["base_model"] or "one base model", record["made_by"]["method"]
    text = f"{len(record['adapters'])} LoRA experts of `{base}`, merged by `{method}`{settings}. "
    if record["task"] is not None:
        text += (
            f"\n\n**The task must be known at inference:** this is one of {len(record['adapters'])} adapters, the one "
            f"for the task of `{record['task']}`; the right one has to be chosen for every input.\n\n"
        )
    text += truncation_text(record["truncation"])
    return text + (
        " The hyper-parameters were chosen by the mean of the scores below." if record.get("search") else ""
    )


def truncation_text(truncation: Mapping[str, Any]) -> str:
    """One sentence on what was lost when the merged update was cut to its rank."""
    rank = truncation["rank"]
    if truncation["exact"]:
        return f"Rank up to {rank}: exact but for the rounding of the weights."
    return (
        f"Cut to rank {rank} at most by SVD: {truncation['overall']:.2%} of the merged update's energy (squared norm) "
        f"is lost, {truncation['max']:.2%} in the module that loses most ({truncation['max_module']})."
    )


def _validation(best: Candidate, index: int, dense: Scores | None) -> dict[str, Any] | None:
    if not best.scores:
        return None
    mean, dense_mean = mean_score(best.scores[index]), None if dense is None else mean_score(dense)
    return {"adapter": best.scores[index], "mean": mean, "dense": dense, "dense_mean": dense_mean}


def _together(scores: Iterable[Scores]) -> Scores:
    return {label: record for part in scores for label, record in part.items()}


def _primary(scores: Iterable[Scores]) -> dict[str, float]:
    return {label: record["score"] for label, record in _together(scores).items()}


def _table(rows: Sequence[dict[str, Any]]) -> str:
    return markdown_table([*rows[0]], [[*row.values()] for row in rows])
