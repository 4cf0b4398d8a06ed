"""What experts think of given answers: each runs once over the same examples, in its own tokenizer and chat template.

Bases are loaded one at a time, and what came of a teacher is kept (`soft_labels.py`).
"""

import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from torch import Tensor
from tqdm import tqdm

from heterofusion.data.formats import IGNORE_INDEX
from heterofusion.data.replay import DataArguments, ReplayReport, build_replay, examples_sha256, make_collator
from heterofusion.experts.expert import BaseArguments, Expert, ExpertRunner, find_expert
from heterofusion.experts.generation import longest_first
from heterofusion.experts.soft_labels import SoftLabel, SoftLabels, labels_path, read_labels, write_labels
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.files import display_name
from heterofusion.runtime.loading import check_token_ids
from heterofusion.runtime.ranks import all_together, without_zero_init

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Teacher:
    """An expert, and examples in its tokenizer: `input_ids`, `attention_mask` and `labels`."""

    expert: Expert
    examples: Dataset

    @property
    def name(self) -> str:
        """For messages."""
        adapter, base = self.expert.adapter, self.expert.base.model_name_or_path
        return f"{adapter.given} on {base}" if adapter else base

    def identity(self, top_k: int) -> dict[str, Any]:
        """What its soft labels depend on."""
        return {**self.expert.identity(), "examples": examples_sha256(self.examples), "top_k": top_k}

    def record(self) -> dict[str, Any]:
        """What is published of it: names without local paths, and the hash of its weights."""
        adapter = self.expert.adapter
        return {
            "name": display_name(adapter.given) if adapter else "none",
            "base_model": display_name(self.expert.base.model_name_or_path),
            "sha256": adapter.sha256 if adapter else None,
        }


# ---- before anything is loaded ----------------------------------------------------------------------------------


def find_target(base: BaseArguments, adapter: str, data: DataArguments) -> tuple[Teacher, ReplayReport]:
    """The target as its own teacher, which it is as long as no other is better; and what became of the replay."""
    expert = find_expert(base, adapter)
    examples, report = _whole_examples(data, expert)
    return Teacher(expert, examples), report


def find_teachers(
    bases: Sequence[str], adapters: Sequence[str], how: BaseArguments, data: DataArguments, expected: ReplayReport
) -> list[Teacher]:
    """Find the teachers, check that adapters fit their bases, and write the replay in their words."""
    teachers = []
    for base, adapter in zip(bases, adapters, strict=True):
        try:
            teachers.append(_find_teacher(how.base(base), adapter, data, expected))
        except UserError as error:
            raise UserError(f"teacher {adapter} on {base}: {error}") from error
    return teachers


def _find_teacher(base: BaseArguments, adapter: str, data: DataArguments, expected: ReplayReport) -> Teacher:
    expert = find_expert(base, adapter)
    if expert.adapter is not None and expert.adapter.virtual_tokens:
        raise UserError("it puts tokens before the prompt, so its logits stand at other positions; give a LoRA")
    examples, report = _whole_examples(data, expert)
    longest = max(map(len, examples["input_ids"]))
    if expert.context is not None and longest > expert.context:
        raise UserError(
            f"the longest example has {longest} tokens, but its context has {expert.context}; leave long examples out"
        )
    for here, target in zip(report.datasets, expected.datasets, strict=True):
        if here.kept != target.kept:
            raise UserError(
                f"{here.name} gives {here.kept} examples with an answer in its tokenizer, {target.kept} in the "
                "target's; fill empty answers, or leave those records out"
            )
    return Teacher(expert, examples)


def _whole_examples(data: DataArguments, expert: Expert) -> tuple[Dataset, ReplayReport]:
    """The replay in a fast tokenizer, where no example may be cut: answers are compared as wholes."""
    if not expert.tokenizer.is_fast:
        raise UserError(
            f"the tokenizer of {expert.tokenizer.name_or_path!r} has no fast version, which tells what its tokens "
            "stand for; save one with a tokenizer.json"
        )
    examples, report = build_replay(replace(data, max_length=sys.maxsize), expert.tokenizer)
    lengths = [len(ids) for ids in examples["input_ids"]]
    if max(lengths) > data.max_length:
        longer = sum(length > data.max_length for length in lengths)
        raise UserError(
            f"{longer} of {len(lengths)} replay examples are longer than --max_length {data.max_length}, and cut "
            f"answers cannot be aligned: raise it to {max(lengths)}, or leave long records out"
        )
    report.max_length = data.max_length
    check_token_ids([examples], expert.config)
    return examples, report


# ---- their opinion ----------------------------------------------------------------------------------------------


def collect_soft_labels(
    teachers: Sequence[Teacher], folder: Path, top_k: int, batch_size: int, device: torch.device
) -> list[SoftLabels]:
    """The soft labels of all teachers, from disk where they are. All ranks together: the main one runs models."""
    ranks = PartialState()
    identities = [teacher.identity(top_k) for teacher in teachers]
    with all_together(ranks):
        if ranks.is_main_process:
            missing = []
            for index, identity in enumerate(identities):
                if read_labels(folder, identity) is None:
                    missing.append(index)
                else:
                    logger.info("%s: soft labels of %s", teachers[index].name, labels_path(folder, identity))
            bases = [teacher.expert.base for teacher in teachers]
            runner = ExpertRunner(device)
            with without_zero_init():  # one rank alone loads them, and whole
                for index in sorted(missing, key=lambda index: bases.index(bases[index])):  # each base is loaded once
                    _run(runner, teachers[index], identities[index], folder, batch_size)
            runner.release()
    with all_together(ranks):
        # their content has just been checked, or written
        labels = [read_labels(folder, identity, check=False) for identity in identities]
        found = [item for item in labels if item is not None]
        if len(found) < len(labels):
            raise UserError(
                f"{folder}, the cache of soft labels, is not the same folder on all machines; name one that is shared"
            )
    return found


def _run(runner: ExpertRunner, teacher: Teacher, identity: dict[str, Any], folder: Path, batch_size: int) -> None:
    with runner.running(teacher.expert) as model:
        write_labels(folder, identity, _batches(teacher, model, identity["top_k"], batch_size))


def _batches(teacher: Teacher, model: Any, top_k: int, size: int) -> Iterator[list[tuple[int, SoftLabel, float]]]:
    """Run a teacher over its examples, with the answers given (teacher forcing), the longest examples first."""
    collate = make_collator(teacher.expert.tokenizer)
    lengths = {index: len(ids) for index, ids in enumerate(teacher.examples["input_ids"])}
    order, title = longest_first(lengths), f"Running {teacher.record()['name']}"
    with tqdm(total=len(order), desc=title, unit="example", delay=3, leave=False) as bar:
        for first in range(0, len(order), size):
            indices = order[first : first + size]
            batch = collate([teacher.examples[index] for index in indices]).to(model.device)
            labels = batch.pop("labels")
            try:
                with torch.no_grad():
                    logits = model(**batch, use_cache=False).logits
                    answers = [_soft_label(row, wanted, top_k) for row, wanted in zip(logits, labels, strict=True)]
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"teacher {teacher.name}: {size} examples of {lengths[indices[0]]} tokens do not fit into memory; "
                    "lower --teacher_batch_size"
                ) from error
            if not all(np.isfinite(entropy) for _, entropy in answers):
                raise UserError(f"teacher {teacher.name}: its logits are not finite; give another --dtype")
            yield [(index, *answer) for index, answer in zip(indices, answers, strict=True)]
            bar.update(len(indices))


def _soft_label(logits: Tensor, labels: Tensor, top_k: int) -> tuple[SoftLabel, float]:
    """The soft labels of one answer and its cross-entropy: logits (length, vocabulary), labels (length,)."""
    places = torch.nonzero(labels[1:] != IGNORE_INDEX).squeeze(1)  # the logits before a token are of that token
    tokens = labels[1:][places]
    log_probs = torch.log_softmax(logits[:-1][places].float(), dim=-1)  # (tokens, vocabulary)
    top = log_probs.topk(min(top_k, log_probs.shape[1]), dim=-1)
    entropy = -log_probs.gather(1, tokens.unsqueeze(1)).double().sum()
    parts = (part.cpu().numpy() for part in (tokens.int(), top.indices.int(), top.values))
    return SoftLabel(*parts), float(entropy)
