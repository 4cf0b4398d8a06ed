"""A merge of experts: all checks first, then the merge, the search of its hyper-parameters by score, what is told."""

import itertools
import logging
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from heterofusion.adapters.lora import AdapterError, LoraAdapter, check_base_fits, load_adapter
from heterofusion.data.markdown import markdown_table
from heterofusion.evaluation.datasets import check_file_names
from heterofusion.evaluation.results import mean_score
from heterofusion.experts.generation import GenerationArguments
from heterofusion.merging.config import MergeArguments, MergeDataArguments, search_candidates
from heterofusion.merging.export import LowRank, linear_layers, low_rank
from heterofusion.merging.rules import RULES, Merged, Rule
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


@dataclass
class Candidate:
    """A rule that was tried: what it merged, in how many seconds, and the scores of each adapter."""

    index: int
    rule: Rule
    results: list[LowRank]
    seconds: float
    scores: list[Scores] = field(default_factory=list)

    @property
    def together(self) -> Scores:
        """The scores of all its adapters, by data set."""
        return {label: record for scores in self.scores for label, record in scores.items()}

    def record(self) -> dict[str, Any]:
        """What a search tells of it."""
        return {
            "hyperparameters": self.rule.hyperparameters(),
            "scores": _primary(self.together),
            "mean": mean_score(self.together),
            "truncation": self.results[0].truncation()["overall"],
        }


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
        check_experts(self.experts)
        self.folders = self._folders()
        base = flags.base(use_cpu=device.type == "cpu")
        skeleton = base_skeleton(base, flags.trust_remote_code)
        check_experts_fit(skeleton, self.experts)
        self.layers = linear_layers(skeleton)
        self.dtype = export_dtype(self.experts, flags.dtype)
        self.base_model = display_name(self.experts[0].base_model or flags.model_name_or_path)
        self.scorer = Scorer(base, data, generation, self.experts[0].folder, device) if self.labels else None
        self.updates = Updates(self.experts, flags.weights, device)

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
        if self.scorer is not None:
            self.scorer.load()  # nothing is written before the last thing that may be wrong
        with tempfile.TemporaryDirectory() as trials:
            best, search = self._best(Path(trials))
        dense = self._score_dense(best.rule)
        for index, folder in enumerate(self.folders.values()):
            validation = None
            if best.scores:
                own = {"adapter": best.scores[index], "mean": mean_score(best.scores[index])}
                told = {"dense": dense[index], "dense_mean": mean_score(dense[index])} if dense else {}
                validation = {"dense": None, "dense_mean": None, **own, **told}
            self._write(folder, best, index, search=search, validation=validation)
        logger.info("%s written to %s", "adapters" if self.per_task else "adapter", self.folder)
        return self._report(best, dense, search)

    def _best(self, trials: Path) -> tuple[Candidate, dict[str, Any] | None]:
        """Merge every candidate, and score it as it would be written; gives the best, of equals the first."""

        @lru_cache(maxsize=1)
        def merged(rule: Rule) -> list[LowRank]:
            return low_rank(rule.merge(self.updates), self.updates, self.flags.rank)

        start, tried = time.perf_counter(), []
        best: Candidate | None = None
        # those that differ in lambda alone follow each other: one merge serves them all
        units = [without_lambda(rule) for rule in self.candidates]
        order = sorted(range(len(units)), key=lambda index: units.index(units[index]))
        for index in tqdm(order, desc="search", unit="merge", disable=len(order) == 1):
            begun = time.perf_counter()
            results = merged(units[index])
            candidate = Candidate(index, self.candidates[index], results, time.perf_counter() - begun)
            if self.scorer is not None:
                for number, labels in enumerate(self.labels):
                    folder = self._write(trials / str(number), candidate, number)
                    candidate.scores.append(self.scorer.adapter(folder, labels))
                tried.append((index, candidate.record()))
            if best is None or _order(candidate) > _order(best):
                best = candidate
        assert best is not None
        if not self.flags.search:
            return best, None
        best.seconds = time.perf_counter() - start
        return best, {
            "candidates": [record for _, record in sorted(tried, key=lambda item: item[0])],
            "chosen": best.index,
            "validation_runs": len(tried),
            "seconds": round(best.seconds, 3),
        }

    def _score_dense(self, rule: Rule) -> list[Scores]:
        """Scores of the merged updates before their rank is cut, one by one; none if they are not asked for."""
        if self.scorer is None or not self.flags.dense:
            return []
        updates = [
            partial(dense_update, rule.merge(self.updates), rule.merge_lambda, i) for i in range(len(self.labels))
        ]
        return [
            self.scorer.dense(update, self.updates.modules, labels)
            for update, labels in zip(updates, self.labels, strict=True)
        ]

    def _write(self, folder: Path, candidate: Candidate, index: int, **parts: Any) -> Path:
        """Write one adapter of a candidate, with all that is known of it."""
        result, rule = candidate.results[index], candidate.rule
        scores = _primary(candidate.scores[index]) if len(candidate.scores) > index else {}
        record = make_record(
            "merge",
            self.flags.method,
            self.base_model,
            cost_record(candidate.seconds),
            seed=vars(rule).get("seed"),
            control=control_of(*self.experts),
            adapters=[adapter_record(e, weight=w) for e, w in zip(self.experts, self.updates.weights, strict=True)],
            hyperparameters=rule.hyperparameters(),
            task=[*self.folders][index] if self.per_task else None,
            needs_task_id=self.per_task,
            truncation=result.truncation() | {"dtype": str(self.dtype).removeprefix("torch.")},
            metrics={f"eval_{label}": score for label, score in scores.items()},
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

    def _report(self, best: Candidate, dense: Sequence[Scores], search: dict[str, Any] | None) -> str:
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
        for name, result in zip(self.folders, best.results, strict=True):
            blocks.append((f"{name}: " if self.per_task else "") + truncation_text(result.truncation()))
        if best.scores:
            scored = {"adapter as written": best, "dense update": replace(best, scores=[*dense])}
            rows = [
                {"": name, **_primary(candidate.together), "mean": mean_score(candidate.together)}
                for name, candidate in scored.items()
                if candidate.scores
            ]
            blocks.append(_table(rows))
        return "\n\n".join(blocks)


def _order(candidate: Candidate) -> tuple[float, int]:
    """The higher the better; of equals the first."""
    return mean_score(candidate.together), -candidate.index


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
                f"adapters {other.name} and {expert.name} have the same weights; give each once, and --weights to "
                "count it more"
            )
        bases = [PureWindowsPath((e.base_model or "").rstrip("/\\")).name.lower() for e in (other, expert)]
        if all(bases) and bases[0] != bases[1]:  # the same model may be known by its Hub id and by a folder
            raise UserError(
                f"adapter {other.name} was trained on {other.base_model}, {expert.name} on {expert.base_model}: "
                f"{_FUSE}. If both are the same model, give both the same base_model_name_or_path"
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


# ---- what is told -----------------------------------------------------------------------------------------------


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


def truncation_text(truncation: Mapping[str, Any]) -> str:
    """One sentence on what was lost when the merged update was cut to its rank."""
    if truncation["exact"]:
        return f"Rank up to {truncation['rank']}: exact but for the rounding of the weights."
    return (
        f"Cut to rank {truncation['rank']} at most by SVD: {truncation['overall']:.2%} of the merged update's energy "
        f"(squared norm) is lost, {truncation['max']:.2%} in the module that loses most ({truncation['max_module']})."
    )


def _primary(scores: Scores) -> dict[str, float]:
    return {label: record["score"] for label, record in scores.items()}


def _table(rows: Sequence[dict[str, Any]]) -> str:
    return markdown_table([*rows[0]], [[*row.values()] for row in rows])
