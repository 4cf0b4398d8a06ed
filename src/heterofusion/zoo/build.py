"""Builds the zoo: tokenizers, bases, experts, and the manifest with what they score.

Every step is seeded and runs on the CPU in fp32 with one thread, so that a rebuild gives the same scores; what is
written is fp16, and scored as written. `recipes/build_zoo.py` is the command.
"""

import json
import logging
import pathlib
import platform
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

import peft
import torch
import transformers
from datasets import Dataset
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Trainer, TrainingArguments

from heterofusion.data.files import Records
from heterofusion.data.markdown import markdown_table
from heterofusion.data.replay import DatasetReport, as_dataset, encode_records, make_collator
from heterofusion.evaluation.uie import score_answers
from heterofusion.experts.generation import AnswerGenerator
from heterofusion.runtime.errors import UserError
from heterofusion.training.config import LoraArguments
from heterofusion.training.expert import choose_lora
from heterofusion.zoo.corpus import pretraining_documents
from heterofusion.zoo.families import FAMILY_SPECS, MAX_POSITIONS, new_base, train_tokenizer
from heterofusion.zoo.language import LANGUAGE_SEED, TASKS, make_examples

logger = logging.getLogger(__name__)

BASE: dict[str, Any] = {"steps": 5000, "batch": 8, "learning_rate": 3e-3, "block": 128}
EXPERT: dict[str, Any] = {"steps": 500, "batch": 16, "learning_rate": 4e-3, "examples": 6000}
LORA: dict[str, Any] = {"r": 8, "lora_alpha": 16}
ROLES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TEST_EXAMPLES = 100
MAX_NEW_TOKENS = 48


def build_base(family: str, folder: pathlib.Path, seed: int = 0, progress: bool = True) -> float:
    """Trains tokenizer and base of a family from scratch and writes both; gives the loss at the end, per token."""
    tokenizer = train_tokenizer(family, seed)
    model = new_base(family, tokenizer, seed)
    blocks = _text_blocks(tokenizer, BASE["steps"] * BASE["batch"], BASE["block"], seed)
    loss = _train(model, tokenizer, blocks, BASE, seed, progress, weight_decay=0.01)
    shutil.rmtree(folder, ignore_errors=True)
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return loss


def load_base(folder: pathlib.Path, family: str) -> tuple[PreTrainedModel, Any]:
    """A base in fp32, under the name that adapters record as their base, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.name_or_path = model.config._name_or_path = f"heterofusion-zoo/{family}"
    return model, AutoTokenizer.from_pretrained(folder)


def build_expert(
    family: str, task: str, base: pathlib.Path, folder: pathlib.Path, seed: int = 0, progress: bool = True
) -> float:
    """Trains the LoRA expert of one task and writes it in fp16; gives the loss at the end, per answer token."""
    model, tokenizer = load_base(base, family)
    lora = LoraArguments(**LORA, lora_dropout=0.0, target_modules=list(ROLES))
    expert = choose_lora(model, lora, seed).put_on(model, seed)
    examples = _encoded(make_examples(task, "train", EXPERT["examples"], seed), tokenizer)
    loss = _train(expert, tokenizer, examples, EXPERT, seed, progress)
    shutil.rmtree(folder, ignore_errors=True)
    expert.half().save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    return loss


def score_tasks(
    model: Any, tokenizer: Any, tasks: Iterable[str], count: int = TEST_EXAMPLES, seed: int = 0, progress: bool = True
) -> dict[str, float]:
    """Micro-F1 of a model, with or without an adapter, on test examples of each task."""
    scores: dict[str, float] = {}
    for task in tasks:
        examples = make_examples(task, "test", count, seed)
        prompts = {i: tokenizer(example["prompt"])["input_ids"] for i, example in enumerate(examples)}
        batches = AnswerGenerator(model, tokenizer, MAX_NEW_TOKENS, batch_size=50).answers(prompts)
        bar = tqdm(batches, desc="Generating", unit="batch", disable=not progress)
        found = {answer.index: answer.text for batch in bar for answer in batch}
        answers = [found[i] for i in range(len(examples))]
        scores[task] = float(score_answers(answers, [example["completion"] for example in examples])["f1"])
    return scores


def _text_blocks(tokenizer: Any, count: int, length: int, seed: int) -> list[dict[str, list[int]]]:
    """Blocks of pretraining text, documents packed without padding."""
    documents = pretraining_documents(seed)
    stream: list[int] = []
    while len(stream) < count * length:
        for ids in tokenizer([next(documents) for _ in range(256)])["input_ids"]:
            stream += [*ids, tokenizer.eos_token_id]
    blocks = [stream[i * length : (i + 1) * length] for i in range(count)]
    return [{"input_ids": ids, "attention_mask": [1] * length, "labels": ids} for ids in blocks]


def _encoded(examples: list[dict[str, Any]], tokenizer: Any) -> Dataset:
    report = DatasetReport("zoo", "prompt_completion", len(examples))
    rows = Records("zoo", examples)
    return as_dataset(encode_records(rows, range(len(examples)), report, MAX_POSITIONS, tokenizer)[0])


def _train(
    model: Any, tokenizer: Any, examples: Any, how: Mapping[str, Any], seed: int, progress: bool, **options: Any
) -> float:
    """Trains what requires a gradient: 5% warm-up, then a cosine down to a twentieth; gives the last mean loss."""
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            max_steps=how["steps"],
            per_device_train_batch_size=how["batch"],
            learning_rate=how["learning_rate"],
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr_rate": 0.05},
            warmup_steps=round(0.05 * how["steps"]),
            adam_beta2=0.98,
            logging_steps=min(50, how["steps"]),
            save_strategy="no",
            report_to="none",
            seed=seed,
            use_cpu=True,
            disable_tqdm=not progress,
            **options,
        )
        trainer = Trainer(model, args, make_collator(tokenizer), examples)
        trainer.train()
    model.eval()
    model.config.use_cache = True  # Trainer switched it off
    return [line["loss"] for line in trainer.state.log_history if "loss" in line][-1]


def build_zoo(
    output_dir: pathlib.Path,
    families: Sequence[str] = tuple(FAMILY_SPECS),
    tasks: Sequence[str] = tuple(TASKS),
    seed: int = 0,
    only: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Builds bases and experts (or `only` one of "base", "experts") and their `manifest.json`, which it gives back."""
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    for family in families:
        base = output_dir / family / "base"
        entry: dict[str, Any] = {}
        if only != "experts":
            start = time.perf_counter()
            entry["base_loss"] = round(build_base(family, base, seed, progress), 4)
            entry["base_seconds"] = round(time.perf_counter() - start)
            entry["parameters"] = load_base(base, family)[0].num_parameters()
            logger.info("%s: base of %d parameters, %d s", family, entry["parameters"], entry["base_seconds"])
        if only != "base":
            if not base.is_dir():
                raise UserError(f"{base} is missing; build it first, without --only experts")
            entry["experts"] = {task: _build_and_score(family, task, output_dir, seed, progress) for task in tasks}
        _write_manifest(output_dir, family, entry, seed)
    return json.loads((output_dir / "manifest.json").read_text(encoding="utf-8"))


def _build_and_score(family: str, task: str, output_dir: pathlib.Path, seed: int, progress: bool) -> dict[str, Any]:
    """One expert built, and its entry in the manifest."""
    base, folder = output_dir / family / "base", output_dir / family / task
    start = time.perf_counter()
    loss = build_expert(family, task, base, folder, seed, progress)
    seconds = round(time.perf_counter() - start)
    model, tokenizer = load_base(base, family)
    scores = score_tasks(PeftModel.from_pretrained(model, folder), tokenizer, TASKS, progress=False)
    foreign = fmean(score for name, score in scores.items() if name != task)
    logger.info("%s/%s: own %.3f, foreign %.3f, %d s", family, task, scores[task], foreign, seconds)
    rounded = {name: round(score, 4) for name, score in scores.items()}
    found = {"f1": rounded[task], "foreign_mean_f1": round(foreign, 4), "scores": rounded}
    return {**found, "loss": round(loss, 4), "seconds": seconds}


def folder_bytes(folder: pathlib.Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _write_manifest(output_dir: pathlib.Path, family: str, built: Mapping[str, Any], seed: int) -> None:
    """Puts what was built of one family into the manifest; entries of everything else are kept."""
    path = output_dir / "manifest.json"
    manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"families": {}}
    entry = manifest["families"].setdefault(family, {})
    experts = {**entry.get("experts", {}), **built.get("experts", {})}
    entry.update(built)
    entry["experts"] = {task: experts[task] for task in TASKS if task in experts}
    entry["bytes"] = folder_bytes(output_dir / family)
    manifest["families"] = {name: manifest["families"][name] for name in FAMILY_SPECS if name in manifest["families"]}
    manifest["bytes"] = sum(part["bytes"] for part in manifest["families"].values())
    settings = {"seed": seed, "language_seed": LANGUAGE_SEED, "base": BASE, "expert": EXPERT | LORA}
    manifest["settings"] = {**settings, "test_examples": TEST_EXAMPLES}
    versions = {module.__name__: module.__version__ for module in (torch, transformers, peft)}
    manifest["versions"] = {"python": platform.python_version(), **versions}
    path.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def score_table(manifest: Mapping[str, Any]) -> str:
    """F1, a row per family: experts on their own tasks, and the mean of all on foreign ones."""
    rows = []
    for family, entry in manifest["families"].items():
        experts = entry.get("experts", {})
        foreign = fmean(each["foreign_mean_f1"] for each in experts.values()) if experts else None
        rows.append([family, *(experts.get(task, {}).get("f1") for task in TASKS), foreign])
    return markdown_table(["family (F1)", *TASKS, "foreign"], rows)
