"""What is told of a fused adapter: names fit for publishing, the record in `fusion.json`, and the model card."""

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from heterofusion.adapters.config import AdapterError
from heterofusion.adapters.controls import control_kind, control_record, describe_control
from heterofusion.adapters.lora import WEIGHTS_FILE, LoraAdapter
from heterofusion.data.labels import ANCHOR, describe_labels_control, is_labelled_by_sources, labels_control
from heterofusion.method.expansion import INPUTS, ExpandedAdapter
from heterofusion.method.model import HeteroFusionModel
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.files import display_name, file_sha256, read_json_object
from heterofusion.runtime.ranks import cost_record

PROVENANCE_FILE = "fusion.json"
EXPERT_FILE = "expert.json"  # the same of an expert that recipes/expert.py trained
MERGE_FILE = "merge.json"  # of a merge by recipes/merge.py
DISTILLATION_FILE = "distillation.json"  # of a student of recipes/distill.py
RECORD_FILES = (PROVENANCE_FILE, MERGE_FILE, DISTILLATION_FILE, EXPERT_FILE)
CARD_FILE = "README.md"
_SPEEDS = ("_runtime", "_per_second", "epoch")  # figures of the run, not of the adapter


def made_by(
    kind: str,
    method: str,
    cost: dict[str, Any],
    seed: int | None = None,
    ran_source_models: bool = False,
    source_control: str | None = None,
) -> dict[str, Any]:
    """What every record file holds as `made_by`, so that tables can set methods side by side.

    Args:
        kind: `fusion`, `merge`, `distillation` or `tuning`; `ensemble` of what is made at inference alone.
        method: name of the method within its kind, such as `ties`.
        cost: of `training_cost` or `heterofusion.runtime.ranks.cost_record`.
        seed: of what is random in it; None if nothing is.
        ran_source_models: whether models of the sources were run on their own bases.
        source_control: of what kind of control it is, if it is one; see `whole_control`.
    """
    return {
        "kind": kind,
        "method": method,
        "seed": seed,
        "ran_source_models": ran_source_models,
        "source_control": source_control,
        "cost": cost,
    }


def training_cost(metrics: Mapping[str, Any], resumed_from_step: int | None = None) -> dict[str, Any]:
    """Cost of a training on this rank, for `made_by`.

    Args:
        metrics: of the run; `train_runtime` is what it took, None if it is not among them.
        resumed_from_step: where it was resumed; its seconds count from there on, and the record says so.
    """
    seconds = metrics.get("train_runtime")
    cost = cost_record(0.0) | {"seconds": None} if seconds is None else cost_record(seconds)
    return cost if resumed_from_step is None else cost | {"resumed_from_step": resumed_from_step}


def find_record(folder: Path, weights_sha256: str | None = None) -> tuple[str, dict[str, Any]]:
    """Name and content of the record beside an adapter.

    Where other methods wrote into the folder before and left their records, it is the one that was written for these
    weights.

    Args:
        folder: of the adapter.
        weights_sha256: of its weights, if it is known already.

    Raises:
        AdapterError: there is none, or one is damaged; names it.
    """
    records = {name: read_json_object(folder / name) for name in RECORD_FILES if (folder / name).is_file()}
    names = list(records)
    if not names:
        raise AdapterError(f"{folder} holds no record of what made it: none of {', '.join(RECORD_FILES)}")
    if len(names) > 1:
        sha256 = weights_sha256 or file_sha256(folder / WEIGHTS_FILE)
        names = [name for name in names if records[name].get("weights_sha256") == sha256] or names
    return names[0], records[names[0]]


def record_control(record: Mapping[str, Any]) -> str | None:
    """Kind of the control that an adapter is by its record; None if it is none."""
    made = record.get("made_by")
    told = made.get("source_control") if isinstance(made, Mapping) else None
    return str(told) if told else control_kind(record.get("source_control"))


def initial_control(*adapters: LoraAdapter | None) -> dict[str, Any] | None:
    """What records tell of the adapters that something is made from, if one is a control itself.

    Args:
        adapters: what a training begins as, or what is merged; None for nothing.

    Returns:
        `name` and `kind` of the controls, several joined by `, ` and `+`; None if there is none, or nothing beside the
        adapters tells what made them.

    Raises:
        AdapterError: a record beside one is damaged; names it.
    """
    found = {display_name(a.name): kind for a in adapters if a is not None and (kind := _adapter_control(a))}
    return {"name": ", ".join(found), "kind": "+".join(dict.fromkeys(found.values()))} if found else None


def _adapter_control(adapter: LoraAdapter) -> str | None:
    if not any((adapter.folder / name).is_file() for name in RECORD_FILES):
        return None
    _, record = find_record(adapter.folder, adapter.sha256)
    if record.get("weights_sha256", adapter.sha256) != adapter.sha256:  # of other weights that lay there before
        return None
    return record_control(record)


def whole_control(
    sources: Mapping[str, Any] | None, labels: Mapping[str, Any] | None, initial: Mapping[str, Any] | None
) -> str | None:
    """Of what kind of control a training is, as `made_by` and tables have it; None if it is none.

    Args:
        sources: of `control_record`; its kind comes first, as it is.
        labels: of `labels_control`; with `labels:` before.
        initial: of `initial_control`; with `init:` before, unless the training is such a control itself.
    """
    kinds = [] if sources is None else str(sources["kind"]).split("+")
    kinds += [] if labels is None else [f"labels:{kind}" for kind in labels["kind"].split("+")]
    begun = [] if initial is None else [kind.removeprefix("init:") for kind in initial["kind"].split("+")]
    return "+".join([*kinds, *dict.fromkeys(f"init:{kind}" for kind in begun if kind not in kinds)]) or None


def refuse_push(control: str | None) -> None:
    """Refuse `--push_to_hub` of what will be a control, before it is trained.

    Raises:
        ValueError: it is one.
    """
    if control is not None:
        raise UserError(
            f"--push_to_hub is true, but this run makes a control ({control}), which is not published: leave "
            "--push_to_hub out, or train with the real sources, labels and adapters"
        )


def describe_controls(record: Mapping[str, Any]) -> str:
    """What a record tells of controls, in clauses; empty if it is none."""
    clauses = []
    if record.get("source_control"):
        clauses.append(describe_control(record["source_control"]))
    if labels := record.get("label_control"):
        clauses.append(describe_labels_control(labels))
    if initial := record.get("initial_control"):
        clauses.append(f"it was made from {initial['name']}, which is a control itself ({initial['kind']})")
    return "; ".join(clauses)


def library_versions() -> dict[str, str]:
    """Installed versions of the packages that a fused adapter depends on."""
    names = ("heterofusion", "torch", "transformers", "peft", "accelerate", "datasets", "safetensors")
    return {name: importlib.metadata.version(name) for name in names}


def fused_config(model: HeteroFusionModel) -> dict[str, Any]:
    """`adapter_config.json` of the fused adapter: the target's, for inference, with a base model named."""
    config = dict(model.plan.target.config)
    config["inference_mode"] = True
    if not config.get("base_model_name_or_path"):
        config["base_model_name_or_path"] = getattr(model.get_base_model().config, "name_or_path", None) or None
    return config


def provenance(
    model: HeteroFusionModel, training: dict[str, Any] | None = None, metrics: dict[str, Any] | None = None
) -> dict[str, Any]:
    """What `fusion.json` records: where every number of the adapter comes from. Local paths are cut to their names.

    Args:
        model: the trained model.
        training: plain values about the training. One of them, `resumed_from_step`, is recorded with the cost: the
            training of a resumed run is that of an uninterrupted one.
        metrics: plain values; their `train_runtime` is what the fusion took.
    """
    plan = model.plan
    control = control_record(plan.sources)
    training = dict(training or {})
    labels, initial = labels_control(training.get("source_labels")), initial_control(plan.target)
    cost = training_cost(metrics or {}, training.pop("resumed_from_step", None))
    return {
        "made_by": made_by(
            "fusion",
            "heterofusion",
            cost,
            seed=model.updates.seed,
            ran_source_models=is_labelled_by_sources(training.get("source_labels")),
            source_control=whole_control(control, labels, initial),
        ),
        "source_control": control,
        "label_control": labels,
        "initial_control": initial,
        "base_model": display_name(fused_config(model)["base_model_name_or_path"] or ""),
        "target": _adapter_record(plan.target),
        "basis": basis_record(plan.target),
        "sources": [_adapter_record(source) for source in plan.sources],
        "plan": {
            "layer_alignment": plan.layer_alignment,
            "transfer_ratio": str(plan.transfer_ratio),
            "aligned_modules": {key.name: len(members) for key, members in plan.groups.items()},
            "untouched_modules": len(plan.untouched),
            "layer_maps": [{str(i): j for i, j in pairs.items()} for pairs in plan.layer_maps],
        },
        "method": {**model.method.method_dict(), "seed": model.updates.seed},
        "hypernetwork": {
            **model.hypernetworks.config.to_dict(),
            "parameters": sum(p.numel() for p in model.hypernetworks.parameters()),
        },
        "training": training,
        "metrics": metrics or {},
        "versions": library_versions(),
    }


def basis_record(target: LoraAdapter | None) -> dict[str, Any] | None:
    """What was added to the rows of lora_A before training, with the hash of every lora_A; None if nothing was."""
    if not isinstance(target, ExpandedAdapter):
        return None
    return {
        **target.expansion.to_dict(),
        "anchor_sha256": target.anchor.sha256,
        "lora_A_sha256": target.expanded_sha256(),
    }


def describe_basis(record: Mapping[str, Any] | None) -> str:
    """What `basis_record` gave, as a sentence; empty if nothing was added."""
    if record is None:
        return ""
    kind = "random" if record["extra_basis"] == "random" else "the principal directions of the module's inputs"
    size = "as large as those of the adapter on real inputs" if record["scaled_by"] == INPUTS else "of the same norm"
    return (
        f"Every lora_A has {record['extra_rank']} rows more than that of the adapter it began as: {kind}, orthogonal "
        f"to its own, {size}."
    )


def describe_labels(record: dict[str, Any] | None) -> str:
    """What a training record holds of source labels, as a sentence; empty if there were none."""
    if record is None:
        return ""
    files = ", ".join(file["name"] for file in record["files"])
    share = record["replay_fraction"]
    rest = f"together with the replay, which was {share:.1%} of the examples" if share else "without any replay"
    soft = record.get("soft")
    loss = (
        f"\nAt {soft['soft']:.1%} of the labels' tokens it was also held to the source's own distribution, with "
        f"weight {soft['weight']:g}."
        if soft
        else ""
    )
    anchors = sum(sum(file["by_source"].get(ANCHOR, {}).values()) for file in record["files"])
    own = f"\n{anchors} of them are the anchor's own answers." if anchors else ""
    return (
        f"It was trained on {record['kept']} source labels ({files}), prompts that source experts answered,\n{rest}."
        f"{own}{loss}"
    )


def _adapter_record(adapter: LoraAdapter) -> dict[str, Any]:
    return {
        "name": display_name(adapter.name),
        "base_model": display_name(adapter.base_model or ""),
        "sha256": adapter.sha256,
    }


def model_card(record: dict[str, Any]) -> ModelCard:
    """A model card from a provenance record. The licence is left to the owner of the adapters."""
    base, control = record["base_model"], record_control(record)
    tags = ["heterofusion", "lora"]
    tags += ["adapter-fusion", f"base_model:adapter:{base}"] if base else []
    tags += ["control"] if control else []
    data = ModelCardData(
        base_model=base or None,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=tags,
    )
    sources = "\n".join(
        f"| source {index} | {source['name']} | {source['base_model'] or 'not named'} | `{source['sha256'][:12]}` |"
        for index, source in enumerate(record["sources"], start=1)
    )
    target = record["target"]
    basis = describe_basis(record["basis"])
    basis = f"\n{basis}\n" if basis else ""
    labels = describe_labels(record["training"].get("source_labels"))
    labels = f"\n{labels}\n" if labels else ""
    aligned = sum(record["plan"]["aligned_modules"].values())
    title = "Fused LoRA adapter"
    first = f"LoRA experts of {len(record['sources'])} source adapter(s) fused into one LoRA adapter of"
    if control is not None:
        title = f"CONTROL ({control}): not a fusion of its sources"
        whose = "them" if record["source_control"] else "what its sources know"
        first = (
            f"This adapter is a CONTROL: {describe_controls(record)},\nso it is not a fusion of {whose}. Such a "
            "fusion is compared with it to see what its sources contribute.\n\n"
            "It was made as one, as a LoRA adapter of"
        )
    body = f"""
# {title}

{first}
`{base or "the target model"}` with [HeteroFusion](https://arxiv.org/abs/2604.01674). It is an ordinary PEFT adapter:
`lora_A` is the target adapter's, `lora_B` of {aligned} aligned modules was updated,
{record["plan"]["untouched_modules"]} modules are the target's own.
{basis}{labels}
| part | adapter | base model | sha256 of its weights |
|---|---|---|---|
| target | {target["name"]} | {target["base_model"] or "not named"} | `{target["sha256"][:12]}` |
{sources}

## Use

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{base or "<base model>"}")
model = PeftModel.from_pretrained(model, "<this adapter>")
```
{_metrics_table(record["metrics"])}
## Provenance

`{PROVENANCE_FILE}` holds the hashes of all adapters, the alignment, all settings, seeds and library versions.
No licence is stated here: it follows from those of the base model, the adapters and the replay data.
"""
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{body}")


def _metrics_table(metrics: dict[str, Any]) -> str:
    shown = {name: value for name, value in metrics.items() if not name.endswith(_SPEEDS)}
    if not shown:
        return ""
    rows = "\n".join(
        f"| {name} | {value:.4f} |" if isinstance(value, float) else f"| {name} | {value} |"
        for name, value in shown.items()
    )
    return f"\n## Metrics\n\n| metric | value |\n|---|---|\n{rows}\n"
