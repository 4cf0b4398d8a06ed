"""Builds the zoo: tokenizers, bases, experts, and the manifest with what they score.

Every step is seeded and runs on the CPU in fp32 with one thread, so that a rebuild gives the same scores; what is
written is fp16, and scored as written. `recipes/build_zoo.py` is the command.
"""

from __future__ import annotations

import json
import logging
import pathlib
import platform
import shutil
import time
from collections.abc import Iterable, Mapping
from typing import Any

import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from heterofusion.evaluation.uie import score_answers
from heterofusion.experts.generation import generate_answers
from heterofusion.runtime.errors import UserError
from heterofusion.zoo.families import FAMILY_SPECS, new_base, train_tokenizer
from heterofusion.zoo.language import LANGUAGE_SEED, TASKS, make_examples
from heterofusion.zoo.training import example_batches, text_batches, train

logger = logging.getLogger(__name__)

BASE_STEPS, BASE_BATCH, BASE_BLOCK, BASE_LR = 5000, 8, 128, 3e-3
EXPERT_STEPS, EXPERT_BATCH, EXPERT_LR, EXPERT_EXAMPLES = 500, 16, 4e-3, 6000
REPLAY_STEPS, REPLAY_BATCH, REPLAY_LR, REPLAY_PER_TASK = 300, 12, 2e-3, 30
TEST_EXAMPLES = 100
MAX_NEW_TOKENS = 48
RANK, LORA_ALPHA = 8, 16
ROLES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def build_base(
    family: str, folder: pathlib.Path, seed: int = 0, steps: int = BASE_STEPS, progress: bool = True
) -> float:
    """Trains the tokenizer and the base of a family from scratch and writes both.

    Args:
        family: A key of `FAMILY_SPECS`.
        folder: Where to write; replaced if it exists.
        seed: Seed of text and weights.
        steps: Optimizer steps.
        progress: Whether to show a progress bar.

    Returns:
        The loss at the end, in nats per token.
    """
    tokenizer = train_tokenizer(family, seed)
    model = new_base(family, tokenizer, seed)
    batches = text_batches(tokenizer, BASE_BLOCK, BASE_BATCH, seed)
    losses = train(model, batches, steps, BASE_LR, weight_decay=0.01, description=f"base {family}", progress=progress)
    shutil.rmtree(folder, ignore_errors=True)
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(losses[-50:]) / len(losses[-50:])


def load_base(folder: pathlib.Path, family: str) -> tuple[PreTrainedModel, Any]:
    """Loads a base in fp32 under its public name, with its tokenizer.

    Args:
        folder: The folder of the base.
        family: Its family, for the name that adapters record as their base.

    Returns:
        The model and the tokenizer.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.name_or_path = f"heterofusion-zoo/{family}"
    model.config._name_or_path = model.name_or_path
    return model, AutoTokenizer.from_pretrained(folder)


def build_expert(
    family: str, task: str, base: pathlib.Path, folder: pathlib.Path, seed: int = 0, progress: bool = True
) -> float:
    """Trains the LoRA expert of one task on its base and writes it as PEFT does, in fp16.

    Args:
        family: The family of the base.
        task: A key of `TASKS`.
        base: The folder of the base.
        folder: Where to write; replaced if it exists.
        seed: Seed of the adapter's start, of the examples and of their order.
        progress: Whether to show a progress bar.

    Returns:
        The loss at the end, in nats per answer token.
    """
    model, tokenizer = load_base(base, family)
    torch.manual_seed(seed)
    config = LoraConfig(
        r=RANK,
        lora_alpha=LORA_ALPHA,
        lora_dropout=0.0,
        target_modules=list(ROLES),
        task_type="CAUSAL_LM",
    )
    expert = get_peft_model(model, config)
    batches = example_batches(tokenizer, make_examples(task, "train", EXPERT_EXAMPLES, seed), EXPERT_BATCH, seed)
    losses = train(expert, batches, EXPERT_STEPS, EXPERT_LR, description=f"expert {family}/{task}", progress=progress)
    shutil.rmtree(folder, ignore_errors=True)
    expert.half().save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    return sum(losses[-50:]) / len(losses[-50:])


def score_tasks(
    model: PreTrainedModel | PeftModel,
    tokenizer: Any,
    tasks: Iterable[str],
    count: int = TEST_EXAMPLES,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, float]:
    """Micro-F1 of a model on test examples.

    Args:
        model: The model, with or without an adapter.
        tokenizer: Its tokenizer.
        tasks: Keys of `TASKS`.
        count: Test examples per task.
        seed: Seed of the test examples.
        progress: Whether to show a progress bar.

    Returns:
        Task name to micro-F1.
    """
    scores: dict[str, float] = {}
    for task in tasks:
        examples = make_examples(task, "test", count, seed)
        prompts = [example["prompt"] for example in examples]
        answers = generate_answers(model, tokenizer, prompts, MAX_NEW_TOKENS, batch_size=50, progress=progress)
        scores[task] = float(score_answers(answers, [example["completion"] for example in examples])["f1"])
    return scores


def tune_on_replay(
    family: str,
    task: str,
    base: pathlib.Path,
    folder: pathlib.Path,
    train_a: bool,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, float]:
    """Fine-tunes an expert on the replay of all six tasks: the reference that fusion has to beat.

    Args:
        family: The family of the base.
        task: The anchor: the expert to start from.
        base: The folder of the base.
        folder: The folder of the expert.
        train_a: Whether A is trained too; otherwise B alone.
        seed: Seed of the replay and of its order.
        progress: Whether to show progress bars.

    Returns:
        Task name to micro-F1 on the test examples of seed 0.
    """
    model, tokenizer = load_base(base, family)
    anchor = PeftModel.from_pretrained(model, folder, is_trainable=True)
    for name, parameter in anchor.named_parameters():
        if not train_a and "lora_A" in name:
            parameter.requires_grad_(False)
    replay = [example for name in TASKS for example in make_examples(name, "replay", REPLAY_PER_TASK, seed)]
    batches = example_batches(tokenizer, replay, REPLAY_BATCH, seed)
    what = "A and B" if train_a else "B"
    train(
        anchor, batches, REPLAY_STEPS, REPLAY_LR, description=f"replay, {what} of {family}/{task}", progress=progress
    )
    return score_tasks(anchor, tokenizer, TASKS, progress=progress)


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def _rounded(scores: Mapping[str, float]) -> dict[str, float]:
    return {name: round(score, 4) for name, score in scores.items()}


def folder_bytes(folder: pathlib.Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def build_zoo(
    output_dir: pathlib.Path,
    families: Iterable[str] = tuple(FAMILY_SPECS),
    tasks: Iterable[str] = tuple(TASKS),
    seed: int = 0,
    only: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Builds bases and experts, scores them and writes `manifest.json`.

    An entry of the manifest of something that this call does not build is kept. Its `seconds` are wall-clock time,
    whatever else the machine did meanwhile; `cpu_seconds` are the process's own, training and scoring together, of
    families built as a whole.

    Args:
        output_dir: The zoo's folder; `<family>/base` and `<family>/<task>` go below it.
        families: The families to build.
        tasks: The experts to build in each.
        seed: Seed of everything that is drawn.
        only: `"base"` for the bases alone, `"experts"` for experts on the bases that are there, None for both.
        progress: Whether to show progress bars.

    Returns:
        The manifest.

    Raises:
        ValueError: For an unknown family, task or value of `only`.
        FileNotFoundError: If experts are asked for and their base is not there.
    """
    families, tasks = list(families), list(tasks)
    for kind, names, known in (("family", families, FAMILY_SPECS), ("task", tasks, TASKS)):
        for name in names:
            if name not in known:
                raise UserError(f"unknown {kind} {name!r}; choose one of {', '.join(known)}")
    if only not in (None, "base", "experts"):
        raise UserError(f"only must be 'base' or 'experts', got {only!r}")
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    for family in families:
        base = output_dir / family / "base"
        entry: dict[str, Any] = {}
        cpu_start = time.process_time()
        if only != "experts":
            start = time.perf_counter()
            entry["base_loss"] = round(build_base(family, base, seed, progress=progress), 4)
            entry["base_seconds"] = round(time.perf_counter() - start)
            entry["parameters"] = load_base(base, family)[0].num_parameters()
            logger.info("%s: base of %d parameters, %d s", family, entry["parameters"], entry["base_seconds"])
        if only != "base":
            if not base.is_dir():
                raise FileNotFoundError(f"{base} is missing; build it first, without --only experts")
            entry["experts"] = {}
            for task in tasks:
                entry["experts"][task] = _build_and_score(family, task, output_dir, seed, progress)
            entry["replay_tuning"] = _score_replay(family, tasks[0], output_dir, seed, progress)
        if only is None and set(tasks) == set(TASKS):
            entry["cpu_seconds"] = round(time.process_time() - cpu_start)
        _write_manifest(output_dir, family, entry, seed)
    return json.loads((output_dir / "manifest.json").read_text(encoding="utf-8"))


def _build_and_score(family: str, task: str, output_dir: pathlib.Path, seed: int, progress: bool) -> dict[str, Any]:
    """One expert built, and its entry in the manifest."""
    base, folder = output_dir / family / "base", output_dir / family / task
    start = time.perf_counter()
    loss = build_expert(family, task, base, folder, seed, progress)
    seconds = time.perf_counter() - start
    model, tokenizer = load_base(base, family)
    scores = score_tasks(PeftModel.from_pretrained(model, folder), tokenizer, TASKS, progress=False)
    foreign = _mean(score for name, score in scores.items() if name != task)
    logger.info("%s/%s: own %.3f, foreign %.3f, %.0f s", family, task, scores[task], foreign, seconds)
    return {
        "f1": round(scores[task], 4),
        "foreign_mean_f1": round(foreign, 4),
        "scores": _rounded(scores),
        "loss": round(loss, 4),
        "seconds": round(seconds),
    }


def _score_replay(family: str, anchor: str, output_dir: pathlib.Path, seed: int, progress: bool) -> dict[str, Any]:
    """The anchor tuned on the replay, B alone and A and B: its entries in the manifest."""
    references = {}
    for key, train_a in (("B", False), ("A_and_B", True)):
        start = time.perf_counter()
        base, folder = output_dir / family / "base", output_dir / family / anchor
        scores = tune_on_replay(family, anchor, base, folder, train_a, seed, progress)
        references[key] = {
            "anchor": anchor,
            "mean_f1": round(_mean(scores.values()), 4),
            "scores": _rounded(scores),
            "seconds": round(time.perf_counter() - start),
        }
        logger.info("%s: %s tuned on the replay %.3f", family, key, references[key]["mean_f1"])
    return references


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
    manifest["settings"] = {
        "seed": seed,
        "language_seed": LANGUAGE_SEED,
        "base": {"steps": BASE_STEPS, "batch": BASE_BATCH, "block": BASE_BLOCK, "learning_rate": BASE_LR},
        "expert": {
            "steps": EXPERT_STEPS,
            "batch": EXPERT_BATCH,
            "examples": EXPERT_EXAMPLES,
            "learning_rate": EXPERT_LR,
            "r": RANK,
            "lora_alpha": LORA_ALPHA,
        },
        "replay": {
            "steps": REPLAY_STEPS,
            "batch": REPLAY_BATCH,
            "learning_rate": REPLAY_LR,
            "examples_per_task": REPLAY_PER_TASK,
        },
        "test_examples": TEST_EXAMPLES,
    }
    manifest["versions"] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }
    path.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def score_table(manifest: Mapping[str, Any]) -> str:
    """The manifest's scores as a table in text.

    Args:
        manifest: What `build_zoo` returns.

    Returns:
        One line per family: experts on their own tasks, the mean on foreign ones, the replay-tuned anchor.
    """
    head = ["family", *TASKS, "foreign", "replay B", "replay A+B"]
    rows = [head]
    for family, entry in manifest["families"].items():
        experts, tuned = entry.get("experts", {}), entry.get("replay_tuning", {})
        row = [family, *(f"{experts[t]['f1']:.3f}" if t in experts else "-" for t in TASKS)]
        row.append(f"{_mean(piece['foreign_mean_f1'] for piece in experts.values()):.3f}" if experts else "-")
        row += [f"{tuned[key]['mean_f1']:.3f}" if key in tuned else "-" for key in ("B", "A_and_B")]
        rows.append(row)
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
