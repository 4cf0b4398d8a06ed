"""The evaluation itself: rows of results one after the other, their data sets shared by the processes."""

import contextlib
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from heterofusion.evaluation.datasets import EvalSet, check_references, load_eval_sets
from heterofusion.evaluation.results import PARTS, PREDICTIONS, RESULTS_FILE, STATE_FILE, metric_record, totals
from heterofusion.evaluation.rows import EvalArguments, Row
from heterofusion.experts.answering import Answers, Questions, ask
from heterofusion.experts.examples import Prompts
from heterofusion.publish.record import library_versions
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.files import check_output_dir, display_name, read_json, write_json, write_lines
from heterofusion.runtime.ranks import all_together, from_main, peak_memory

logger = logging.getLogger(__name__)


class Evaluation:
    """An evaluation whose flags, files and adapters are in order; nothing is written and no weights are loaded yet.

    All processes construct and run it together. `settings` are more flags for `results.json`.
    """

    def __init__(
        self, arguments: EvalArguments, rows: Sequence[Row], ranks: PartialState, settings: Mapping[str, Any]
    ) -> None:
        self.arguments, self.rows, self.ranks, self.settings = arguments, rows, ranks, settings
        output, folder = arguments.output, Path(arguments.output.output_dir).expanduser().absolute()
        several = len(rows) > 1
        self.folder, self.folders = folder, [folder / row.name if several else folder for row in rows]
        self._encoded: dict[tuple[Any, ...], Prompts] = {}
        begun: Any = None
        with all_together(ranks):
            self.sets = load_eval_sets(arguments.data)
            self.identities = [{label: who.identity() for label, who in row.answerers.items()} for row in rows]
            self.state = {
                # the name of a single row may change: no folder is called by it
                "rows": {row.name if several else "": i for row, i in zip(rows, self.identities, strict=True)},
                "datasets": {
                    examples.label: {"sha256": examples.sha256, **examples.sample, "metric": examples.metric}
                    for examples in self.sets
                },
                "max_new_tokens": arguments.generation.max_new_tokens,
                "max_prompt_length": arguments.generation.max_prompt_length,
            }
            if ranks.is_main_process:
                check_output_dir(str(folder), output.resume, output.overwrite, resume_flag="--resume")
                resumed = output.resume and check_same(folder, self.state)
                begun = resumed, [read_json(each / RESULTS_FILE) if resumed else None for each in self.folders]
            self.prompts = [
                {examples.label: self._encode(examples, row, identity) for examples in self.sets}
                for row, identity in zip(rows, self.identities, strict=True)
            ]
        self.begun, self.finished = from_main(ranks, begun)

    def _encode(self, examples: EvalSet, row: Row, identity: Mapping[str, Any]) -> Prompts:
        """Prompts of a data set; experts with the same tokenizer share them."""
        who = row.answerers[examples.label]
        key = (identity[examples.label].get("tokenizer", row.name), who.limit, examples.label)
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
        if not self.begun:
            self._begin()
        results = []
        for number, (row, folder, finished) in enumerate(zip(self.rows, self.folders, self.finished, strict=True)):
            found, peak = ({}, None) if finished else self._answer(row, self.prompts[number], folder)
            with all_together(self.ranks):
                if self.ranks.is_main_process:
                    made = dict(finished or self._results(number, found, peak))
                    made |= {"name": row.name, "labels": self.arguments.output.label_values()}
                    if made != finished:
                        write_json(folder / RESULTS_FILE, made)
                    shutil.rmtree(folder / PARTS, ignore_errors=True)
                    results.append(made)
                    logger.info("%s: results in %s", row.name, folder / RESULTS_FILE)
        return results

    def _begin(self) -> None:
        """Write the state, once the first model is loaded: the last thing that may be wrong."""
        with all_together(self.ranks):
            next(iter(self.rows[0].answerers.values())).load()
        with all_together(self.ranks):
            if self.ranks.is_main_process:
                if self.arguments.output.overwrite:
                    remove_evaluation(self.folder)
                write_json(self.folder / STATE_FILE, self.state)

    def _answer(self, row: Row, prompts: Mapping[str, Prompts], folder: Path) -> tuple[dict[str, Answers], int | None]:
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
            found |= ask(self.ranks, who, questions, row.name)
        generated = any(answers.generated for answers in found.values())
        peak = max(gather_object([peak_memory() if generated else 0]))
        return found, peak or None  # None where an interrupted run had left nothing to generate

    def _results(self, number: int, found: Mapping[str, Answers], peak: int | None) -> dict[str, Any]:
        """Score the answers and write the predictions."""
        row, datasets = self.rows[number], {}
        for examples in self.sets:
            prompts, answers = self.prompts[number][examples.label], found[examples.label].answers
            lines = [
                {"index": i, "prompt": p, "prediction": a.text, "reference": r, "new_tokens": a.new_tokens}
                for i, p, a, r in zip(examples.indices, prompts.texts, answers, prompts.references, strict=True)
            ]
            write_lines(self.folders[number] / PREDICTIONS / f"{examples.label}.jsonl", lines)
            datasets[examples.label] = {
                **metric_record(examples.metric, [answer.text for answer in answers], prompts.references),
                "examples": len(answers),
                "prompts_cut": prompts.cut,
                "new_tokens": sum(answer.new_tokens for answer in answers),
                "seconds": round(found[examples.label].seconds, 3),
                "sha256": examples.sha256,
            }
        model, data, generation, _ = self.arguments
        settings = {**asdict(model), **asdict(data), **asdict(generation), **self.settings}
        for flag in ("adapters", "dataset_name"):
            settings[flag] = [display_name(name) for name in settings[flag]]
        settings["model_name_or_path"] = display_name(model.model_name_or_path)
        device = self.ranks.device
        return {
            **row.record,
            "datasets": datasets,
            **totals(datasets),
            "dtype": next(iter(self.identities[number].values()))["dtype"],
            "peak_memory_bytes": peak,
            "processes": self.ranks.num_processes,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "settings": settings,
            "versions": library_versions(),
        }


def check_same(output_dir: Path, state: Mapping[str, Any]) -> bool:
    """Whether a folder holds an evaluation, which must be one with these settings; names what differs."""
    found = read_json(output_dir / STATE_FILE)
    if found is None:
        if output_dir.is_dir() and any(output_dir.iterdir()):
            raise UserError(f"--resume: {output_dir} holds no evaluation ({STATE_FILE} is missing); name another")
        return False
    there, here = _flat(found), _flat(state)
    for name in dict.fromkeys((*here, *there)):
        if there.get(name) != here.get(name):
            raise UserError(
                f"--resume: {output_dir} holds an evaluation with another {name}: {there.get(name)}, this one has "
                f"{here.get(name)}; give the same flags, or another --output_dir"
            )
    return True


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        name = f"{prefix} {key}".strip()
        flat |= _flat(item, name) if isinstance(item, dict) else {name: item}
    return flat


def remove_evaluation(output_dir: Path) -> None:
    """Remove what an earlier evaluation wrote, and nothing else."""
    found: dict[str, Any] = {}
    with contextlib.suppress(UserError):  # a damaged state goes all the same
        found = read_json(output_dir / STATE_FILE) or {}
    for folder in (output_dir / name for name in found.get("rows", {})):
        (folder / RESULTS_FILE).unlink(missing_ok=True)
        for label in found["datasets"]:
            (folder / PREDICTIONS / f"{label}.jsonl").unlink(missing_ok=True)
        shutil.rmtree(folder / PARTS, ignore_errors=True)
    (output_dir / STATE_FILE).unlink(missing_ok=True)
