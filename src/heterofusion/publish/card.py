"""The model card of an adapter, from its record. The licence is left to the owner of the adapters."""

from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from heterofusion.publish.record import FILE_OF_KIND, describe_control, record_control

_TITLES = {
    "fusion": "Fused LoRA adapter",
    "merge": "Merged LoRA adapter",
    "distillation": "Distilled LoRA adapter",
    "tuning": "LoRA expert",
}
_TAGS = {"fusion": ["heterofusion", "adapter-fusion"], "merge": ["merge"], "distillation": ["distillation"]}
_PARTS = {
    "init_adapter": "begun as",
    "target": "target",
    "sources": "source",
    "teachers": "teacher",
    "adapters": "expert",
}
_COLUMNS = {"name": "adapter", "base_model": "base model", "sha256": "sha256 of its weights", "weight": "weight",
            "picked": "picked"}  # fmt: skip
_SPEEDS = ("_runtime", "_per_second", "epoch")  # figures of the run, not of the adapter
_TEMPLATE = """\
---
{{ card_data }}
---

# {{ title }}
{% if control %}
This adapter is a CONTROL: {{ control }}.
An adapter that is none is compared with it to see what the real ones contribute.
{% endif %}
{{ about }}
{% if parts %}
{{ parts }}
{% endif %}{% if metrics %}
## Metrics

{{ metrics }}
{% endif %}
## Use

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{{ base or '<base model>' }}")
model = PeftModel.from_pretrained(model, "<this adapter>")
```

`{{ file }}` holds the hashes of all that it was made from, all settings, seeds, metrics, cost and library versions.
No licence is stated here: it follows from those of the base model, the adapters and the data.
"""


def model_card(record: Mapping[str, Any], about: str, name: str) -> ModelCard:
    """The card of an adapter.

    Args:
        record: of `make_record`. Its `metrics` are shown; those that begin with `eval_` are the model index.
        about: paragraphs that say what it is and how it was made.
        name: of the model.
    """
    base, kind, control = record["base_model"], record["made_by"]["kind"], record_control(record)
    metrics = {key: value for key, value in (record.get("metrics") or {}).items() if not key.endswith(_SPEEDS)}
    scores = {key.removeprefix("eval_"): value for key, value in metrics.items() if key.startswith("eval_")}
    results = [
        EvalResult("text-generation", "custom", "evaluation data of the run", metric, value)
        for metric, value in scores.items()
        if isinstance(value, (int, float))
    ]
    tags = ["lora", *_TAGS.get(kind, []), *([f"base_model:adapter:{base}"] if base else [])]
    data = ModelCardData(
        base_model=base or None,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=[*tags, *(["control"] if control else [])],
        model_name=name if results else None,
        eval_results=results or None,
    )
    title = _TITLES[kind] if control is None else f"CONTROL ({control}): {_TITLES[kind]}"
    return ModelCard.from_template(
        data,
        template_str=_TEMPLATE,
        title=title,
        control=describe_control(control),
        about=about.strip(),
        parts=_parts(record),
        metrics=_table(["metric", "value"], [[key, _shown(value)] for key, value in metrics.items()]),
        base=base,
        file=FILE_OF_KIND[kind],
    )


def _parts(record: Mapping[str, Any]) -> str:
    """A table of the adapters that this one is made from."""
    found: list[tuple[str, Mapping[str, Any]]] = []
    for key, role in _PARTS.items():
        entries = record.get(key) or []
        if isinstance(entries, Mapping):
            found.append((role, entries))
        else:
            found += [(f"{role} {index}", entry) for index, entry in enumerate(entries, start=1)]
    columns = [key for key in _COLUMNS if any(key in entry for _, entry in found)]
    rows = [
        [role, *(_shown(entry.get(key) or "", 12 if key == "sha256" else None) for key in columns)]
        for role, entry in found
    ]
    return _table(["part", *(_COLUMNS[key] for key in columns)], rows)


def _shown(value: Any, cut: int | None = None) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"`{value[:cut]}`" if cut and value else str(value)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if rows else ""
