"""The evaluation itself: adapters one after the other, their data sets shared by the processes."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from tqdm.auto import tqdm

from heterofusion.evaluation.arguments import (
    NO_ADAPTER,
    EvalDataArguments,
    EvalModelArguments,
    EvalOutputArguments,
    GenerationArguments,
)
from heterofusion.evaluation.examples import EvalSet, Prompts, encode, load_eval_sets
from heterofusion.evaluation.generation import FIRST_BATCH_SIZE, Answer, AnswerGenerator, longest_first
from heterofusion.evaluation.models import (
    Adapter,
    Models,
    adapter_tokenizer,
    base_fingerprint,
    check_adapters,
    find_adapter,
    fusion_record,
    prompt_limit,
)
from heterofusion.evaluation.ranks import all_together, from_all, from_main
from heterofusion.evaluation.results import mean_score, metric_record
from heterofusion.evaluation.store import (
    PARTS,
    PREDICTIONS,
    RESULTS_FILE,
    STATE_FILE,
    PartWriter,
    adapter_folder,
    check_same,
    read_json,
    read_parts,
    read_predictions,
    remove_evaluation,
    remove_parts,
    write_json,
    write_lines,
)
from heterofusion.loading import base_dtype, check_output_dir, check_token_ids
from heterofusion.provenance import display_name, library_versions

logger = logging.getLogger(__name__)


@dataclass
class Job:
    """One adapter to evaluate.

    Args:
        name: Of its row.
        adapter: None for the base alone.
        folder: Where its results go.
        finished: Results that are there already.
        done: Positions in the sample, by data set, whose answers are there already.
        tokenizer: Of the adapter, else of the base.
        limit: Tokens of a prompt at most.
        prompts: By data set.
    """

    name: str
    adapter: Adapter | None
    folder: Path
    finished: dict[str, Any] | None = None
    done: dict[str, set[int]] = field(default_factory=dict)
    tokenizer: Any = None
    limit: int | None = None
    prompts: dict[str, Prompts] = field(default_factory=dict)


class Evaluation:
    """An evaluation whose flags, files and adapters are in order; nothing is written and no weights are loaded yet.

    Args:
        model: What is evaluated.
        data: What it is evaluated on.
        generation: How answers are generated.
        output: Where results go.
        ranks: The processes; all of them construct and run this together.

    Raises:
        ValueError: a flag, a file, a record or an adapter is not what it has to be, or `output_dir` holds something
            else; the message says which and what to do.
    """

    def __init__(
        self,
        model: EvalModelArguments,
        data: EvalDataArguments,
        generation: GenerationArguments,
        output: EvalOutputArguments,
        ranks: PartialState,
    ) -> None:
        self.model, self.data, self.generation, self.output, self.ranks = model, data, generation, output, ranks
        self.batch_size = generation.fixed_batch_size()
        self.folder = Path(output.output_dir).expanduser().absolute()
        with all_together(ranks):
            names = output.adapter_names(model.adapters)
            adapters = list(map(find_adapter, model.adapters, model.revisions()))
            config = check_adapters(model, adapters)
            self.sets = load_eval_sets(data)
            self.jobs = [
                Job(name, adapter, adapter_folder(self.folder, name, len(names)))
                for name, adapter in zip(names, adapters, strict=True)
            ]
            self.state = self._state()
            if ranks.is_main_process:
                self._look()
        found = from_main(ranks, [(job.finished, job.done) for job in self.jobs])
        for job, (finished, done) in zip(self.jobs, found, strict=True):
            job.finished, job.done = finished, done
        with all_together(ranks):
            encoded: dict[tuple[str, int | None], dict[str, Prompts]] = {}
            for job in self.jobs:
                if job.finished is None:
                    self._encode(job, config, encoded)
        self.models = Models(model, ranks.device)

    # ---- before anything is loaded ----

    def _state(self) -> dict[str, Any]:
        """What has to be the same for answers of an interrupted run to count. Batch size and cache need not be."""
        model = self.model
        hashes = {job.name: job.adapter.sha256 if job.adapter else NO_ADAPTER for job in self.jobs}
        return {
            "base_model": display_name(model.model_name_or_path),
            "base_revision": model.model_revision,
            "base_files": base_fingerprint(model.model_name_or_path),
            "dtype": str(base_dtype(model, model.use_cpu)).removeprefix("torch."),
            "load_in_8bit": model.load_in_8bit,
            "load_in_4bit": model.load_in_4bit,
            "merge_adapters": model.merge_adapters,
            # the name of a single one may change: no folder is called by it
            **({"adapters": hashes} if len(hashes) > 1 else {"adapter": hashes[self.jobs[0].name]}),
            "datasets": {examples.label: examples.identity() for examples in self.sets},
            "max_new_tokens": self.generation.max_new_tokens,
            "max_prompt_length": self.generation.max_prompt_length,
        }

    def _look(self) -> None:
        """Find out what the output folder holds. Rank 0 alone."""
        output = self.output
        check_output_dir(str(self.folder), output.resume, output.overwrite, resume_flag="--resume")
        if not output.resume:
            return
        check_same(self.folder, self.state)
        for job in self.jobs:
            job.finished = read_json(job.folder / RESULTS_FILE)
            job.done = {s.label: set(read_parts(job.folder / PARTS / s.label)[0]) for s in self.sets}

    def _encode(self, job: Job, config: Any, encoded: dict[tuple[str, int | None], dict[str, Prompts]]) -> None:
        """Prompts of an adapter; of adapters with the same tokenizer, they are those of the first."""
        generation, adapter = self.generation, job.adapter
        virtual = adapter.virtual_tokens if adapter else 0
        job.tokenizer = adapter_tokenizer(self.model, adapter)
        job.limit = prompt_limit(config, generation.max_new_tokens, generation.max_prompt_length, virtual)
        key = (job.tokenizer.name_or_path, job.limit)
        if key not in encoded:
            encoded[key] = {examples.label: encode(examples, job.tokenizer, job.limit) for examples in self.sets}
            for prompts in encoded[key].values():
                check_token_ids([Dataset.from_dict({"input_ids": prompts.ids})], config)
        job.prompts = encoded[key]

    # ---- the work ----

    def run(self) -> list[dict[str, Any]]:
        """Evaluate all adapters, write their results.

        Returns:
            The contents of the `results.json` files on rank 0; nothing on the others.

        Raises:
            ValueError: a model cannot be loaded, or memory does not suffice.
            OSError: a file cannot be written.
        """
        with all_together(self.ranks):
            if any(self._missing(job, label) for job in self.jobs for label in job.prompts):
                self.models.load()  # nothing is written before the last thing that may be wrong
        with all_together(self.ranks):
            if self.ranks.is_main_process:
                if self.output.overwrite:
                    remove_evaluation(self.folder)
                write_json(self.folder / STATE_FILE, self.state)
        results = []
        for number, job in enumerate(self.jobs, start=1):
            facts: dict[str, Any] = {}
            place = f"{job.name} ({number} of {len(self.jobs)})" if len(self.jobs) > 1 else job.name
            if job.finished is None:
                self._say_cuts(job)
                with all_together(self.ranks):
                    facts = self._generate(job, place)
                facts = self._over_ranks(facts)
            with all_together(self.ranks):
                if self.ranks.is_main_process:
                    results.append(self._finish(job, facts) if job.finished is None else self._renew(job))
                    logger.info("%s: results in %s", job.name, job.folder / RESULTS_FILE)
        return results

    def _say_cuts(self, job: Job) -> None:
        for label, prompts in job.prompts.items():
            if prompts.cut and self.ranks.is_main_process:
                logger.warning(
                    "%s: %d of %d prompts of %s were cut to %d tokens on the left",
                    job.name,
                    prompts.cut,
                    len(prompts.ids),
                    label,
                    job.limit,
                )

    def _missing(self, job: Job, label: str) -> dict[int, int]:
        """Lengths of the prompts of a data set that have no answer yet, by position."""
        done = job.done.get(label, ())
        return {i: len(ids) for i, ids in enumerate(job.prompts[label].ids) if i not in done}

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
        with (
            self.models.with_adapter(job.adapter) as model,
            tqdm(total=total, desc=place, unit="prompt", disable=rank > 0) as bar,
        ):
            generator = AnswerGenerator(
                model,
                job.tokenizer,
                self.generation.max_new_tokens,
                self.batch_size,
                self.generation.cache_implementation,
            )
            for label, share in shares.items():
                bar.set_postfix_str(label)
                ids = job.prompts[label].ids
                with PartWriter(job.folder / PARTS / label / f"rank-{rank}.jsonl") as part:
                    start = time.perf_counter()
                    for batch in generator.answers({i: ids[i] for i in share}):
                        end = time.perf_counter()
                        part.write(batch, end - start)
                        start = end
                        bar.update(len(batch))
            return {"batch_size": generator.batch_size, "dtype": str(model.dtype).removeprefix("torch.")}

    def _over_ranks(self, facts: dict[str, Any]) -> dict[str, Any]:
        """How generation was done on all ranks: the smallest batch size, and the dtype."""
        known = [facts for facts in from_all(self.ranks, facts) if facts]
        if not known:  # an interrupted run had left nothing to generate
            return {"batch_size": self.batch_size or FIRST_BATCH_SIZE, "dtype": self.state["dtype"]}
        return {**known[0], "batch_size": min(facts["batch_size"] for facts in known)}

    # ---- results ----

    def _finish(self, job: Job, facts: dict[str, Any]) -> dict[str, Any]:
        """Merge the parts, score them and write the results; the parts go last."""
        datasets = {}
        for examples in self.sets:
            prompts = job.prompts[examples.label]
            answers, seconds = read_parts(job.folder / PARTS / examples.label)
            missing = [i for i in range(len(prompts.ids)) if i not in answers]
            if missing:
                raise ValueError(
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
        device = self.ranks.device
        adapter = job.adapter
        return {
            "name": job.name,
            "labels": self.output.label_values(),
            "base_model": display_name(self.model.model_name_or_path),
            "adapter": {"name": display_name(adapter.given), "sha256": adapter.sha256} if adapter else None,
            "fusion": fusion_record(adapter) if adapter else None,
            "datasets": datasets,
            "mean": mean_score(datasets),
            "generation": {
                "max_new_tokens": self.generation.max_new_tokens,
                "batch_size": facts["batch_size"],
                "cache_implementation": self.generation.cache_implementation,
                "dtype": facts["dtype"],
                "max_prompt_length": job.limit,
            },
            "seconds": round(seconds, 3),
            "new_tokens": new_tokens,
            "tokens_per_second": round(new_tokens / seconds, 1) if seconds else 0.0,
            "processes": self.ranks.num_processes,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "settings": self._settings(),
            "versions": library_versions(),
        }

    def _settings(self) -> dict[str, Any]:
        settings = asdict(self.model) | asdict(self.data) | {"batch_size": self.generation.batch_size}
        settings["model_name_or_path"] = display_name(self.model.model_name_or_path)
        settings["adapters"] = [display_name(name) for name in self.model.adapters]
        settings["dataset_name"] = [display_name(name) for name in self.data.dataset_name]
        return settings

    def _renew(self, job: Job) -> dict[str, Any]:
        """Finished results under the names, labels and metrics of this run; nothing is generated."""
        results: dict[str, Any] = {**(job.finished or {}), "name": job.name, "labels": self.output.label_values()}
        try:
            datasets = dict(results["datasets"])
            for examples in self.sets:
                if datasets[examples.label]["metric"] != examples.metric:
                    answers = read_predictions(job.folder / PREDICTIONS / f"{examples.label}.jsonl")
                    datasets[examples.label] = {**datasets[examples.label], **metric_record(examples.metric, *answers)}
            results |= {"datasets": datasets, "mean": mean_score(datasets)}
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{job.folder / RESULTS_FILE} lacks {error}; it is damaged: start anew with --overwrite true"
            ) from error
        if results != job.finished:
            write_json(job.folder / RESULTS_FILE, results)
        for examples in self.sets:  # of a run that was killed while it removed them
            remove_parts(job.folder, examples.label)
        return results
