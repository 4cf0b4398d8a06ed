"""What experts think of given answers: each runs once, and its most probable tokens at every position are kept.

    NAME/table.arrow   an Arrow stream, which `datasets.Dataset.from_file` opens as a memory map
    NAME/record.json   plain values, size and SHA-256 of the table

A table is filled, batch by batch, in a folder beside its place, which is renamed once both files are on the disk: what
bears the name is complete, whenever a program was killed. What a disk or a copy did to it later is told by the hash,
for which one process reads it through once per run.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset, Features, List, Value
from datasets.arrow_writer import ArrowWriter
from huggingface_hub import constants
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from heterofusion.data.formats import IGNORE_INDEX
from heterofusion.data.replay import DataArguments, ReplayReport, build_replay, examples_sha256, make_collator
from heterofusion.experts.expert import BaseArguments, Expert, ExpertRunner, find_expert
from heterofusion.experts.generation import longest_first
from heterofusion.runtime.errors import UserError, one_line
from heterofusion.runtime.files import TEMPORARY, display_name, file_sha256, told_writes
from heterofusion.runtime.loading import check_token_ids
from heterofusion.runtime.ranks import all_together, without_zero_init

logger = logging.getLogger(__name__)

_FORMAT = 2  # another number is another name
_FEATURES = Features(
    {
        "index": Value("int64"),  # of the answer; rows stand in the order in which they were written
        "tokens": List(Value("int32")),  # (n,)
        "top_ids": List(List(Value("int32"))),  # (n, k)
        "top_log_probs": List(List(Value("float32"))),  # (n, k)
        "cross_entropy": Value("float64"),
    }
)
_ABANDONED = 24 * 3600  # seconds without a batch, after which a table's writer is taken for dead


def cache_folder(logits_cache: str | None) -> Path:
    """The folder of `--logits_cache`, by default `heterofusion/soft_labels` in HF_HOME."""
    folder = Path(logits_cache or Path(constants.HF_HOME) / "heterofusion" / "soft_labels").expanduser().absolute()
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)):
        raise UserError(f"--logits_cache {folder}: {nearest} is a file or not writable; name another folder")
    return folder


def cache_key(identity: Mapping[str, Any]) -> str:
    """A short name for plain values: it differs when one of them does."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]


# ---- tables -----------------------------------------------------------------------------------------------------


def write_table(
    path: Path, features: Features, batches: Iterable[Mapping[str, Any]], record: Mapping[str, Any]
) -> None:
    """Write columns batch by batch while they are made, and `record`, which may be filled meanwhile, and the seconds.

    It takes the place of a damaged table. Several programs may write the same: the first one's stays.
    """
    staging = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}{TEMPORARY}")
    file, start = staging / "table.arrow", time.perf_counter()
    with told_writes(f"--logits_cache: {path} could not be written", "name another folder"):
        try:
            for left in path.parent.glob(f"*{TEMPORARY}"):  # of programs that were killed; it may be large
                if time.time() - max(part.stat().st_mtime for part in (left, *left.glob("*"))) > _ABANDONED:
                    shutil.rmtree(left, ignore_errors=True)
            staging.mkdir(parents=True)
            with contextlib.closing(ArrowWriter(path=str(file), features=features)) as writer:
                for columns in batches:
                    writer.write_batch(dict(columns))
                writer.finalize()
            seconds = round(time.perf_counter() - start, 3)
            whole = {**record, "seconds": seconds, "bytes": file.stat().st_size, "content_sha256": file_sha256(file)}
            (staging / "record.json").write_text(json.dumps(whole, sort_keys=True) + "\n", encoding="utf-8")
            for name in ("table.arrow", "record.json"):
                with open(staging / name, "rb") as written:
                    os.fsync(written.fileno())
            if read_table(path, features) is None:  # else another program was faster
                shutil.rmtree(path, ignore_errors=True)
                os.rename(staging, path)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def read_table(path: Path, features: Features, check: bool = True) -> tuple[Dataset, dict[str, Any]] | None:
    """Open a table, memory-mapped, with its record; None if it is missing or damaged, which `check` reads all for."""
    if not path.exists():
        return None
    file = path / "table.arrow"
    try:
        record = json.loads((path / "record.json").read_text(encoding="utf-8"))
        if file.stat().st_size != record["bytes"] or (check and file_sha256(file) != record["content_sha256"]):
            raise ValueError("its content is not what was written")
        data = Dataset.from_file(str(file))
        if data.features != features:
            raise ValueError(f"its columns are {data.features}")
    except (OSError, ValueError, KeyError, TypeError) as error:  # those of Arrow and JSON are among them
        logger.warning("%s is damaged (%s): it is made anew", path, one_line(error))
        return None
    return data, record


def made_once(path: Path, features: Features, make: Callable[[], None]) -> tuple[Dataset, dict[str, Any]]:
    """Open a table, which the main rank makes where it is missing or damaged. All ranks together."""
    ranks = PartialState()
    with all_together(ranks):
        if ranks.is_main_process:
            if read_table(path, features) is None:
                make()
            else:
                logger.info("soft labels of an earlier run: %s", path)
    with all_together(ranks):
        found = read_table(path, features, check=False)  # its content has just been checked, or written
        if found is None:
            raise UserError(f"--logits_cache {path.parent} is not the same folder on all machines; give one that is")
    return found


# ---- soft labels ------------------------------------------------------------------------------------------------


class SoftLabel(NamedTuple):
    """The soft labels of one answer of n tokens, in the model's own tokenizer."""

    tokens: NDArray[np.int32]  # (n,) the answer
    top_ids: NDArray[np.int32]  # (n, k) the most probable tokens at each position, the most probable first
    top_log_probs: NDArray[np.float32]  # (n, k) of the softmax over the whole vocabulary


class SoftLabels:
    """The soft labels of a number of answers, memory-mapped."""

    def __init__(self, data: Dataset, record: Mapping[str, Any]) -> None:
        self.identity: dict[str, Any] = record["identity"]  # what they depend on
        self.seconds = float(record["seconds"])  # that the model took for them
        self._data = data.with_format("arrow")
        self._rows = np.argsort(data.data.column("index").to_numpy())  # row of every answer
        # (answers,) minus the log-probability of each answer as a whole, in nats
        self.cross_entropy: NDArray[np.float64] = data.data.column("cross_entropy").to_numpy()[self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    def of(self, index: int) -> SoftLabel:
        """The soft labels of one answer; the arrays lie in the file and cannot be written to."""
        row = self._data[int(self._rows[index])]  # a table of one row
        tokens, ids, values = (row[name].chunk(0).flatten() for name in SoftLabel._fields)
        shape = (len(tokens), -1) if len(tokens) else (0, 0)
        return SoftLabel(
            tokens.to_numpy(), ids.flatten().to_numpy().reshape(shape), values.flatten().to_numpy().reshape(shape)
        )


def labels_path(folder: Path, identity: Mapping[str, Any]) -> Path:
    """Where the soft labels of an identity are: another model, other answers or another k are another place."""
    return folder / f"soft-labels-{cache_key({'format': _FORMAT, **identity})}"


def write_labels(
    folder: Path, identity: Mapping[str, Any], batches: Iterable[Sequence[tuple[int, SoftLabel, float]]]
) -> None:
    """Write soft labels and cross-entropies by number of the answer, a batch at a time, while they are made."""

    def columns(batch: Sequence[tuple[int, SoftLabel, float]]) -> dict[str, Any]:
        indices, labels, entropies = zip(*batch, strict=True)
        parts = dict(zip(SoftLabel._fields, map(list, zip(*labels, strict=True)), strict=True))
        return {"index": list(indices), **parts, "cross_entropy": list(entropies)}

    write_table(labels_path(folder, identity), _FEATURES, map(columns, batches), {"identity": dict(identity)})


def read_labels(folder: Path, identity: Mapping[str, Any]) -> SoftLabels:
    """Open the soft labels of an identity."""
    path = labels_path(folder, identity)
    found = read_table(path, _FEATURES)
    if found is None:
        raise UserError(f"{path} is missing or damaged: make these soft labels again")
    return SoftLabels(*found)


# ---- teachers: nothing is loaded before their labels are collected ----------------------------------------------


@dataclass(frozen=True)
class Teacher:
    """An expert, and examples in its tokenizer: `input_ids`, `attention_mask` and `labels`."""

    expert: Expert
    examples: Dataset

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


def check_alignable(expert: Expert) -> None:
    """Refuse an expert whose logits cannot be aligned with the tokens of another."""
    if not expert.tokenizer.is_fast:
        raise UserError(f"the tokenizer of {expert.name} has no fast version; save one with a tokenizer.json")
    if expert.adapter is not None and expert.adapter.virtual_tokens:
        raise UserError(f"{expert.name} puts tokens before the prompt, which moves its logits; give a LoRA")


def find_teacher(
    base: BaseArguments, adapter: str, data: DataArguments, target: ReplayReport | None = None
) -> tuple[Teacher, ReplayReport]:
    """Find a teacher, and write the replay, of which no example may be cut, in its words; `target` is the target's."""
    try:
        expert = find_expert(base, adapter)
        check_alignable(expert)
        examples, report = build_replay(replace(data, max_length=sys.maxsize), expert.tokenizer)
        lengths = [len(ids) for ids in examples["input_ids"]]
        longer = sum(length > data.max_length for length in lengths)
        if longer:
            raise UserError(
                f"{longer} of {len(lengths)} replay examples are longer than --max_length {data.max_length}, and cut "
                f"answers cannot be aligned: raise it to {max(lengths)}, or leave long records out"
            )
        if expert.context is not None and max(lengths) > expert.context:
            told = f"the longest example has {max(lengths)} tokens, but its context has {expert.context}"
            raise UserError(f"{told}; leave long examples out")
        check_token_ids([examples], expert.config)
        for here, there in zip(report.datasets, target.datasets if target else report.datasets, strict=True):
            if here.kept != there.kept:
                raise UserError(
                    f"{here.name} gives {here.kept} examples with an answer in its tokenizer, {there.kept} in the "
                    "target's; fill empty answers, or leave those records out"
                )
    except UserError as error:
        raise UserError(f"teacher {adapter} on {base.model_name_or_path}: {error}") from error
    report.max_length = data.max_length
    return Teacher(expert, examples), report


def collect_soft_labels(
    teachers: Sequence[Teacher], folder: Path, top_k: int, batch_size: int, device: torch.device
) -> list[SoftLabels]:
    """The soft labels of all teachers, from disk where they are. All ranks together: the main one runs models."""
    runner, found = ExpertRunner(device), {}
    bases = [teacher.expert.base for teacher in teachers]
    for index in sorted(range(len(teachers)), key=lambda index: bases.index(bases[index])):  # each is loaded once
        path = labels_path(folder, teachers[index].identity(top_k))
        run = partial(_run, runner, teachers[index], folder, top_k, batch_size)
        found[index] = SoftLabels(*made_once(path, _FEATURES, run))
    runner.release()
    return [found[index] for index in range(len(teachers))]


def _run(runner: ExpertRunner, teacher: Teacher, folder: Path, top_k: int, size: int) -> None:
    with without_zero_init(), runner.running(teacher.expert) as model:  # one rank alone loads it, and whole
        write_labels(folder, teacher.identity(top_k), _batches(teacher, model, top_k, size))


def _batches(teacher: Teacher, model: Any, top_k: int, size: int) -> Iterator[list[tuple[int, SoftLabel, float]]]:
    """Run a teacher over its examples, with the answers given (teacher forcing), the longest examples first."""
    collate = make_collator(teacher.expert.tokenizer)
    lengths = {index: len(ids) for index, ids in enumerate(teacher.examples["input_ids"])}
    order, name = longest_first(lengths), teacher.expert.name
    with tqdm(total=len(order), desc=f"Running {name}", unit="example", delay=3, leave=False) as bar:
        for first in range(0, len(order), size):
            indices = order[first : first + size]
            batch = collate([teacher.examples[index] for index in indices]).to(model.device)
            labels = batch.pop("labels")
            with torch.no_grad():
                logits = model(**batch, use_cache=False).logits
                answers = [_soft_label(row, wanted, top_k) for row, wanted in zip(logits, labels, strict=True)]
            if not all(np.isfinite(entropy) for _, entropy in answers):
                raise UserError(f"teacher {name}: its logits are not finite; give another --dtype")
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
