"""What the training of an expert leaves beside the adapter: `expert.json` and a model card."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers import TrainingArguments

from heterofusion.adapters.lora import WEIGHTS_FILE
from heterofusion.data.labels import is_labelled_by_sources, labels_control
from heterofusion.publish.record import (
    CARD_FILE,
    EXPERT_FILE,
    basis_record,
    describe_basis,
    describe_controls,
    describe_labels,
    initial_control,
    library_versions,
    made_by,
    record_control,
    training_cost,
    whole_control,
)
from heterofusion.runtime.files import display_name, file_sha256
from heterofusion.training.config import training_settings
from heterofusion.training.expert_lora import ExpertLora, plain
from heterofusion.training.mixture_data import TrainingData


def expert_record(
    base: str,
    lora: ExpertLora,
    args: TrainingArguments,
    steps: int,
    data: TrainingData,
    metrics: dict[str, Any],
    resumed_from_step: int | None = None,
) -> dict[str, Any]:
    """What `expert.json` records of a run: settings, data and metrics; local paths are cut to their names.

    Args:
        base: the base model.
        lora: what was trained.
        args: of the training.
        steps: optimizer steps, those before the run was resumed included.
        data: what was trained on.
        metrics: of the run.
        resumed_from_step: where it was resumed, if it was.
    """
    initial = lora.initial
    labels, begun = labels_control(data.labels_record), initial_control(initial)
    training = {**training_settings(args), "steps": steps, "processes": args.world_size, "data": data.replay_record}
    if data.labels_record is not None:
        training["source_labels"] = data.labels_record
    names = ("r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "layers_to_transform",
             "modules_to_save", "init_lora_weights")  # fmt: skip
    return {
        "base_model": display_name(base),
        "lora": {name: plain(getattr(lora.config, name)) for name in names},
        "init_adapter": {"name": display_name(initial.name), "sha256": initial.sha256} if initial else None,
        "basis": basis_record(initial),
        "train_only": lora.train_only,
        "training": training,
        "metrics": metrics,
        "made_by": made_by(
            "tuning",
            lora.train_only or "lora",
            training_cost(metrics, resumed_from_step),
            args.seed,
            ran_source_models=is_labelled_by_sources(data.labels_record),
            source_control=whole_control(None, labels, begun),
        ),
        "label_control": labels,
        "initial_control": begun,
        "versions": library_versions(),
    }


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write model card and `expert.json` beside a saved adapter; where the latter stands, the adapter is complete."""
    (folder / CARD_FILE).write_text(str(_card(record)), encoding="utf-8")
    record = {**record, "weights_sha256": file_sha256(folder / WEIGHTS_FILE)}
    text = json.dumps(record, indent=2, ensure_ascii=False, sort_keys=True) + "\n"
    (folder / EXPERT_FILE).write_text(text, encoding="utf-8")


def _card(record: dict[str, Any]) -> ModelCard:
    """A model card without what only the owner knows, such as a licence. It replaces PEFT's, which has local paths."""
    base, lora, control = record["base_model"], record["lora"], record_control(record)
    data = ModelCardData(
        base_model=base or None,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["lora", f"base_model:adapter:{base}", *(["control"] if control else [])],
    )
    training = record["training"]
    labels = training.get("source_labels")
    sets = [*training["data"].get("datasets", []), *(labels["files"] if labels else [])]
    rows = "\n".join(f"| {entry['name']} | {entry['kept']} |" for entry in sets)
    initial = record["init_adapter"]
    begun = f", begun as the adapter `{initial['name']}`" if initial else ""
    part = f" Its `{record['train_only']}` alone was trained." if record["train_only"] else ""
    basis = describe_basis(record["basis"])
    part += f" {basis}" if basis else ""
    told = f"\n{describe_labels(labels)}\n" if labels else ""
    title = "LoRA expert" if control is None else f"CONTROL ({control}): not an expert"
    if control is not None:
        told = (
            f"\nThis adapter is a CONTROL: {describe_controls(record)}.\nAn adapter that is none is compared with it "
            f"to see what the real ones contribute.\n{told}"
        )
    body = f"""
# {title}

A LoRA adapter of rank {lora["r"]} for `{base}`{begun}, trained with the loss on the answers only.{part}

| data set | examples |
|---|---|
{rows}
{told}
`{EXPERT_FILE}` holds all settings, seeds, metrics and library versions. No licence is stated here: it follows from
those of the base model and the data.
"""
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{body}")
