"""A merged adapter as an ordinary PEFT folder, with a model card and `merge.json`."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn

from heterofusion.adapters.lora import CONFIG_FILE, PICKLE_FILE, PREFIX, TOKENIZER_FILES, WEIGHTS_FILE, load_adapter
from heterofusion.merging.arguments import MergeError
from heterofusion.merging.factors import Factors
from heterofusion.method.diagnostics import DIAGNOSTICS_FILE
from heterofusion.publish.record import CARD_FILE, MERGE_FILE, RECORD_FILES, describe_controls, record_control
from heterofusion.runtime.files import file_sha256, is_failed_write, staging_folder

_STAGING = ".merge-"


def write_adapter(
    folder: Path,
    factors: Mapping[str, Factors],
    scale: float,
    dtype: torch.dtype,
    base_model: str | None,
    linear_layers: Sequence[str],
) -> None:
    """Write weights and config of an adapter of scaling 1, and read them back.

    Args:
        folder: made if missing.
        factors: A (rank, in_features) and B (out_features, rank) by module, float32.
        scale: factor of B.
        dtype: of the written weights.
        base_model: the config's `base_model_name_or_path`.
        linear_layers: paths of all linear layers of the base; they tell whether short names reach other modules too.

    Raises:
        MergeError: a weight is out of range for the dtype.
    """
    weights: dict[str, Tensor] = {}
    for path, (A, B) in factors.items():
        for name, tensor in (("lora_A", A), ("lora_B", B * scale)):
            cast = tensor.to(dtype).contiguous()
            if not torch.isfinite(cast).all():
                raise MergeError(
                    f"merged {path}.{name} is out of range for {str(dtype).removeprefix('torch.')}; give --dtype "
                    "float32, or a lower --merge_lambda"
                )
            weights[f"{PREFIX}{path}.{name}.weight"] = cast
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / WEIGHTS_FILE, {"format": "pt"})
    merged_config({path: A.shape[0] for path, (A, _) in factors.items()}, base_model, linear_layers).save_pretrained(
        str(folder)
    )
    shutil.copymode(folder / CONFIG_FILE, folder / WEIGHTS_FILE)  # safetensors writes for the owner alone
    load_adapter(folder)  # what could not be read is not kept


def merged_config(ranks: Mapping[str, int], base_model: str | None, linear_layers: Sequence[str]) -> LoraConfig:
    """PEFT's config of modules with these ranks, with `lora_alpha = r` for each.

    Args:
        ranks: rank by module path.
        base_model: `base_model_name_or_path`.
        linear_layers: paths of all linear layers of the base.
    """
    r = Counter(ranks.values()).most_common(1)[0][0]
    others = {path: rank for path, rank in ranks.items() if rank != r}
    short = sorted({path.rpartition(".")[2] for path in ranks})
    reached = {path for path in linear_layers if path.rpartition(".")[2] in short}
    return LoraConfig(
        task_type="CAUSAL_LM",
        inference_mode=True,
        base_model_name_or_path=base_model,
        r=r,
        lora_alpha=r,
        lora_dropout=0.0,
        rank_pattern=others,
        alpha_pattern=dict(others),
        target_modules=short if reached == ranks.keys() else sorted(ranks),
    )


def linear_layers(model: nn.Module) -> list[str]:
    """Paths of what PEFT can put LoRA on in a base (on the meta device will do): all leaves with a matrix."""
    return [
        path
        for path, module in model.named_modules()
        if not list(module.children()) and getattr(getattr(module, "weight", None), "dim", lambda: 0)() == 2
    ]


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Carry the tokenizer beside an adapter along, if there is one."""
    for pattern in TOKENIZER_FILES:
        for file in source.glob(pattern):
            if file.is_file():
                target = folder / file.relative_to(source)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write the model card and, last, `merge.json`."""
    (folder / CARD_FILE).write_text(str(model_card(record)), encoding="utf-8")
    record = {**record, "weights_sha256": file_sha256(folder / WEIGHTS_FILE)}
    text = json.dumps(record, indent=2, ensure_ascii=False, sort_keys=True) + "\n"
    (folder / MERGE_FILE).write_text(text, encoding="utf-8")


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """A staging folder in the output folder; neither is left behind by a failure, if the latter is new."""
    is_new = not output.exists()
    try:
        with staging_folder(output, _STAGING) as staging:
            yield staging
    except BaseException as error:  # an interruption too
        if is_new and output.is_dir() and not any(output.iterdir()):
            output.rmdir()
        if is_failed_write(error) and not isinstance(error, OSError):
            raise OSError(f"the merge could not be written to {output} ({error}); nothing is left of it") from error
        raise


def move_adapter(staging: Path, folder: Path) -> None:
    """Move a finished adapter into place; records, tokenizers and pickles of what was there before go.

    `merge.json` goes last: where it stands, the adapter beside it is complete.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*RECORD_FILES, DIAGNOSTICS_FILE, PICKLE_FILE):
        (folder / name).unlink(missing_ok=True)
    for pattern in TOKENIZER_FILES:
        for stale in folder.glob(pattern):
            if stale.is_file():
                stale.unlink()
    files = sorted(path.relative_to(staging) for path in staging.rglob("*") if path.is_file())
    for file in sorted(files, key=lambda file: file == Path(MERGE_FILE)):
        (folder / file).parent.mkdir(exist_ok=True)
        os.replace(staging / file, folder / file)


def model_card(record: Mapping[str, Any]) -> ModelCard:
    """A model card from a record. The licence is left to the owner of the adapters."""
    base, control = record["base_model"], record_control(record)
    data = ModelCardData(
        base_model=base or None,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["lora", "merge", *([f"base_model:adapter:{base}"] if base else []), *(["control"] if control else [])],
    )
    experts = "\n".join(
        f"| {expert['name']} | {expert['weight']:g} | `{expert['sha256'][:12]}` |" for expert in record["adapters"]
    )
    values = ", ".join(f"{name} {value:g}" for name, value in record["hyperparameters"].items())
    seed = record["made_by"]["seed"]
    settings = "".join(f", {part}" for part in (values, "" if seed is None else f"seed {seed}") if part)
    title = "Merged LoRA adapter" if control is None else f"CONTROL ({control}): merged LoRA adapter"
    told = "" if control is None else f"\nThis adapter is a CONTROL: {describe_controls(record)}.\n"
    body = f"""
# {title}
{told}
{len(record["adapters"])} LoRA experts of `{base or "one base model"}`, merged by `{record["method"]}`{settings}. It is
an ordinary PEFT adapter.
{_task_note(record)}
| expert | weight | sha256 of its weights |
|---|---|---|
{experts}

{truncation_text(record["truncation"])}
{_scores(record)}
## Use

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{base or "<base model>"}")
model = PeftModel.from_pretrained(model, "<this adapter>")
```

`{MERGE_FILE}` holds the hashes of all adapters, all settings, scores, cost and library versions. No licence is stated
here: it follows from those of the base model and the adapters.
"""
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{body}")


def truncation_text(truncation: Mapping[str, Any]) -> str:
    """One sentence on what was lost when the merged update was cut to its rank."""
    rank = truncation["rank"]
    if truncation["exact"]:
        return f"Rank up to {rank}: exact but for the rounding of the weights to {truncation['dtype']}."
    return (
        f"Cut to rank {rank} at most by SVD: {truncation['overall']:.2%} of the merged update's energy (squared norm) "
        f"is lost, {truncation['max']:.2%} in the module that loses most ({truncation['max_module']})."
    )


def _task_note(record: Mapping[str, Any]) -> str:
    task = record["task"]
    if task is None:
        return ""
    return (
        f"\n**The task must be known at inference:** this is one of {len(record['adapters'])} adapters, the one for "
        f"the task of `{task}`; the right one has to be chosen for every input.\n"
    )


def _scores(record: Mapping[str, Any]) -> str:
    validation = record["validation"]
    if validation is None:
        return ""
    rows = "\n".join(f"| {label} | {entry['score']:.4f} |" for label, entry in validation["adapter"].items())
    chosen = "\nThe hyper-parameters were chosen by the mean of these scores.\n" if record["search"] else ""
    return f"\n## Scores on the validation data\n\n| data set | score |\n|---|---|\n{rows}\n{chosen}"
