"""The rows of an evaluation: what answers, and what results tell of it.

`Evaluation` knows rows only by the protocols here. Adapters one after the other and adapters of one data set each are
made here; a row of another kind, such as an ensemble, comes from whoever composes the evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from datasets import Dataset
from transformers import PretrainedConfig

from heterofusion.evaluation.arguments import NO_ADAPTER, EvalArguments, EvalModelArguments, GenerationArguments
from heterofusion.evaluation.datasets import EvalSet, check_references
from heterofusion.evaluation.results import common_made_by
from heterofusion.experts.examples import Prompts, encode
from heterofusion.experts.generation import Answer, AnswerGenerator, Batches
from heterofusion.experts.models import (
    Adapter,
    Models,
    adapter_tokenizer,
    base_fingerprint,
    check_adapters,
    find_adapter,
    prompt_limit,
    records_beside,
)
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.files import display_name
from heterofusion.runtime.loading import base_dtype, check_token_ids

PER_DATASET_NAME = "adapter_per_dataset"  # of the row, without --name


class AnswerSource(Protocol):
    """What generates answers; `AnswerGenerator` is one."""

    batches: Batches

    def answers(self, prompts: Mapping[int, Any]) -> Iterator[list[Answer]]:
        """The answers to prompts, given as `Row.encode` made them by a key, one batch after the other."""


class Row(Protocol):
    """One row of results."""

    name: str
    limit: int | None  # tokens of a prompt at most, once `encode` ran

    def encode(self, sets: Sequence[EvalSet]) -> dict[str, Prompts]:
        """The prompts of all data sets, by label; a ValueError where they cannot be.

        Args:
            sets: The data sets.
        """

    def load(self) -> None:
        """Load what may be missing or wrong; afterwards files are written."""

    def answering(self, labels: Sequence[str]) -> Iterator[tuple[str, AnswerSource]]:
        """What answers each data set, one after the other; good until the next one is asked for.

        Args:
            labels: The data sets that lack answers, in order.
        """

    def record(self) -> dict[str, Any]:
        """What `results.json` tells of what answered: `base_model`, `adapter`, `fusion`, `made_by`,
        `models_at_inference` and `needs_task_id` at least."""


@dataclass(frozen=True)
class Lineup:
    """What is evaluated.

    Args:
        rows: The rows, at least one.
        state: What has to be the same for answers of an interrupted run to count, the data sets and the length of
            answers and prompts aside. With `adapters` in it, by the rows' names, each row has a folder of its own.
    """

    rows: list[Row]
    state: dict[str, Any]


LineupBuilder = Callable[[EvalArguments, torch.device], Lineup]


def base_state(model: EvalModelArguments) -> dict[str, Any]:
    """What tells a base, and how it is loaded, from another. Batch size and cache do not count."""
    return {
        "base_model": display_name(model.model_name_or_path),
        "base_revision": model.model_revision,
        "base_files": base_fingerprint(model.model_name_or_path),
        "dtype": str(base_dtype(model, model.use_cpu)).removeprefix("torch."),
        "load_in_8bit": model.load_in_8bit,
        "load_in_4bit": model.load_in_4bit,
        "merge_adapters": model.merge_adapters,
    }


def adapter_hash(adapter: Adapter | None) -> str:
    """SHA-256 of an adapter's weights, `none` for none."""
    return adapter.sha256 if adapter else NO_ADAPTER


def adapter_name(adapter: Adapter | None) -> dict[str, str] | None:
    """What results call an adapter."""
    return {"name": display_name(adapter.given), "sha256": adapter.sha256} if adapter else None


def adapter_lineup(arguments: EvalArguments, device: torch.device) -> Lineup:
    """Adapters on one base: a row each or, with `--adapter_per_dataset`, one row in which each answers one data set.

    Args:
        arguments: The flags.
        device: Where the models go.

    Returns:
        The rows; nothing is loaded yet.

    Raises:
        AdapterError: An adapter is not usable, or does not fit the base.
        ValueError: A flag is not what it has to be.
    """
    model, output = arguments.model, arguments.output
    labels = arguments.data.labels()
    if model.adapter_per_dataset:
        row_name = output.row_name(PER_DATASET_NAME, "--adapter_per_dataset")
        if len(model.adapters) != len(labels):
            raise UserError(
                f"--adapter_per_dataset: --adapters has {len(model.adapters)} values, but --dataset_name has "
                f"{len(labels)}; give one adapter per data set, in the same order"
            )
    else:
        names = output.adapter_names(model.adapters)
    adapters = list(map(find_adapter, model.adapters, model.revisions()))
    base = Base(model, arguments.generation, check_adapters(model, adapters), Models(model, device))
    state = {"ensemble": None, **base_state(model)}  # so that a message about another one names this first
    if model.adapter_per_dataset:
        by_label = dict(zip(labels, adapters, strict=True))
        hashes = {label: adapter_hash(adapter) for label, adapter in by_label.items()}
        return Lineup([PerDatasetRow(row_name, by_label, base)], {**state, "adapter_per_dataset": hashes})
    rows = [AdapterRow(name, adapter, base) for name, adapter in zip(names, adapters, strict=True)]
    hashes = {row.name: adapter_hash(row.adapter) for row in rows}
    # the name of a single one may change: no folder is called by it
    return Lineup([*rows], state | ({"adapters": hashes} if len(rows) > 1 else {"adapter": hashes[rows[0].name]}))


@dataclass
class Base:
    """The base that all adapters of a lineup share, and what they share with it.

    Args:
        args: Which one, and how it is loaded.
        generation: How answers are generated.
        config: The base's.
        models: Puts adapters on it.
    """

    args: EvalModelArguments
    generation: GenerationArguments
    config: PretrainedConfig
    models: Models
    _encoded: dict[tuple[str, int | None, str], Prompts] = field(default_factory=dict)

    def tokenizer_and_limit(self, adapter: Adapter | None) -> tuple[Any, int | None]:
        """The tokenizer that belongs to an adapter, and how many tokens a prompt may have with it."""
        limit = prompt_limit(
            self.config,
            self.generation.max_new_tokens,
            self.generation.max_prompt_length,
            adapter.virtual_tokens if adapter else 0,
        )
        return adapter_tokenizer(self.args, adapter), limit

    def encode(self, examples: EvalSet, tokenizer: Any, limit: int | None) -> Prompts:
        """Prompts of a data set; of adapters with the same tokenizer, they are those of the first."""
        key = (tokenizer.name_or_path, limit, examples.label)
        if key not in self._encoded:
            prompts = encode(examples, tokenizer, limit)
            check_references(examples, prompts)
            check_token_ids([Dataset.from_dict({"input_ids": prompts.ids})], self.config)
            self._encoded[key] = prompts
        return self._encoded[key]

    def generator(self, model: Any, tokenizer: Any) -> AnswerGenerator:
        """Generation with one model."""
        generation = self.generation
        return AnswerGenerator(
            model,
            tokenizer,
            generation.max_new_tokens,
            generation.fixed_batch_size(),
            generation.cache_implementation,
        )


class AdapterRow:
    """One adapter, or none, that answers all data sets.

    Args:
        name: Of the row.
        adapter: None for the base alone.
        base: What it is on.
    """

    def __init__(self, name: str, adapter: Adapter | None, base: Base) -> None:
        self.name = name
        self.adapter = adapter
        self.base = base
        self.limit: int | None = None
        self._tokenizer: Any = None

    def encode(self, sets: Sequence[EvalSet]) -> dict[str, Prompts]:
        """As `Row` says."""
        self._tokenizer, self.limit = self.base.tokenizer_and_limit(self.adapter)
        return {examples.label: self.base.encode(examples, self._tokenizer, self.limit) for examples in sets}

    def load(self) -> None:
        """As `Row` says."""
        self.base.models.load()

    def answering(self, labels: Sequence[str]) -> Iterator[tuple[str, AnswerSource]]:
        """As `Row` says."""
        with self.base.models.with_adapter(self.adapter) as model:
            generator = self.base.generator(model, self._tokenizer)
            for label in labels:
                yield label, generator

    def record(self) -> dict[str, Any]:
        """As `Row` says."""
        adapter = self.adapter
        return {
            "base_model": display_name(self.base.args.model_name_or_path),
            "adapter": adapter_name(adapter),
            **(records_beside(adapter) if adapter else {"fusion": None, "made_by": None}),
            "models_at_inference": 1,
            "needs_task_id": False,
        }


class PerDatasetRow:
    """Adapters that answer one data set each, so that whoever asks has to know the task.

    Args:
        name: Of the row.
        adapters: By the label of their data set, None for the base alone.
        base: What they are on.
    """

    def __init__(self, name: str, adapters: Mapping[str, Adapter | None], base: Base) -> None:
        self.name = name
        self.adapters = adapters
        self.base = base
        self.limit: int | None = None
        self._tokenizers: dict[str, Any] = {}

    def encode(self, sets: Sequence[EvalSet]) -> dict[str, Prompts]:
        """As `Row` says; the limit is that of the shortest."""
        encoded, limits = {}, []
        for examples in sets:
            tokenizer, limit = self.base.tokenizer_and_limit(self.adapters[examples.label])
            encoded[examples.label] = self.base.encode(examples, tokenizer, limit)
            self._tokenizers[examples.label] = tokenizer
            limits.append(limit)
        self.limit = min((limit for limit in limits if limit is not None), default=None)
        return encoded

    def load(self) -> None:
        """As `Row` says."""
        self.base.models.load()

    def answering(self, labels: Sequence[str]) -> Iterator[tuple[str, AnswerSource]]:
        """As `Row` says."""
        for label in labels:
            with self.base.models.with_adapter(self.adapters[label]) as model:
                yield label, self.base.generator(model, self._tokenizers[label])

    def record(self) -> dict[str, Any]:
        """As `Row` says; with `adapters`, by the label of their data set."""
        adapters = self.adapters
        return {
            "base_model": display_name(self.base.args.model_name_or_path),
            "adapter": None,
            "adapters": {label: adapter_name(adapter) for label, adapter in adapters.items()},
            "fusion": None,
            "made_by": common_made_by([records_beside(a)["made_by"] if a else None for a in adapters.values()]),
            "models_at_inference": 1,
            "needs_task_id": True,
        }
