"""The model card of an adapter, from its record. The licence is left to the owner of the adapters."""

from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from heterofusion.data.markdown import markdown_table
from heterofusion.publish.record import FILE_OF_KIND, describe_control, record_control

CARD_FILE = "README.md"
_TITLES = {
    "fusion": "Fused LoRA adapter",
    "merge": "Merged LoRA adapter",
    "distillation": "Distilled LoRA adapter",
    "tuning": "LoRA expert",
}
_PARTS = ("init_adapter", "target", "sources", "teachers", "adapters")
_COLUMNS = ("name", "base_model", "sha256", "weight", "picked")
_TEMPLATE = """\
---
{{ card_data }}
---

# {{ title }}
{% if control %}
This adapter is a CONTROL: {{ control }}.
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


def model_card(record: Mapping[str, Any], about: str) -> ModelCard:
    """The card of an adapter with a record of `make_record`; `about` says what it is and how it was made."""
    base, kind, control = record["base_model"], record["made_by"]["kind"], record_control(record)
    speeds = ("_runtime", "_per_second", "epoch")  # figures of the run, not of the adapter
    metrics = [pair for pair in (record.get("metrics") or {}).items() if not pair[0].endswith(speeds)]
    adapter_of = [f"base_model:adapter:{base}"] if base else []
    data = ModelCardData(
        base_model=base or None,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["lora", "heterofusion", kind, *adapter_of, *(["control"] if control else [])],
    )
    return ModelCard.from_template(
        data,
        template_str=_TEMPLATE,
        title=f"CONTROL ({control}): {_TITLES[kind]}" if control else _TITLES[kind],
        control=describe_control(control) if control else None,
        about=about.strip(),
        parts=_parts(record),
        metrics=markdown_table(["metric", "value"], metrics) if metrics else "",
        base=base,
        file=FILE_OF_KIND[kind],
    )


def _parts(record: Mapping[str, Any]) -> str:
    """A table of the adapters that this one is made from."""
    found: list[tuple[str, Mapping[str, Any]]] = []
    for key in _PARTS:
        entries, role = record.get(key) or [], key.removesuffix("s")
        several = [(f"{role} {index}", entry) for index, entry in enumerate(entries, start=1)]
        found += [(role, entries)] if isinstance(entries, Mapping) else several
    columns = [key for key in _COLUMNS if any(key in entry for _, entry in found)]
    cells = [[str(entry.get(key) or "")[: 12 if key == "sha256" else None] for key in columns] for _, entry in found]
    rows = [[role, *line] for (role, _), line in zip(found, cells, strict=True)]
    return markdown_table(["part", *columns], rows) if rows else ""
