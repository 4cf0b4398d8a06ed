"""A run of the merging program: all checks first, then the merge, its search and scores, and what is written."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from heterofusion.adapters.lora import load_adapter
from heterofusion.data.markdown import markdown_table
from heterofusion.evaluation.arguments import GenerationArguments
from heterofusion.evaluation.results import mean_score
from heterofusion.merging.arguments import (
    PER_TASK,
    MergeArguments,
    MergeDataArguments,
    MergeError,
    MergeModelArguments,
    MergeOutputArguments,
    MergeScoringArguments,
    MergeSettings,
)
from heterofusion.merging.experts import (
    check_experts,
    check_experts_fit,
    check_not_an_expert,
    expert_names,
    export_dtype,
)
from heterofusion.merging.export import (
    copy_tokenizer,
    linear_layers,
    move_adapter,
    staged,
    truncation_text,
    write_adapter,
    write_record,
)
from heterofusion.merging.factors import Truncation
from heterofusion.merging.rules import MergedAdapter, Merger
from heterofusion.merging.scoring import Scorer, Scores
from heterofusion.merging.search import search_candidates
from heterofusion.publish.record import initial_control, library_versions, made_by, whole_control
from heterofusion.runtime.files import check_output_dir, display_name
from heterofusion.runtime.loading import base_skeleton
from heterofusion.runtime.ranks import cost_record

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Candidate:
    """What a search found out about one combination of hyper-parameters."""

    settings: MergeSettings
    truncation: Truncation
    scores: Scores

    @property
    def mean(self) -> float:
        return mean_score(self.scores)


class MergeRun:
    """A merge whose flags, adapters and data are in order; nothing is written and no base weights are loaded yet.

    Args:
        model: the base, and where things run.
        merge: the experts and the method.
        scoring: what is searched and scored.
        data: validation data, if any.
        generation: how answers are generated.
        output: where the result goes.

    Raises:
        ValueError: a flag, an adapter or a data set is not what it has to be, or the output folder is in use; the
            message says which and what to do.
    """

    def __init__(
        self,
        model: MergeModelArguments,
        merge: MergeArguments,
        scoring: MergeScoringArguments,
        data: MergeDataArguments,
        generation: GenerationArguments,
        output: MergeOutputArguments,
    ) -> None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise MergeError("a merge runs in one process; start it with python, or with --num_processes 1")
        self.model, self.scoring, self.merge = model, scoring, merge
        self.settings = merge.settings()
        self.device = _device(model.device)
        self.folder = Path(output.output_dir).expanduser().absolute()
        self._check_scoring(data)
        self.candidates = search_candidates(scoring.search, self.settings, merge.given())
        check_output_dir(str(self.folder), resuming=False, overwrite=output.overwrite)
        self.experts = [load_adapter(name) for name in merge.adapters]
        check_experts(self.experts)
        self.control = initial_control(*self.experts)
        self.names = expert_names(self.experts, output.names, merge.method)
        for folder in self._folders():
            check_not_an_expert(folder, self.experts)
        eval_model = model.eval_arguments(use_cpu=self.device.type == "cpu")
        skeleton = base_skeleton(eval_model, model.trust_remote_code)
        check_experts_fit(skeleton, self.experts)
        self.layers = linear_layers(skeleton)
        self.dtype = export_dtype(self.experts, output.dtype)
        self.base_model = display_name(self.experts[0].base_model or model.model_name_or_path)
        self.scorer: Scorer | None = None
        if data.dataset_name:
            first = self.experts[0]
            self.scorer = Scorer(eval_model, data, generation, first, skeleton.config, self.device)
        self.merger = Merger(self.experts, self.device)
        self.search_record: dict[str, Any] | None = None

    def _check_scoring(self, data: MergeDataArguments) -> None:
        if not data.dataset_name:
            for flag, value in (("search", self.scoring.search), ("dense", self.scoring.dense)):
                if value:
                    raise MergeError(f"--{flag} needs validation data to score on: give --dataset_name")
        elif self.merge.method == PER_TASK and len(data.dataset_name) != len(self.merge.adapters):
            raise MergeError(
                f"--dataset_name has {len(data.dataset_name)} data sets, but --adapters has "
                f"{len(self.merge.adapters)}: with {PER_TASK} each expert's adapter answers its own, in the same order"
            )

    def _folders(self) -> list[Path]:
        if self.merge.method != PER_TASK:
            return [self.folder]
        return [self.folder / name for name in self.names]

    # ---- the work ----

    def run(self) -> str:
        """Merge, search, score and write.

        Returns:
            What the user is told: truncation, scores, and the table of a search.

        Raises:
            ValueError: the base cannot be loaded, or a merge cannot be written in the dtype.
            OSError: a file cannot be written.
        """
        if self.scorer is not None:
            self.scorer.load()  # nothing is written before the last thing that may be wrong
        with staged(self.folder) as staging:
            parts = [staging / str(index) for index in range(len(self._folders()))]
            start = time.perf_counter()
            if self.candidates:
                chosen = self._search(staging, parts[0])
                settings, truncations, scores = chosen.settings, [chosen.truncation], [chosen.scores]
                seconds = time.perf_counter() - start
            else:
                settings, merged = self.settings, self.merger.merge(self.settings, self.merge.rank)
                for result, part in zip(merged, parts, strict=True):
                    self._write(result, settings, part)
                truncations = [result.truncation for result in merged]
                seconds = time.perf_counter() - start
                scores = self._score(parts)
            dense = self._score_dense(settings)
            cost = cost_record(seconds)
            records = []
            for index, part in enumerate(parts):
                copy_tokenizer(self.experts[0].folder, part)
                validation = _validation(scores[index], dense[index]) if scores else None
                records.append(self._record(index, settings, truncations[index], validation, cost))
                write_record(part, records[-1])
            for part, folder in zip(parts, self._folders(), strict=True):
                move_adapter(part, folder)
        logger.info("%s written to %s", "adapters" if len(parts) > 1 else "adapter", self.folder)
        return self._report(records)

    def _write(self, merged: MergedAdapter, settings: MergeSettings, folder: Path) -> None:
        write_adapter(folder, merged.factors, settings.merge_lambda, self.dtype, self.base_model, self.layers)

    def _labels(self, index: int) -> list[str] | None:
        """The data sets of an adapter: of `emr`, each has its own."""
        assert self.scorer is not None
        return [list(self.scorer.sets)[index]] if self.merge.method == PER_TASK else None

    def _score(self, parts: Sequence[Path]) -> list[Scores]:
        if self.scorer is None:
            return []
        return [self.scorer.adapter(part, self._labels(index)) for index, part in enumerate(parts)]

    def _score_dense(self, settings: MergeSettings) -> list[Scores | None]:
        updates: list[Callable[[str], Tensor]] = self.merger.dense(settings) if self.scoring.dense else []
        if self.scorer is None or not updates:
            return [None] * len(self._folders())
        paths = list(self.merger.modules)
        return [self.scorer.dense(update, paths, self._labels(index)) for index, update in enumerate(updates)]

    def _search(self, staging: Path, kept: Path) -> _Candidate:
        """Merge and score every candidate; the adapter of the best, the first of equals, is left in `kept`."""
        assert self.scorer is not None
        start = time.perf_counter()
        found: dict[int, _Candidate] = {}
        best: int | None = None
        merged_of: tuple[MergeSettings, MergedAdapter] | None = None
        # those that differ in lambda alone follow each other: one merge serves them all
        units = [settings.without_lambda() for settings in self.candidates]
        order = sorted(range(len(units)), key=lambda index: units.index(units[index]))
        for index in tqdm(order, desc="search", unit="merge"):
            settings = self.candidates[index]
            if merged_of is None or merged_of[0] != units[index]:
                merged_of = units[index], self.merger.merge(units[index], self.merge.rank)[0]
            trial = staging / "candidate"
            self._write(merged_of[1], settings, trial)
            found[index] = _Candidate(settings, merged_of[1].truncation, self.scorer.adapter(trial))
            if best is None or (found[index].mean, -index) > (found[best].mean, -best):
                best = index
                shutil.rmtree(kept, ignore_errors=True)
                trial.rename(kept)
        assert best is not None
        self.search_record = {
            "candidates": [_candidate_record(found[index]) for index in range(len(found))],
            "chosen": best,
            "validation_runs": len(found),
            "seconds": round(time.perf_counter() - start, 3),
        }
        return found[best]

    # ---- what is told ----

    def _record(
        self,
        index: int,
        settings: MergeSettings,
        truncation: Truncation,
        validation: dict[str, Any] | None,
        cost: dict[str, Any],
    ) -> dict[str, Any]:
        return {
            "base_model": self.base_model,
            "adapters": [
                {
                    "name": display_name(expert.name.rstrip("/")),
                    "base_model": display_name(expert.base_model or ""),
                    "sha256": expert.sha256,
                    "weight": weight,
                }
                for expert, weight in zip(self.experts, settings.weights, strict=True)
            ],
            "method": settings.method,
            "hyperparameters": settings.hyperparameters,
            "task": self.names[index] if self.merge.method == PER_TASK else None,
            "needs_task_id": self.merge.method == PER_TASK,
            "truncation": {**truncation.to_dict(), "dtype": str(self.dtype).removeprefix("torch.")},
            "validation": validation,
            "search": self.search_record,
            "made_by": made_by(
                "merge",
                settings.method,
                cost,
                seed=settings.seed,
                source_control=whole_control(None, None, self.control),
            ),
            "initial_control": self.control,
            "versions": library_versions(),
        }

    def _report(self, records: Sequence[dict[str, Any]]) -> str:
        blocks = []
        if self.search_record is not None:
            blocks.append(_search_table(self.search_record))
        if self.merge.method == PER_TASK:
            blocks.append(
                f"{PER_TASK} needs the task at inference: one adapter per expert, in folders of their names."
            )
        for record in records:
            prefix = f"{record['task']}: " if record["task"] else ""
            blocks.append(prefix + truncation_text(record["truncation"]))
        if self.scorer is not None:
            blocks.append(_score_table(records))
        return "\n\n".join(blocks)


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise MergeError("--device cuda: PyTorch finds no GPU here; give cpu, or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _validation(scores: Scores, dense: Scores | None) -> dict[str, Any]:
    return {
        "adapter": scores,
        "mean": mean_score(scores),
        "dense": dense,
        "dense_mean": None if dense is None else mean_score(dense),
    }


def _candidate_record(candidate: _Candidate) -> dict[str, Any]:
    return {
        "hyperparameters": candidate.settings.hyperparameters,
        "scores": {label: record["score"] for label, record in candidate.scores.items()},
        "mean": candidate.mean,
        "truncation": candidate.truncation.to_dict()["overall"],
    }


def _search_table(record: dict[str, Any]) -> str:
    rows = record["candidates"]
    names, labels = list(rows[0]["hyperparameters"]), list(rows[0]["scores"])
    table = markdown_table(
        [*names, *labels, "mean", "energy lost", ""],
        [
            [
                *(f"{row['hyperparameters'][name]:g}" for name in names),
                *(row["scores"][label] for label in labels),
                row["mean"],
                row["truncation"],
                "chosen" if index == record["chosen"] else "",
            ]
            for index, row in enumerate(rows)
        ],
    )
    return f"{table}\n\n{record['validation_runs']} validation runs in {record['seconds']:.1f} s"


def _score_table(records: Sequence[dict[str, Any]]) -> str:
    """Scores by data set: of the adapter as written, and of the dense update where it was scored."""
    rows = []
    for kind, title in (("adapter", "adapter as written"), ("dense", "dense update")):
        found = [record["validation"][kind] for record in records]
        if all(found):
            scores = {label: entry for part in found for label, entry in part.items()}
            rows.append([title, *(entry["score"] for entry in scores.values()), mean_score(scores)])
            labels = list(scores)
    return markdown_table(["", *labels, "mean"], rows)
