"""The evaluation itself: rows of results one after the other, their data sets shared by the processes."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from heterofusion.evaluation.datasets import EvalSet, check_references, is_file_name, load_eval_sets
from heterofusion.evaluation.results import PARTS, PREDICTIONS, RESULTS_FILE, STATE_FILE, metric_record, totals
from heterofusion.evaluation.rows import EvalArguments, Row, expert_rows
from heterofusion.experts.answering import Answers, Questions, ask
from heterofusion.experts.examples import Prompts
from heterofusion.publish.record import library_versions
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.files import check_output_dir, display_name, read_json, write_json, write_lines
from heterofusion.runtime.ranks import all_together, from_all, from_main, peak_memory

logger = logging.getLogger(__name__)


class Evaluation:
    """An evaluation whose flags, files and adapters are in order; nothing is written and no weights are loaded yet.

    All processes construct and run it together. `settings` are more flags for `results.json`.
    """

    def __init__(
        self,
        arguments: EvalArguments,
        ranks: PartialState,
        make_rows: Callable[[EvalArguments, torch.device], list[Row]] = expert_rows,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.arguments, self.ranks, self.settings = arguments, ranks, settings or {}
        self.folder = Path(arguments.output.output_dir).expanduser().absolute()
        self._encoded: dict[tuple[Any, ...], Prompts] = {}
        with all_together(ranks):
            self.rows = make_rows(arguments, ranks.device)
            self.sets = load_eval_sets(arguments.data)
            self.identities = [{label: who.identity() for label, who in row.answerers.items()} for row in self.rows]
            several = len(self.rows) > 1
            self.state = {
                # the name of a single row may change: no folder is called by it
                "rows": {row.name if several else "": i for row, i in zip(self.rows, self.identities, strict=True)},
                "datasets": {examples.label: examples.identity() for examples in self.sets},
                "max_new_tokens": arguments.generation.max_new_tokens,
                "max_prompt_length": arguments.generation.max_prompt_length,
            }
            if ranks.is_main_process:
                check_output_dir(
                    str(self.folder), arguments.output.resume, arguments.output.overwrite, resume_flag="--resume"
                )
                if arguments.output.resume:
                    check_same(self.folder, self.state)
        with all_together(ranks):
            self.prompts = [
                {examples.label: self._encode(examples, row, number) for examples in self.sets}
                for number, row in enumerate(self.rows)
            ]

    def _encode(self, examples: EvalSet, row: Row, number: int) -> Prompts:
        """Prompts of a data set; experts with the same tokenizer share them."""
        who = row.answerers[examples.label]
        tokenizer = self.identities[number][examples.label].get("tokenizer", number)
        key = (tokenizer, who.limit, examples.label)
        if key not in self._encoded:
            self._encoded[key] = who.encode(examples)
            check_references(examples, self._encoded[key])
        prompts = self._encoded[key]
        if prompts.cut and self.ranks.is_main_process:
            count = f"{prompts.cut} of {len(prompts.ids)} prompts of {examples.label}"
            logger.warning("%s: %s were cut to %d tokens on the left", row.name, count, who.limit)
        return prompts

    def run(self) -> list[dict[str, Any]]:
        """Evaluate all rows, write their results, and give them on rank 0."""
        self._begin()
        results = []
        for number, row in enumerate(self.rows):
            folder = self.folder / row.name if len(self.rows) > 1 else self.folder
            finished = self._on_main(partial(read_json, folder / RESULTS_FILE))
            found: dict[str, Answers] = {}
            peak = None
            if finished is None:
                place = f"{row.name} ({number + 1} of {len(self.rows)})" if len(self.rows) > 1 else row.name
                found, peak = self._answer(row, self.prompts[number], folder, place)
            with all_together(self.ranks):
                if self.ranks.is_main_process:
                    made = self._renewed(finished, folder) if finished else self._results(number, found, peak, folder)
                    made |= {"name": row.name, "labels": self.arguments.output.label_values()}
                    if made != finished:
                        write_json(folder / RESULTS_FILE, made)
                    shutil.rmtree(folder / PARTS, ignore_errors=True)
                    results.append(made)
                    logger.info("%s: results in %s", row.name, folder / RESULTS_FILE)
        return results

    def _on_main(self, read: Callable[[], Any]) -> Any:
        with all_together(self.ranks):
            found = read() if self.ranks.is_main_process else None
        return from_main(self.ranks, found)

    def _begin(self) -> None:
        """Write the state, once the first model is loaded: the last thing that may be wrong."""
        if self._on_main((self.folder / STATE_FILE).is_file) and self.arguments.output.resume:
            return
        with all_together(self.ranks):
            next(iter(self.rows[0].answerers.values())).load()
        with all_together(self.ranks):
            if self.ranks.is_main_process:
                if self.arguments.output.overwrite:
                    remove_evaluation(self.folder)
                write_json(self.folder / STATE_FILE, self.state)

    def _answer(
        self, row: Row, prompts: Mapping[str, Prompts], folder: Path, place: str
    ) -> tuple[dict[str, Answers], int | None]:
        """All answers of a row, and the most memory that a process took for them."""
        if self.ranks.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.ranks.device)  # of the row before
        most = self.arguments.generation.max_new_tokens
        found: dict[str, Answers] = {}
        for who in {id(who): who for who in row.answerers.values()}.values():
            questions = {
                label: Questions(folder / PARTS / label, prompts[label].ids, prompts[label].lengths, most)
                for label in prompts
                if row.answerers[label] is who
            }
            found |= ask(self.ranks, who, questions, place)
        generated = any(answers.generated for answers in found.values())
        peak = max(from_all(self.ranks, peak_memory() if generated else 0))
        return found, peak or None  # None where an interrupted run had left nothing to generate

    def _results(self, number: int, found: Mapping[str, Answers], peak: int | None, folder: Path) -> dict[str, Any]:
        """Score the answers and write the predictions."""
        row, datasets = self.rows[number], {}
        for examples in self.sets:
            prompts, answers = self.prompts[number][examples.label], found[examples.label].answers
            rows = zip(examples.indices, prompts.texts, answers, prompts.references, strict=True)
            write_lines(
                folder / PREDICTIONS / f"{examples.label}.jsonl",
                (
                    {"index": i, "prompt": p, "prediction": a.text, "reference": r, "new_tokens": a.new_tokens}
                    for i, p, a, r in rows
                ),
            )
            datasets[examples.label] = {
                **metric_record(examples.metric, [answer.text for answer in answers], prompts.references),
                "examples": len(answers),
                "prompts_cut": prompts.cut,
                "new_tokens": sum(answer.new_tokens for answer in answers),
                "seconds": round(found[examples.label].seconds, 3),
                "sha256": examples.sha256,
            }
        model, data, generation, _ = self.arguments
        settings = {**asdict(model), **asdict(data), **self.settings, "batch_size": generation.batch_size}
        for flag in ("adapters", "dataset_name"):
            settings[flag] = [display_name(name) for name in settings[flag]]
        settings["model_name_or_path"] = display_name(model.model_name_or_path)
        device = self.ranks.device
        limits = [who.limit for who in row.answerers.values() if who.limit is not None]
        return {
            **row.record,
            "datasets": datasets,
            **totals(datasets),
            "generation": {
                "max_new_tokens": generation.max_new_tokens,
                "batch_size": generation.fixed_batch_size() or generation.batch_size,
                "cache_implementation": generation.cache_implementation,
                "dtype": next(iter(self.identities[number].values()))["dtype"],
                "max_prompt_length": min(limits, default=None),
            },
            "peak_memory_bytes": peak,
            "processes": self.ranks.num_processes,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "settings": settings,
            "versions": library_versions(),
        }

    def _renewed(self, finished: dict[str, Any], folder: Path) -> dict[str, Any]:
        """Finished results by the metrics of this run; nothing is generated."""
        datasets = dict(finished["datasets"])
        for examples in self.sets:
            if datasets[examples.label]["metric"] != examples.metric:
                path = folder / PREDICTIONS / f"{examples.label}.jsonl"
                answers = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
                texts, references = ([answer[key] for answer in answers] for key in ("prediction", "reference"))
                datasets[examples.label] |= metric_record(examples.metric, texts, references)
        return {**finished, "datasets": datasets, **totals(datasets)}


# ---- the folder as a whole --------------------------------------------------------------------------------------


def check_same(output_dir: Path, state: Mapping[str, Any]) -> None:
    """Check that an output folder holds an evaluation with these settings, or nothing; names what differs."""
    found = read_json(output_dir / STATE_FILE)
    if found is None:
        if output_dir.is_dir() and any(output_dir.iterdir()):
            raise UserError(f"--resume: {output_dir} holds no evaluation ({STATE_FILE} is missing); name another")
        return
    there, here = _flat(found), _flat(state)
    for name in dict.fromkeys((*here, *there)):
        if there.get(name) != here.get(name):
            raise UserError(
                f"--resume: {output_dir} holds an evaluation with another {name}: {there.get(name)}, this one has "
                f"{here.get(name)}; give the same flags, or another --output_dir"
            )


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        name = f"{prefix} {key}".strip()
        flat |= _flat(item, name) if isinstance(item, dict) else {name: item}
    return flat


def remove_evaluation(output_dir: Path) -> None:
    """Remove what an earlier evaluation wrote, and nothing else."""
    try:
        state = read_json(output_dir / STATE_FILE) or {}
    except UserError:
        state = {}
    names = [name for name in state.get("rows", {}) if is_file_name(name)]
    for folder in [output_dir / name for name in names] or [output_dir]:
        (folder / RESULTS_FILE).unlink(missing_ok=True)
        for label in filter(is_file_name, state.get("datasets", {})):
            (folder / PREDICTIONS / f"{label}.jsonl").unlink(missing_ok=True)
        shutil.rmtree(folder / PARTS, ignore_errors=True)
        for emptied in (folder / PREDICTIONS, *([folder] if folder != output_dir else [])):
            if emptied.is_dir() and not any(emptied.iterdir()):
                emptied.rmdir()
    (output_dir / STATE_FILE).unlink(missing_ok=True)
