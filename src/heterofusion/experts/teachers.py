"""Teachers of a distillation: LoRA experts on bases of their own, run over the replay in their own words.

Each teacher sees the examples in its own tokenizer and chat template, with the answer given (teacher forcing). Bases
are loaded one at a time, and what came of a teacher is kept (`soft_labels.py`): the same teacher on the same examples
is never run twice.
"""

import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils.memory import clear_device_cache
from datasets import Dataset
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from heterofusion.adapters.lora import CONFIG_FILE, LoraAdapter
from heterofusion.data.formats import IGNORE_INDEX
from heterofusion.data.replay import DataArguments, ReplayReport, build_replay, examples_sha256, make_collator
from heterofusion.evaluation.arguments import EvalModelArguments
from heterofusion.experts.expert import BaseArguments
from heterofusion.experts.generation import longest_first
from heterofusion.experts.models import (
    Adapter,
    Models,
    adapter_tokenizer,
    base_fingerprint,
    check_adapters,
    find_adapter,
)
from heterofusion.experts.soft_labels import SoftLabel, SoftLabels, labels_path, read_labels, write_labels
from heterofusion.experts.vocabulary import tokenizer_fingerprint
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.files import display_name, file_sha256
from heterofusion.runtime.loading import ModelArguments, base_dtype, base_skeleton, check_token_ids
from heterofusion.runtime.ranks import all_together, without_zero_init
from heterofusion.training.expert import ExpertModelArguments

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Teacher:
    """A model whose opinion of the replay's answers is asked for.

    Args:
        base: its base model and how it is loaded.
        commit: of a base from the Hub.
        adapter: its LoRA; None for a base alone.
        tokenizer: its own, with its chat template.
        examples: the replay in it: `input_ids`, `attention_mask` and `labels`, in the order of the target's.
    """

    base: BaseArguments
    commit: str | None
    adapter: Adapter | None
    tokenizer: PreTrainedTokenizerBase
    examples: Dataset

    @property
    def name(self) -> str:
        """For messages."""
        return _teacher_name(self.base.model_name_or_path, self.adapter)

    def identity(self, top_k: int) -> dict[str, Any]:
        """What its soft labels depend on."""
        name = self.base.model_name_or_path
        return {
            "base": base_fingerprint(name) or f"{name}@{self.commit}",
            "dtype": str(base_dtype(self.base, self.base.use_cpu)),
            "bits": 4 if self.base.load_in_4bit else 8 if self.base.load_in_8bit else 16,
            "adapter": self.adapter.sha256 if self.adapter else None,
            "adapter_config": file_sha256(self.adapter.folder / CONFIG_FILE) if self.adapter else None,
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            "examples": self.digest(),
            "top_k": top_k,
        }

    def digest(self) -> str:
        """Hash of its examples, which depend on the data, the sample, the tokenizer and the chat template."""
        return examples_sha256(self.examples)

    def record(self) -> dict[str, Any]:
        """What is published of it: names without local paths, and the hash of its weights."""
        return {
            "name": display_name(self.adapter.given) if self.adapter else "none",
            "base_model": display_name(self.base.model_name_or_path),
            "sha256": self.adapter.sha256 if self.adapter else None,
        }


def _teacher_name(base: str, adapter: Adapter | None) -> str:
    return f"{adapter.given} on {base}" if adapter else base


# ---- before anything is loaded ----------------------------------------------------------------------------------


def find_target(
    base: ExpertModelArguments, anchor: LoraAdapter, use_cpu: bool, data: DataArguments
) -> tuple[Teacher, ReplayReport]:
    """The target as its own teacher, which it is as long as no other is better.

    Args:
        base: its base model.
        anchor: its adapter, which fits.
        use_cpu: whether it stays on the CPU.
        data: the replay.

    Returns:
        The target, and what became of the replay.

    Raises:
        ValueError: its tokenizer is slow, or a record of the replay cannot be used.
    """
    names = [item.name for item in fields(ModelArguments)]
    args = EvalModelArguments(
        **{name: getattr(base, name) for name in names}, trust_remote_code=base.trust_remote_code, use_cpu=use_cpu
    )
    found = find_adapter(str(anchor.folder))
    adapter = replace(found, given=anchor.name) if found is not None else None
    tokenizer = adapter_tokenizer(args, adapter)
    examples, report = whole_examples(data, tokenizer)
    config = base_skeleton(args, args.trust_remote_code).config
    check_token_ids([examples], config)
    return Teacher(args, getattr(config, "_commit_hash", None), adapter, tokenizer, examples), report


def find_teachers(
    bases: Sequence[str], adapters: Sequence[str], how: EvalModelArguments, data: DataArguments, expected: ReplayReport
) -> list[Teacher]:
    """Find the teachers, check that adapters fit their bases, and write the replay in their words.

    Args:
        bases: base of each adapter.
        adapters: local folders or Hub ids; `none` for a base alone.
        how: dtype, attention, device and quantization with which the bases are loaded.
        data: the replay.
        expected: what became of the replay in the target's tokenizer.

    Returns:
        The teachers, in order.

    Raises:
        ValueError: a teacher is not usable; names it, and the record of the replay where it is one of those.
    """
    teachers = []
    for base, adapter in zip(bases, [find_adapter(name) for name in adapters], strict=True):
        try:
            args = replace(how, model_name_or_path=base, model_revision=None)
            teachers.append(_make_teacher(args, adapter, data, expected))
        except ValueError as error:
            raise UserError(f"teacher {_teacher_name(base, adapter)}: {error}") from error
    return teachers


def _make_teacher(
    base: EvalModelArguments, adapter: Adapter | None, data: DataArguments, expected: ReplayReport
) -> Teacher:
    if adapter is not None and adapter.virtual_tokens:
        raise UserError("it puts tokens before the prompt, so its logits stand at other positions; give a LoRA")
    config = check_adapters(base, [adapter])
    tokenizer = adapter_tokenizer(base, adapter)
    examples, report = whole_examples(data, tokenizer)
    check_token_ids([examples], config)
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(len, examples["input_ids"]))
    if context is not None and longest > context:
        raise UserError(
            f"the longest example has {longest} tokens, but its context has {context}; leave long examples out"
        )
    for here, target in zip(report.datasets, expected.datasets, strict=True):
        if here.kept != target.kept:
            raise UserError(
                f"{here.name} gives {here.kept} examples with an answer in its tokenizer, {target.kept} in the "
                "target's; fill empty answers, or leave those records out"
            )
    return Teacher(base, getattr(config, "_commit_hash", None), adapter, tokenizer, examples)


def whole_examples(data: DataArguments, tokenizer: PreTrainedTokenizerBase) -> tuple[Dataset, ReplayReport]:
    """The replay in a tokenizer, where no example may be cut: answers are compared as wholes.

    Args:
        data: the replay. The sample and its order depend on it alone, so they are the same in every tokenizer.
        tokenizer: a fast one.

    Raises:
        ValueError: the tokenizer is slow, an example is longer than `--max_length`, or one cannot be rendered.
    """
    if not tokenizer.is_fast:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no fast version, which tells what its tokens stand for; "
            "save one with a tokenizer.json"
        )
    examples, report = build_replay(replace(data, max_length=sys.maxsize), tokenizer)
    lengths = [len(ids) for ids in examples["input_ids"]]
    if max(lengths) > data.max_length:
        longer = sum(length > data.max_length for length in lengths)
        raise UserError(
            f"{longer} of {len(lengths)} replay examples are longer than --max_length {data.max_length} in this "
            f"tokenizer, and cut answers cannot be aligned: raise it to {max(lengths)}, or leave long records out"
        )
    report.max_length = data.max_length
    return examples, report


# ---- their opinion ----------------------------------------------------------------------------------------------


def collect_soft_labels(
    teachers: Sequence[Teacher], folder: Path, top_k: int, batch_size: int, device: torch.device
) -> list[SoftLabels]:
    """The soft labels of all teachers, from disk where they are there. All ranks together: the main one runs models.

    Args:
        teachers: the teachers.
        folder: of the store; all ranks must see it.
        top_k: tokens per position.
        batch_size: examples per batch.
        device: where the models run.

    Raises:
        ValueError: a model cannot be loaded or does not fit into memory, or its logits are not finite.
        OSError: the store cannot be written.
    """
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
            _run_teachers(teachers, missing, identities, folder, batch_size, device)
    with all_together(ranks):
        # their content has just been checked, or written
        labels = [read_labels(folder, identity, check=False) for identity in identities]
        found = [item for item in labels if item is not None]
        if len(found) < len(labels):
            raise UserError(
                f"{folder}, the cache of soft labels, is not the same folder on all machines; name one that is shared"
            )
    return found


def _run_teachers(
    teachers: Sequence[Teacher],
    missing: Sequence[int],
    identities: Sequence[dict[str, Any]],
    folder: Path,
    batch_size: int,
    device: torch.device,
) -> None:
    """Run the teachers whose soft labels are missing and write these. Each base is loaded once."""
    rest = list(missing)
    while rest:
        base = teachers[rest[0]].base
        group = [index for index in rest if teachers[index].base == base]
        rest = [index for index in rest if index not in group]
        with without_zero_init():  # one rank alone loads it, and whole
            models = Models(base, device)
            for index in group:
                with models.with_adapter(teachers[index].adapter) as model:
                    batches = run_teacher(teachers[index], model, identities[index]["top_k"], batch_size)
                    write_labels(folder, identities[index], batches)
                del batches
            del model, models  # before the next base is loaded
            clear_device_cache(garbage_collection=True)


def run_teacher(
    teacher: Teacher, model: Any, top_k: int, batch_size: int
) -> Iterator[list[tuple[int, SoftLabel, float]]]:
    """Run a teacher over its examples, with the answers given.

    Args:
        teacher: the teacher.
        model: its model, in evaluation mode.
        top_k: tokens per position; all of a vocabulary that is smaller.
        batch_size: examples per batch.

    Returns:
        By batch, the longest examples first: index, soft labels and cross-entropy of each example.

    Raises:
        ValueError: a batch does not fit into memory, or logits are not finite.
    """
    collate = make_collator(teacher.tokenizer)
    lengths = {index: len(ids) for index, ids in enumerate(teacher.examples["input_ids"])}
    order = longest_first(lengths)
    title = f"Running {teacher.record()['name']}"
    with tqdm(total=len(order), desc=title, unit="example", delay=3, leave=False) as bar:
        for first in range(0, len(order), batch_size):
            indices = order[first : first + batch_size]
            batch = collate([teacher.examples[index] for index in indices])
            try:
                answers = _run_batch(model, batch.to(model.device), top_k)
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"teacher {teacher.name}: {batch_size} examples of {lengths[indices[0]]} tokens do not fit into "
                    "memory; lower --teacher_batch_size"
                ) from error
            if not all(np.isfinite(entropy) for _, entropy in answers):
                raise UserError(f"teacher {teacher.name}: its logits are not finite; give another --dtype")
            yield [(index, *answer) for index, answer in zip(indices, answers, strict=True)]
            bar.update(len(indices))


@torch.no_grad()
def _run_batch(model: Any, batch: Any, top_k: int) -> list[tuple[SoftLabel, float]]:
    labels = batch.pop("labels")
    logits = model(**batch, use_cache=False).logits
    return [_soft_label(row, wanted, top_k) for row, wanted in zip(logits, labels, strict=True)]


def _soft_label(logits: Tensor, labels: Tensor, top_k: int) -> tuple[SoftLabel, float]:
    """The soft labels of one answer and its cross-entropy.

    Args:
        logits: (length, vocabulary).
        labels: (length,).
        top_k: tokens per position.
    """
    places = torch.nonzero(labels[1:] != IGNORE_INDEX).squeeze(1)  # the logits before a token are of that token
    tokens = labels[1:][places]
    log_probs = torch.log_softmax(logits[:-1][places].float(), dim=-1)  # (tokens, vocabulary)
    top = log_probs.topk(min(top_k, log_probs.shape[1]), dim=-1)
    entropy = -log_probs.gather(1, tokens.unsqueeze(1)).double().sum()
    parts = (part.cpu().numpy() for part in (tokens.int(), top.indices.int(), top.values))
    return SoftLabel(*parts), float(entropy)
