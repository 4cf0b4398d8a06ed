"""What a distillation leaves: the adapter, a model card, and `distillation.json` with where all of it comes from."""

import contextlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from huggingface_hub import ModelCard, ModelCardData
from transformers import Trainer

from heterofusion.adapters.lora import CONFIG_FILE, WEIGHTS_FILE, LoraAdapter, load_adapter
from heterofusion.data.markdown import markdown_table
from heterofusion.experts.teachers import Teacher
from heterofusion.publish.record import (
    CARD_FILE,
    DISTILLATION_FILE,
    describe_controls,
    initial_control,
    library_versions,
    made_by,
    record_control,
    training_cost,
    whole_control,
)
from heterofusion.rivals.distillation import DistillConfig
from heterofusion.rivals.fusellm import FusionReport
from heterofusion.runtime.files import display_name, file_sha256, staging_folder, told_writes
from heterofusion.runtime.ranks import all_together, from_main

_STAGING = ".distill-"


def distillation_record(
    base: str,
    anchor: LoraAdapter,
    models: Sequence[Teacher],
    report: FusionReport,
    settings: dict[str, Any],
    training: dict[str, Any],
    metrics: dict[str, Any],
    made: dict[str, Any],
) -> dict[str, Any]:
    """What `distillation.json` records: settings, models, labels and metrics; local paths are cut to their names.

    Args:
        base: base model of the target.
        anchor: the adapter that was trained on.
        models: the target as a teacher, and the teachers.
        report: how the labels came about.
        settings: of the method.
        training: plain values about the training.
        metrics: plain values.
        made: of `heterofusion.publish.record.made_by`.
    """
    rows = zip(models, report.picked, report.mean_cross_entropy, strict=True)
    records = [{**model.record(), "picked": picked, "mean_cross_entropy": entropy} for model, picked, entropy in rows]
    return {
        "base_model": display_name(base),
        "target": {**records[0], "name": display_name(anchor.name), "sha256": anchor.sha256},
        "teachers": records[1:],
        "method": settings,
        "one_to_one_positions": report.one_to_one,
        "soft_positions": report.soft,
        "training": training,
        "metrics": metrics,
        "made_by": made,
        "initial_control": initial_control(anchor),
        "versions": library_versions(),
    }


def training_record(args: DistillConfig, steps: int, data: dict[str, Any]) -> dict[str, Any]:
    """The part of the record that tells of the training."""
    return {**args.training_dict(), "steps": steps, "processes": args.world_size, "data": data}


def made_by_distillation(
    args: DistillConfig,
    anchor: LoraAdapter,
    report: FusionReport,
    metrics: dict[str, Any],
    resumed_from_step: int | None = None,
) -> dict[str, Any]:
    """`made_by` of the record; its seconds are those of the teachers, of the maps, of aligning and of the training.

    Labels and maps from disk count as long as it once took to make them.
    """
    cost = training_cost(metrics, resumed_from_step)
    if cost["seconds"] is not None:
        cost["seconds"] = round(cost["seconds"] + report.seconds, 3)
    control = whole_control(None, None, initial_control(anchor))
    return made_by("distillation", "fusellm", cost, args.seed, ran_source_models=True, source_control=control)


def save_student(trainer: Trainer, record: dict[str, Any]) -> None:
    """Write the adapter with its tokenizer, card and record, beside its place, check it, and move it there.

    All ranks together.

    Args:
        trainer: the trainer, after training.
        record: what `distillation_record` gave.

    Raises:
        AdapterError: what was written is no adapter that this package reads.
        OSError: it could not be written.
    """
    folder = Path(str(trainer.args.output_dir))
    ranks = PartialState()
    with told_writes(f"the adapter could not be written to {folder.absolute()}"), contextlib.ExitStack() as stack:
        staging = None
        with all_together(ranks):
            if ranks.is_main_process:
                staging = stack.enter_context(staging_folder(folder, _STAGING))
        place = Path(from_main(ranks, str(staging)))
        trainer.save_model(str(place))  # the tokenizer too; all ranks may hold a part
        with all_together(ranks):
            if ranks.is_main_process:
                load_adapter(place)
                shutil.copymode(place / CONFIG_FILE, place / WEIGHTS_FILE)  # written for the owner alone
                _write_texts(place, record)
                _move_files(place, folder)


def _write_texts(folder: Path, record: dict[str, Any]) -> None:
    (folder / CARD_FILE).write_text(str(_card(record)), encoding="utf-8")
    record = {**record, "weights_sha256": file_sha256(folder / WEIGHTS_FILE)}
    text = json.dumps(record, indent=2, ensure_ascii=False, sort_keys=True) + "\n"
    (folder / DISTILLATION_FILE).write_text(text, encoding="utf-8")


def _move_files(staging: Path, folder: Path) -> None:
    """The record goes last: where it stands, the adapter beside it is complete."""
    (folder / DISTILLATION_FILE).unlink(missing_ok=True)
    names = sorted(path.relative_to(staging) for path in staging.rglob("*") if path.is_file())
    for name in sorted(names, key=lambda name: name == Path(DISTILLATION_FILE)):
        (folder / name).parent.mkdir(exist_ok=True)  # a tokenizer may have a folder of chat templates
        os.replace(staging / name, folder / name)


def _card(record: dict[str, Any]) -> ModelCard:
    """A model card without what only the owner knows, such as a licence. It replaces PEFT's, which has local paths."""
    base, target, control = record["base_model"], record["target"], record_control(record)
    data = ModelCardData(
        base_model=base or None,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["lora", "distillation", f"base_model:adapter:{base}", *(["control"] if control else [])],
    )
    rows = [
        [role, model["name"], model["base_model"], f"`{(model['sha256'] or '')[:12]}`", model["picked"]]
        for role, model in [("target", target), *(("teacher", teacher) for teacher in record["teachers"])]
    ]
    table = markdown_table(["part", "adapter", "base model", "sha256 of its weights", "picked"], rows)
    method = record["method"]
    title = "Distilled LoRA adapter" if control is None else f"CONTROL ({control}): distilled LoRA adapter"
    told = "" if control is None else f"\nThis adapter is a CONTROL: {describe_controls(record)}.\n"
    body = f"""
# {title}
{told}
The LoRA adapter `{target["name"]}` of `{base}`, trained on with answers and with what {len(record["teachers"])} source
expert(s) think of them, as in [FuseLLM](https://arxiv.org/abs/2401.10491): lambda {method["distill_lambda"]}, top
{method["top_k_logits"]} tokens. `picked` counts the examples for which a model's labels were taken, the one of lowest
cross-entropy; {record["soft_positions"]:.1%} of the answers' tokens have a model's distribution as their label, the
others the answer's token itself.

{table}

`{DISTILLATION_FILE}` holds all settings, hashes, seeds, metrics and library versions. No licence is stated here: it
follows from those of the base models, the adapters and the data.
"""
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{body}")
