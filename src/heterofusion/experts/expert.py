"""The models that answer: the anchor and the sources, each on its own base, one of them in memory at a time."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from datasets import Dataset
from transformers import PretrainedConfig

from heterofusion.adapters.lora import CONFIG_FILE
from heterofusion.data.labels import ANCHOR
from heterofusion.evaluation.arguments import EvalModelArguments, GenerationArguments
from heterofusion.evaluation.rows import adapter_hash
from heterofusion.experts.examples import EvalSet, Prompts, encode
from heterofusion.experts.models import (
    Adapter,
    Models,
    adapter_tokenizer,
    base_fingerprint,
    check_adapters,
    find_adapter,
    prompt_limit,
)
from heterofusion.labelling.arguments import LabelModelArguments
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.files import display_name, file_sha256
from heterofusion.runtime.loading import base_dtype, check_token_ids


@dataclass(frozen=True)
class Expert:
    """A model that answers, whose files are in order; nothing of it is loaded.

    Args:
        name: In tables and labels.
        base: Its base model and how it is loaded.
        config: The base's.
        adapter: None for the base alone.
        tokenizer: Its own, with its chat template.
        limit: Tokens of a prompt at most; None for any number.
    """

    name: str
    base: EvalModelArguments
    config: PretrainedConfig
    adapter: Adapter | None
    tokenizer: Any
    limit: int | None

    @property
    def title(self) -> str:
        """For messages."""
        return self.name if self.name == ANCHOR else f"source {self.name}"

    def identity(self) -> dict[str, Any]:
        """What its answers depend on, prompts and their length aside."""
        name = self.base.model_name_or_path
        commit = getattr(self.config, "_commit_hash", None) or self.base.model_revision
        return {
            "base": base_fingerprint(name) or f"{name}@{commit}",
            "dtype": str(base_dtype(self.base, self.base.use_cpu)).removeprefix("torch."),
            "bits": 4 if self.base.load_in_4bit else 8 if self.base.load_in_8bit else 16,
            "merged": self.base.merge_adapters,
            "adapter": adapter_hash(self.adapter),
            "adapter_config": file_sha256(self.adapter.folder / CONFIG_FILE) if self.adapter else None,
            "tokenizer": _tokenizer_identity(self.tokenizer),
        }

    def without_adapter(self) -> Expert:
        """Its base alone, with its tokenizer."""
        return replace(self, adapter=None)

    def record(self) -> dict[str, Any]:
        """What is published of it: names without local paths, and what its files are."""
        return {
            "name": self.name,
            "adapter": display_name(self.adapter.given) if self.adapter else None,
            "base_model": display_name(self.base.model_name_or_path),
            **self.identity(),
            "max_prompt_length": self.limit,
        }

    def encode(self, examples: EvalSet) -> Prompts:
        """Prompts in its tokenizer and chat template.

        Raises:
            ValueError: A record cannot be rendered, or a token id is none of the base's; names expert and record.
        """
        try:
            prompts = encode(examples, self.tokenizer, self.limit)
            check_token_ids([Dataset.from_dict({"input_ids": prompts.ids})], self.config)
        except ValueError as error:
            raise UserError(f"{self.title}: {error}") from error
        return prompts


def _tokenizer_identity(tokenizer: Any) -> str:
    """What answers depend on beside the ids of the prompts: how ids become text, and which of them ends an answer."""
    words = json.dumps([sorted(tokenizer.get_vocab().items()), tokenizer.eos_token_id])
    return hashlib.sha256(words.encode()).hexdigest()[:16]


def find_experts(args: LabelModelArguments, generation: GenerationArguments) -> tuple[Expert | None, list[Expert]]:
    """Find the anchor and the sources, and check on the meta device that adapters fit their bases.

    Args:
        args: Which they are.
        generation: How they answer.

    Returns:
        The anchor, if there is one, and the sources in order.

    Raises:
        ValueError: One is not usable; names it.
    """
    anchor = None
    if args.target_adapter is not None:
        base = args.how(args.model_name_or_path, args.model_revision)
        anchor = _find(ANCHOR, base, args.target_adapter, generation, args.target_revision)
    revisions = {args.model_name_or_path: args.model_revision}  # a source may be on the anchor's base
    sources = [
        _find(name, args.how(base, revisions.get(base)), adapter, generation)
        for name, base, adapter in zip(args.names(), args.bases(), args.source_adapters, strict=True)
    ]
    return anchor, sources


def _find(
    name: str,
    base: EvalModelArguments,
    adapter_name: str,
    generation: GenerationArguments,
    revision: str | None = None,
) -> Expert:
    try:
        adapter = find_adapter(adapter_name, revision)
        config = check_adapters(base, [adapter])
        limit = prompt_limit(
            config,
            generation.max_new_tokens,
            generation.max_prompt_length,
            adapter.virtual_tokens if adapter else 0,
        )
        return Expert(name, base, config, adapter, adapter_tokenizer(base, adapter), limit)
    except ValueError as error:
        if name == ANCHOR:
            raise UserError(f"{name}: {error}") from error
        raise UserError(f"source {name}: {str(error).replace('--model_name_or_path', '--source_models')}") from error


class OneModel:
    """A place for one base model in memory; it stays while experts on the same base follow each other.

    Args:
        device: Where models go.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._models: Models | None = None

    def load(self, expert: Expert) -> None:
        """Load the base of an expert, unless it is there.

        Raises:
            ValueError: It cannot be loaded.
        """
        self._of(expert).load()

    @contextlib.contextmanager
    def running(self, expert: Expert) -> Iterator[Any]:
        """The model of an expert, in evaluation mode.

        Raises:
            ValueError: It cannot be loaded.
        """
        with self._of(expert).with_adapter(expert.adapter) as model:
            yield model

    def release(self) -> None:
        """Free the memory."""
        self._models = None
        clear_device_cache(garbage_collection=True)  # what PEFT makes of a base refers to itself

    def _of(self, expert: Expert) -> Models:
        if self._models is None or self._models.args != expert.base:
            self.release()
            self._models = Models(expert.base, self.device)
        return self._models
