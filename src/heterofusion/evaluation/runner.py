"""The evaluation itself: rows of results one after the other, their data sets shared by the processes."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from heterofusion.evaluation.arguments import EvalArguments
from heterofusion.evaluation.datasets import EvalSet, load_eval_sets
from heterofusion.evaluation.results import mean_score, metric_record, tokens_per_second
from heterofusion.evaluation.rows import LineupBuilder, Row, adapter_lineup
from heterofusion.evaluation.store import (
    PARTS,
    PREDICTIONS,
    RESULTS_FILE,
    STATE_FILE,
    adapter_folder,
    check_same,
    read_json,
    read_predictions,
    remove_evaluation,
    remove_parts,
    write_json,
    write_lines,
)
from heterofusion.experts.answering import PartWriter, read_parts
from heterofusion.experts.examples import Prompts
from heterofusion.experts.generation import FIRST_BATCH_SIZE, Answer, longest_first
from heterofusion.publish.record import library_versions
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.files import check_output_dir, display_name
from heterofusion.runtime.loading import base_dtype
from heterofusion.runtime.ranks import all_together, from_all, from_main, peak_memory

logger = logging.getLogger(__name__)


@dataclass
class Job:
    """One row to evaluate.

    Args:
        row: What answers.
        folder: Where its results go.
        finished: Results that are there already.
        done: Positions in the sample, by data set, whose answers are there already.
        prompts: By data set.
    """

    row: Row
    folder: Path
    finished: dict[str, Any] | None = None
    done: dict[str, set[int]] = field(default_factory=dict)
    prompts: dict[str, Prompts] = field(default_factory=dict)


class Evaluation:
    """An evaluation whose flags, files and adapters are in order; nothing is written and no weights are loaded yet.

    Args:
        arguments: What is evaluated, on what, how, and where results go.
        ranks: The processes; all of them construct and run this together.
        lineup: Makes the rows.

    Raises:
        ValueError: a flag, a file, a record or an adapter is not what it has to be, or `output_dir` holds something
            else; the message says which and what to do.
    """

    def __init__(self, arguments: EvalArguments, ranks: PartialState, lineup: LineupBuilder = adapter_lineup) -> None:
        self.arguments, self.ranks = arguments, ranks
        self.folder = Path(arguments.output.output_dir).expanduser().absolute()
        with all_together(ranks):
            made = lineup(arguments, ranks.device)
            self.sets = load_eval_sets(arguments.data)
            self.jobs = [Job(row, adapter_folder(self.folder, row.name, len(made.rows))) for row in made.rows]
            self.state = {
                **made.state,
                "datasets": {examples.label: examples.identity() for examples in self.sets},
                "max_new_tokens": arguments.generation.max_new_tokens,
                "max_prompt_length": arguments.generation.max_prompt_length,
            }
            if ranks.is_main_process:
                self._look()
        found = from_main(ranks, [(job.finished, job.done) for job in self.jobs])
        for job, (finished, done) in zip(self.jobs, found, strict=True):
            job.finished, job.done = finished, done
        with all_together(ranks):
            for job in self.jobs:
                if job.finished is None:
                    job.prompts = job.row.encode(self.sets)

    # ---- before anything is loaded ----

    def _look(self) -> None:
        """Find out what the output folder holds. Rank 0 alone."""
        output = self.arguments.output
        check_output_dir(str(self.folder), output.resume, output.overwrite, resume_flag="--resume")
        if not output.resume:
            return
        check_same(self.folder, self.state)
        for job in self.jobs:
            job.finished = read_json(job.folder / RESULTS_FILE)
            job.done = {s.label: set(read_parts(job.folder / PARTS / s.label)[0]) for s in self.sets}

    # ---- the work ----

    def run(self) -> list[dict[str, Any]]:
        """Evaluate all rows, write their results.

        Returns:
            The contents of the `results.json` files on rank 0; nothing on the others.

        Raises:
            ValueError: a model cannot be loaded, or memory does not suffice.
            OSError: a file cannot be written.
        """
        with all_together(self.ranks):
            for job in self.jobs:
                if any(self._missing(job, label) for label in job.prompts):
                    job.row.load()  # nothing is written before the last thing that may be wrong
        with all_together(self.ranks):
            if self.ranks.is_main_process:
                if self.arguments.output.overwrite:
                    remove_evaluation(self.folder)
                write_json(self.folder / STATE_FILE, self.state)
        results = []
        for number, job in enumerate(self.jobs, start=1):
            facts: dict[str, Any] = {}
            name = job.row.name
            place = f"{name} ({number} of {len(self.jobs)})" if len(self.jobs) > 1 else name
            if job.finished is None:
                self._say_cuts(job)
                with all_together(self.ranks):
                    facts = self._generate(job, place)
                facts = self._over_ranks(facts)
            with all_together(self.ranks):
                if self.ranks.is_main_process:
                    results.append(self._finish(job, facts) if job.finished is None else self._renew(job))
                    logger.info("%s: results in %s", name, job.folder / RESULTS_FILE)
        return results

    def _say_cuts(self, job: Job) -> None:
        for label, prompts in job.prompts.items():
            if prompts.cut and self.ranks.is_main_process:
                logger.warning(
                    "%s: %d of %d prompts of %s were cut to %d tokens on the left",
                    job.row.name,
                    prompts.cut,
                    len(prompts.ids),
                    label,
                    job.row.limit,
                )

    def _missing(self, job: Job, label: str) -> dict[int, int]:
        """Lengths of the prompts of a data set that have no answer yet, by position."""
        done = job.done.get(label, ())
        return {i: length for i, length in enumerate(job.prompts[label].lengths) if i not in done}

    def _generate(self, job: Job, place: str) -> dict[str, Any]:
        """Generate this rank's share of what is missing; how it was done in the end."""
        rank, ranks = self.ranks.process_index, self.ranks.num_processes
        shares = {}
        for label in job.prompts:
            # every n-th of all prompts by length, so that no rank gets the long ones
            shares[label] = longest_first(self._missing(job, label))[rank::ranks]
        total = sum(map(len, shares.values()))
        if not total:
            return {}
        if self.ranks.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.ranks.device)  # of the row before
        batch_sizes, dtypes = [], []
        # a generator, which holds models: it is closed when one of its data sets fails
        answering = cast(Any, job.row.answering([label for label, share in shares.items() if share]))
        with closing(answering), tqdm(total=total, desc=place, unit="prompt", disable=rank > 0) as bar:
            for label, source in answering:
                bar.set_postfix_str(label)
                ids = job.prompts[label].ids
                with PartWriter(job.folder / PARTS / label / f"rank-{rank}.jsonl") as part:
                    start = time.perf_counter()
                    for batch in source.answers({i: ids[i] for i in shares[label]}):
                        end = time.perf_counter()
                        part.write(batch, end - start)
                        start = end
                        bar.update(len(batch))
                batch_sizes.append(source.batches.size)
                dtypes.append(
                    str((getattr(source, "model", None) and source.model.dtype) or source.dtype).removeprefix("torch.")
                )
        return {"batch_size": min(batch_sizes), "dtype": dtypes[0], "peak_memory_bytes": peak_memory()}

    def _over_ranks(self, facts: dict[str, Any]) -> dict[str, Any]:
        """How generation was done on all ranks: the smallest batch size, the dtype, the most memory of a process."""
        known = [facts for facts in from_all(self.ranks, facts) if facts]
        if not known:  # an interrupted run had left nothing to generate
            model, generation = self.arguments.model, self.arguments.generation
            return {
                "batch_size": generation.fixed_batch_size() or FIRST_BATCH_SIZE,
                "dtype": str(base_dtype(model, model.use_cpu)).removeprefix("torch."),
                "peak_memory_bytes": None,  # this process had no model
            }
        return {
            **known[0],
            "batch_size": min(facts["batch_size"] for facts in known),
            "peak_memory_bytes": max(facts["peak_memory_bytes"] for facts in known),
        }

    # ---- results ----

    def _finish(self, job: Job, facts: dict[str, Any]) -> dict[str, Any]:
        """Merge the parts, score them and write the results; the parts go last."""
        datasets = {}
        for examples in self.sets:
            prompts = job.prompts[examples.label]
            answers, seconds = read_parts(job.folder / PARTS / examples.label)
            missing = [i for i in range(len(prompts.ids)) if i not in answers]
            if missing:
                raise UserError(
                    f"{job.folder / PARTS / examples.label} lacks {len(missing)} answers that were generated; all "
                    "processes must write to the same file system: check --output_dir, then --resume true"
                )
            ordered = [answers[i] for i in range(len(prompts.ids))]
            self._write_predictions(job, examples, prompts, ordered)
            datasets[examples.label] = {
                **metric_record(examples.metric, [answer.text for answer in ordered], prompts.references),
                "examples": len(ordered),
                "prompts_cut": prompts.cut,
                "new_tokens": sum(answer.new_tokens for answer in ordered),
                "seconds": round(seconds, 3),
                "sha256": examples.sha256,
            }
        results = self._results(job, datasets, facts)
        write_json(job.folder / RESULTS_FILE, results)
        for examples in self.sets:
            remove_parts(job.folder, examples.label)
        return results

    def _write_predictions(self, job: Job, examples: EvalSet, prompts: Prompts, answers: Sequence[Answer]) -> None:
        rows = zip(examples.indices, prompts.texts, answers, prompts.references, strict=True)
        write_lines(
            job.folder / PREDICTIONS / f"{examples.label}.jsonl",
            (
                {
                    "index": index,
                    "prompt": prompt,
                    "prediction": answer.text,
                    "reference": reference,
                    "new_tokens": answer.new_tokens,
                }
                for index, prompt, answer, reference in rows
            ),
        )

    def _results(self, job: Job, datasets: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
        seconds = sum(record["seconds"] for record in datasets.values())
        new_tokens = sum(record["new_tokens"] for record in datasets.values())
        device, generation = self.ranks.device, self.arguments.generation
        return {
            "name": job.row.name,
            "labels": self.arguments.output.label_values(),
            **job.row.record(),
            "datasets": datasets,
            "mean": mean_score(datasets),
            "generation": {
                "max_new_tokens": generation.max_new_tokens,
                "batch_size": facts["batch_size"],
                "cache_implementation": generation.cache_implementation,
                "dtype": facts["dtype"],
                "max_prompt_length": job.row.limit,
            },
            "seconds": round(seconds, 3),
            "new_tokens": new_tokens,
            "tokens_per_second": tokens_per_second(new_tokens, seconds),
            "peak_memory_bytes": facts["peak_memory_bytes"],
            "processes": self.ranks.num_processes,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "settings": self._settings(),
            "versions": library_versions(),
        }

    def _settings(self) -> dict[str, Any]:
        model, data, generation, _, ensemble = self.arguments
        settings = asdict(model) | asdict(data) | asdict(ensemble) | {"batch_size": generation.batch_size}
        for flag in ("adapters", "dataset_name", "ensemble_models"):
            settings[flag] = settings[flag] and [display_name(name) for name in settings[flag]]
        settings["model_name_or_path"] = display_name(model.model_name_or_path)
        return settings

    def _renew(self, job: Job) -> dict[str, Any]:
        """Finished results under the names, labels and metrics of this run; nothing is generated."""
        labels = self.arguments.output.label_values()
        results: dict[str, Any] = {**(job.finished or {}), "name": job.row.name, "labels": labels}
        try:
            datasets = dict(results["datasets"])
            for examples in self.sets:
                if datasets[examples.label]["metric"] != examples.metric:
                    answers = read_predictions(job.folder / PREDICTIONS / f"{examples.label}.jsonl")
                    datasets[examples.label] = {**datasets[examples.label], **metric_record(examples.metric, *answers)}
            results |= {"datasets": datasets, "mean": mean_score(datasets)}
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{job.folder / RESULTS_FILE} lacks {error}; it is damaged: start anew with --overwrite true"
            ) from error
        if results != job.finished:
            write_json(job.folder / RESULTS_FILE, results)
        for examples in self.sets:  # of a run that was killed while it removed them
            remove_parts(job.folder, examples.label)
        return results
