"""The provenance record: one JSON file beside every adapter that is made here, fit for publishing from the start."""

import hashlib
import importlib.metadata
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from heterofusion.adapters.controls import SOURCE_CONTROLS, control_kind, control_record
from heterofusion.adapters.lora import WEIGHTS_FILE, LoraAdapter
from heterofusion.data.labels import ANCHOR, is_labelled_by_sources
from heterofusion.method.expansion import INPUTS, ExpandedAdapter
from heterofusion.method.model import HeteroFusionModel
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.files import display_name, file_sha256, read_json_object
from heterofusion.runtime.ranks import cost_record

FILE_OF_KIND = {"fusion": "fusion.json", "merge": "merge.json", "distillation": "distillation.json",
                "tuning": "expert.json"}  # fmt: skip

_PATH_KEY = re.compile(r"(name_or_path|_file|_path|_dir)$")
_ABSOLUTE = re.compile(r"(file:|~?/|\\\\|[A-Za-z]:[\\/]).*")  # of Linux, macOS and Windows: adapters travel
# Texts of a tokenizer that must stay as they are: a token may well be a slash.
_VERBATIM_KEY = re.compile(r"(_tokens?|_template|_schema|_decoder)$")
_SECRET_KEY = re.compile(r"(|use_auth_|auth_|access_)token")  # old versions kept how the tokenizer was downloaded
_TOKEN = re.compile(r"\b(hf_oauth_[\w.-]{20,}|(hf|api_org)_[A-Za-z0-9]{20,})")

_CONTROLS = {
    **SOURCE_CONTROLS,
    "labels:bases": "the source labels are those of the sources' base models without their adapters",
    "labels:shuffle": "the source labels are those of sources that were chosen for other tasks",
    "labels:anchor": "the source labels are those of the anchor itself in place of the sources",
}


def make_record(
    kind: str,  # a key of `FILE_OF_KIND`, or `ensemble`
    method: str,  # within its kind, such as `ties`
    base_model: str | None,
    cost: Mapping[str, Any],
    /,
    *,
    seed: int | None = None,  # of what is random in it
    ran_source_models: bool = False,  # on their own bases
    control: str | None = None,  # see `join_controls`
    **parts: Any,
) -> dict[str, Any]:
    """The record of an adapter, without local paths and tokens; `write_adapter` adds `weights_sha256`.

    `parts` are plain values of the kind: adapters, settings, data, `metrics`, ...; `method` may be one of them. All
    kinds have the same `made_by`, so that tables can set methods side by side.
    """
    made_by = {"kind": kind, "method": method, "seed": seed, "source_control": control, "cost": cost}
    made_by["ran_source_models"] = ran_source_models
    base = display_name(base_model or "")
    return publishable({"base_model": base, "made_by": made_by, **parts, "versions": library_versions()})


def training_cost(metrics: Mapping[str, Any], resumed_from_step: int | None = None) -> dict[str, Any]:
    """Cost of a training on this rank: its `train_runtime`, which counts from where it was resumed."""
    seconds = metrics.get("train_runtime")
    cost = cost_record(seconds or 0.0) | ({"seconds": None} if seconds is None else {})
    return cost if resumed_from_step is None else cost | {"resumed_from_step": resumed_from_step}


def adapter_record(adapter: LoraAdapter, **more: Any) -> dict[str, Any]:
    """Name, base model and hashes of an adapter that something is made from."""
    config = json.dumps(adapter.config, sort_keys=True, default=str).encode()
    hashes = {"sha256": adapter.sha256, "config_sha256": hashlib.sha256(config).hexdigest()}
    base = display_name(adapter.base_model or "")
    return {"name": display_name(adapter.name.rstrip("/")), "base_model": base, **hashes, **more}


def library_versions() -> dict[str, str]:
    """Installed versions of the packages that an adapter depends on."""
    names = ("heterofusion", "torch", "transformers", "peft", "accelerate", "datasets", "safetensors")
    return {name: importlib.metadata.version(name) for name in names}


def find_record(folder: Path, weights_sha256: str | None = None) -> tuple[str, dict[str, Any]] | None:
    """File name and content of the record that was written for the weights beside it; None if there is none."""
    for name in FILE_OF_KIND.values():
        if (folder / name).is_file():
            record = read_json_object(folder / name)
            if not isinstance(made_by := record.get("made_by", {}), dict):
                raise UserError(f"{folder / name}: made_by is {made_by!r}, an object was expected; download it again")
            weights_sha256 = weights_sha256 or file_sha256(folder / WEIGHTS_FILE)
            if record.get("weights_sha256", weights_sha256) == weights_sha256:
                return name, record
    return None


# ---- controls ---------------------------------------------------------------------------------------------------


def join_controls(*controls: str | None) -> str | None:
    """ONE string for all the controls in what something is made from, such as `noise+labels:shuffle`; None if none."""
    return "+".join(dict.fromkeys(part for control in controls if control for part in control.split("+"))) or None


def control_of(*adapters: LoraAdapter | None) -> str | None:
    """The control that adapters are by the records beside them: what is made from a control is that control."""
    found = [find_record(adapter.folder, adapter.sha256) for adapter in adapters if adapter is not None]
    return join_controls(*(record_control(record) for _, record in filter(None, found)))


def record_control(record: Mapping[str, Any]) -> str | None:
    """Which control an adapter is by its record; None if it is none."""
    return record.get("made_by", {}).get("source_control")


def label_control(labels: Mapping[str, Any] | None) -> str | None:
    """The control among source labels, as a training records them."""
    kinds = [kind for file in (labels or {}).get("files", []) for kind in (file.get("control") or "").split("+")]
    return join_controls(*(f"labels:{kind}" for kind in kinds if kind))


def describe_control(control: str) -> str:
    """A control in words: clauses without an end."""
    return "; ".join(_CONTROLS.get(part, part) for part in control.split("+"))


def refuse_push(control: str | None) -> None:
    """Refuse `--push_to_hub` of what will be a control, before it is trained."""
    if control is not None:
        told = f"--push_to_hub is true, but this run makes a control ({control}), which is not published"
        raise UserError(f"{told}: leave it out, or train with the real sources, labels and adapters")


def publishable(value: Any, roots: Iterable[str] = ()) -> Any:
    """A JSON value, or a text, without tokens and with the last part alone of local paths.

    Paths that begin with the user's home or with one of the `roots` are cut inside of longer texts too.
    """
    places = {place.rstrip("/") for place in (os.path.expanduser("~"), *roots) if os.path.isabs(place)} - {""}
    longest_first = "|".join(map(re.escape, sorted(places, key=len, reverse=True))) or "(?!)"
    return _clean(value, re.compile(rf"(?<![\w./-])({longest_first})(/[^\s\"'`|<>()\[\]{{}},;]*)?(?![\w-])"))


def _clean(value: Any, inside: re.Pattern[str], key: str = "") -> Any:
    if isinstance(value, Mapping):
        return {
            name: item if _VERBATIM_KEY.search(str(name)) else _clean(item, inside, str(name))
            for name, item in value.items()
            if not _SECRET_KEY.fullmatch(str(name))
        }
    if isinstance(value, (list, tuple)):
        return [_clean(item, inside, key) for item in value]
    if not isinstance(value, str):
        return value
    if "\n" not in value and (_PATH_KEY.search(key) or _ABSOLUTE.fullmatch(value)):
        return display_name(value)
    return without_tokens(inside.sub(lambda match: display_name(match.group()), value))


def without_tokens(text: str) -> str:
    """A text in which `<token>` stands for each Hub token."""
    return _TOKEN.sub("<token>", text)


# ---- the record of a fusion, and what others tell as it does ----------------------------------------------------


def fused_config(model: HeteroFusionModel) -> dict[str, Any]:
    """`adapter_config.json` of the fused adapter: the target's, for inference, with a base model named."""
    config = {**model.plan.target.config, "inference_mode": True}
    if not config.get("base_model_name_or_path"):
        config["base_model_name_or_path"] = getattr(model.get_base_model().config, "name_or_path", None) or None
    return config


def fusion_record(
    model: HeteroFusionModel, training: Mapping[str, Any] | None = None, metrics: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What `fusion.json` tells; `resumed_from_step` of the training is recorded with the cost."""
    plan = model.plan
    training = dict(training or {})
    labels = training.get("source_labels")
    sources = control_record(plan.sources)
    return make_record(
        "fusion",
        "heterofusion",
        fused_config(model)["base_model_name_or_path"],
        training_cost(metrics or {}, training.pop("resumed_from_step", None)),
        seed=model.seed,
        ran_source_models=is_labelled_by_sources(labels),
        control=join_controls(control_kind(sources), label_control(labels), control_of(plan.target)),
        source_control=sources,
        target=adapter_record(plan.target),
        basis=basis_record(plan.target),
        sources=[adapter_record(source) for source in plan.sources],
        plan={
            "layer_alignment": plan.layer_alignment,
            "transfer_ratio": str(plan.transfer_ratio),
            "aligned_modules": {key.name: len(members) for key, members in plan.groups.items()},
            "untouched_modules": len(plan.untouched),
            "layer_maps": [{str(i): j for i, j in pairs.items()} for pairs in plan.layer_maps],
        },
        method={**model.method.method_dict(), "seed": model.seed},
        hypernetwork={
            **model.hypernetworks.config.to_dict(),
            "parameters": sum(p.numel() for p in model.hypernetworks.parameters()),
        },
        training=training,
        metrics=dict(metrics or {}),
    )


def about_fusion(record: Mapping[str, Any]) -> str:
    """What the card of a fusion tells."""
    aligned = sum(record["plan"]["aligned_modules"].values())
    text = (
        f"LoRA experts of {len(record['sources'])} source adapter(s) fused into one LoRA adapter of "
        f"`{record['base_model'] or 'the target model'}` with [HeteroFusion](https://arxiv.org/abs/2604.01674). "
        f"`lora_A` is the target adapter's, `lora_B` of {aligned} aligned modules was updated, "
        f"{record['plan']['untouched_modules']} modules are the target's own."
    )
    told = [describe_basis(record["basis"]), describe_labels(record["training"].get("source_labels"))]
    return "\n\n".join([text, *filter(None, told)])


def basis_record(target: LoraAdapter | None) -> dict[str, Any] | None:
    """What was added to the rows of lora_A before training, with the hash of every lora_A; None if nothing was."""
    if not isinstance(target, ExpandedAdapter):
        return None
    hashes = {"anchor_sha256": target.anchor.sha256, "lora_A_sha256": target.expanded_sha256()}
    return {**target.expansion.to_dict(), **hashes}


def describe_basis(record: Mapping[str, Any] | None) -> str:
    """What `basis_record` gave, as a sentence; empty if nothing was added."""
    if record is None:
        return ""
    kind = "random" if record["extra_basis"] == "random" else "the principal directions of the module's inputs"
    size = "as large as those of the adapter on real inputs" if record["scaled_by"] == INPUTS else "of the same norm"
    rows = f"Every lora_A has {record['extra_rank']} rows more than that of the adapter it began as"
    return f"{rows}: {kind}, orthogonal to its own, {size}."


def describe_labels(record: Mapping[str, Any] | None) -> str:
    """What a training record holds of source labels, in sentences; empty if there were none."""
    if record is None:
        return ""
    files = ", ".join(file["name"] for file in record["files"])
    share, soft = record["replay_fraction"], record.get("soft")
    rest = f"together with the replay, which was {share:.1%} of the examples" if share else "without any replay"
    text = f"It was trained on {record['kept']} source labels ({files}), prompts that source experts answered, {rest}."
    if anchors := sum(sum(file["by_source"].get(ANCHOR, {}).values()) for file in record["files"]):
        text += f" {anchors} of them are the anchor's own answers."
    if soft:
        held = f"At {soft['soft']:.1%} of the labels' tokens it was also held to the source's own distribution"
        text += f" {held}, with weight {soft['weight']:g}."
    return text
