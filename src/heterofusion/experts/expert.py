"""An expert: a base model, an adapter on it or none, and their tokenizer, which together answer.

`find_expert` reads and checks everything but weights. `ExpertRunner` is the one place where experts are loaded: it
keeps one base in memory and switches adapters on it with plain PEFT.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import struct
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from datasets import Dataset
from peft import PeftConfig, PeftModel, PeftType, TaskType, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from heterofusion.adapters.config import AdapterError, keeps_base
from heterofusion.adapters.lora import CONFIG_FILE, WEIGHTS_FILE, adapter_folder
from heterofusion.data.formats import render_prompt, tokenize_prompt
from heterofusion.experts.examples import Examples, Prompts
from heterofusion.experts.generation import GenerationArguments, cut_prompt
from heterofusion.runtime.errors import UserError, one_line
from heterofusion.runtime.files import display_name, file_sha256, read_json_object
from heterofusion.runtime.flags import flag
from heterofusion.runtime.loading import (
    ModelArguments,
    base_dtype,
    base_skeleton,
    check_token_ids,
    load_base,
    load_tokenizer,
)

NO_ADAPTER = "none"
_WHOLE = 64 << 20  # weight files up to this size are hashed as a whole
_PIECE = 4096
# what a base's answers depend on beside its weights: beginnings of file names
_ANSWER_FILES = ("config.json", "generation_config", "tokenizer", "special_tokens", "added_", "vocab.", "merges.")


@dataclass
class BaseArguments(ModelArguments):
    """A base model that answers, and how it is loaded."""

    trust_remote_code: bool = flag(False, help="Run model code from the Hub for the base.")
    use_cpu: bool = flag(False, help="Stay on the CPU where there is a GPU.")

    def base(self, name: str | None = None, revision: str | None = None) -> BaseArguments:
        """These flags without those that a subclass adds; of another base if one is named."""
        flags = {item.name: getattr(self, item.name) for item in fields(BaseArguments)}
        if name is not None:
            flags |= {"model_name_or_path": name, "model_revision": revision}
        return BaseArguments(**flags)


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk, read but for its weights."""

    given: str  # what the user wrote
    folder: Path
    config: PeftConfig
    tensors: frozenset[str]  # their names in its file
    sha256: str  # of that file

    @property
    def only_adds(self) -> bool:
        """Whether it is LoRA and nothing else, so that it can be taken off the base without a trace."""
        init = getattr(self.config, "init_lora_weights", None)
        if self.config.peft_type != PeftType.LORA or getattr(self.config, "layer_replication", None):
            return False
        return keeps_base(init) and all(".lora_" in key for key in self.tensors)

    @property
    def virtual_tokens(self) -> int:
        """Tokens that it puts before every prompt."""
        return int(getattr(self.config, "num_virtual_tokens", 0)) if self.config.is_prompt_learning else 0


def find_adapter(name: str, revision: str | None = None) -> Adapter | None:
    """Read everything of an adapter but its weights: a local folder or a Hub id; None for `none`."""
    if name == NO_ADAPTER:
        return None
    folder = adapter_folder(name, revision)
    read_json_object(folder / CONFIG_FILE)  # PEFT's own messages name no file
    weights = folder / WEIGHTS_FILE
    if not weights.is_file():
        raise AdapterError(f"{weights} is missing; save the adapter with save_pretrained(), in safetensors")
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError) as error:
        raise AdapterError(f"adapter {folder}: PEFT cannot read its {CONFIG_FILE} ({one_line(error)})") from error
    try:
        with safe_open(weights, "pt") as file:
            tensors = frozenset(file.keys())
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{weights} is damaged or truncated ({error}); download or save it again") from error
    if config.task_type not in (None, TaskType.CAUSAL_LM):
        raise AdapterError(f"adapter {folder} is for the task {config.task_type}, not of a causal language model")
    config.inference_mode = True
    return Adapter(name, folder, config, tensors, file_sha256(weights))


@dataclass(frozen=True)
class Expert:
    """A model that answers, whose files are in order; nothing of it is loaded."""

    name: str  # in tables and messages
    base: BaseArguments
    config: PretrainedConfig  # of the base
    adapter: Adapter | None
    tokenizer: Any  # the adapter's own if it has one, else the base's
    limit: int | None = None  # tokens of a prompt at most
    merged: bool = False  # whether the adapter is merged into the base before it answers

    @property
    def context(self) -> int | None:
        """Most tokens of prompt and answer."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)

    @property
    def dtype(self) -> str:
        """In which its base runs."""
        dtype = base_dtype(self.base, self.base.use_cpu)
        return str(self.config.dtype if dtype == "auto" else dtype).removeprefix("torch.")

    def identity(self) -> dict[str, Any]:
        """What its answers depend on, prompts aside: the same wherever its files lie and whenever they were copied."""
        name = self.base.model_name_or_path
        commit = getattr(self.config, "_commit_hash", None) or self.base.model_revision
        return {
            "base": base_fingerprint(name) or f"{name}@{commit}",
            "dtype": self.dtype,
            "bits": 4 if self.base.load_in_4bit else 8 if self.base.load_in_8bit else 16,
            "merged": self.merged,
            "adapter": self.adapter.sha256 if self.adapter else NO_ADAPTER,
            "adapter_config": file_sha256(self.adapter.folder / CONFIG_FILE) if self.adapter else None,
            "tokenizer": tokenizer_identity(self.tokenizer),
        }

    def without_adapter(self) -> Expert:
        """Its base alone, with its tokenizer."""
        return replace(self, adapter=None)

    def record(self) -> dict[str, Any]:
        """What is published of it: names without local paths, and what its files are."""
        return {
            "name": self.name,
            "base_model": display_name(self.base.model_name_or_path),
            **self.identity(),
            "max_prompt_length": self.limit,
        }

    def encode(self, examples: Examples) -> Prompts:
        """Prompts in its tokenizer and chat template, as training has them; longer ones are cut on the left."""
        try:
            prompts = self._encode(examples)
            check_token_ids([Dataset.from_dict({"input_ids": prompts.ids})], self.config)
        except UserError as error:
            raise UserError(f"{self.name}: {error}") from error
        return prompts

    def _encode(self, examples: Examples) -> Prompts:
        records, prompts = examples.records, Prompts()
        for index, (prompt, answer) in zip(examples.indices, examples.examples, strict=True):
            rendered = records.call(index, render_prompt, prompt, answer, examples.format, self.tokenizer)
            ids = tokenize_prompt(rendered, self.tokenizer)
            if not ids:
                raise UserError(f"{records.where(index)}: the prompt is empty; fill it or leave the record out")
            short = cut_prompt(ids, self.limit, self.tokenizer.bos_token_id)
            prompts.texts.append(rendered.text)
            prompts.ids.append(short)
            prompts.lengths.append(len(short))
            prompts.references.append(rendered.reference)
            prompts.cut += len(short) < len(ids)
        return prompts


def find_expert(
    base: BaseArguments,
    adapter: str = NO_ADAPTER,
    revision: str | None = None,
    name: str | None = None,
    generation: GenerationArguments | None = None,
    merged: bool = False,
) -> Expert:
    """Find an expert, and check on the meta device that its adapter fits the base.

    Without `generation`, from which the room for a prompt follows, it will not generate.
    """
    found = find_adapter(adapter, revision)
    config = _check_fit(base, found, merged)
    tokenizer = load_tokenizer(base, found.folder if found else None, base.trust_remote_code)  # the adapter's own
    limit = None if generation is None else prompt_limit(config, generation, found.virtual_tokens if found else 0)
    default = display_name(base.model_name_or_path if found is None else adapter)
    return Expert(name or default, base.base(), config, found, tokenizer, limit, merged)


def _check_fit(base: BaseArguments, adapter: Adapter | None, merged: bool) -> PretrainedConfig:
    """The base's config, once a LoRA adapter is known to fit; others are checked when they are loaded."""
    skeleton = base_skeleton(base, base.trust_remote_code)
    config, name = skeleton.config, base.model_name_or_path
    if adapter is None:
        return config
    width, token_dim = config.get_text_config().hidden_size, getattr(adapter.config, "token_dim", None)
    if token_dim not in (None, width):  # of prompt tuning and the like
        raise _unfit(adapter, name, f"its virtual tokens have {token_dim} features, the base has {width}")
    if merged and adapter.config.is_prompt_learning:
        raise AdapterError(
            f"adapter {adapter.given} puts tokens before the prompt, which cannot be merged into a base"
        )
    if adapter.only_adds:
        with torch.device("meta"):
            fitted = _fit(skeleton, adapter, name, low_cpu_mem_usage=True, torch_device="cpu")
        surplus = adapter.tensors - get_peft_model_state_dict(fitted, save_embedding_layers=False).keys()
        if surplus:
            raise _unfit(adapter, name, f"the base has no place for {min(surplus)}")
    return config


def _fit(base: PreTrainedModel, adapter: Adapter, base_name: str, **options: Any) -> Any:
    """Put an adapter on a base; every weight of it must find its place and every place a weight."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return PeftModel.from_pretrained(
                base,
                str(adapter.folder),
                # a copy: PEFT writes into it, and another model may need it again
                config=type(adapter.config).from_pretrained(str(adapter.folder)),
                **options,
            )
    # a missing or wrong module can end in any of these, by the kind of adapter; the warning above is a UserWarning
    except (ValueError, RuntimeError, TypeError, KeyError, AttributeError, UserWarning, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise _unfit(adapter, base_name, one_line(error)[:300]) from error


def _unfit(adapter: Adapter, base_name: str, reason: str) -> AdapterError:
    own = adapter.config.base_model_name_or_path or "not named in its config"
    told = f"adapter {adapter.given} does not fit base model {base_name} ({reason})"
    return AdapterError(f"{told}; give the base it was trained on ({own})")


def prompt_limit(config: PretrainedConfig, how: GenerationArguments, virtual: int) -> int | None:
    """Tokens of a prompt at most: as asked for, else the context length minus the answer and virtual tokens."""
    context, wanted = getattr(config.get_text_config(), "max_position_embeddings", None), how.max_prompt_length
    if context is None:
        return wanted
    room = int(context) - how.max_new_tokens - virtual
    taken = f"--max_new_tokens {how.max_new_tokens} leaves {{}} in the model's context of {context} tokens"
    if room < 2:
        raise UserError(taken.format("no room for a prompt") + ": lower it")
    if wanted is not None and wanted > room:
        raise UserError(f"--max_prompt_length {wanted}: {taken.format(f'{room} tokens')}: give {room} at most")
    return wanted or room


# ---- identity: the same wherever files lie and whenever they were copied ----------------------------------------


def base_fingerprint(name: str) -> str | None:
    """Hash of a local base model's files, the same for every copy; None for a Hub id, which its commit tells."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".safetensors", ".bin"):
            digest.update(f"{path.name} {_weights_sha256(path)}".encode())
        elif path.is_file() and path.name.startswith(_ANSWER_FILES):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _weights_sha256(path: Path) -> str:
    """Hash of a weight file; of a large safetensors file, of its header and three pieces of every tensor.

    That takes a moment where all would take minutes, and no training leaves all three pieces of a tensor as they were.
    """
    if path.stat().st_size <= _WHOLE or path.suffix != ".safetensors":
        return file_sha256(path)
    digest = hashlib.sha256(str(path.stat().st_size).encode())
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = file.read(length)
        digest.update(header)
        spans = [entry["data_offsets"] for key, entry in json.loads(header).items() if key != "__metadata__"]
        for start, end in sorted(spans):
            for place in (start, (start + end) // 2, max(start, end - _PIECE)):
                file.seek(8 + length + place)
                digest.update(file.read(min(_PIECE, end - place)))
    return digest.hexdigest()


def tokenizer_identity(tokenizer: Any) -> str:
    """What a tokenizer makes of texts and messages, and which token ends an answer."""
    words = [tokenizer_fingerprint(tokenizer), tokenizer.eos_token_id, getattr(tokenizer, "chat_template", None)]
    return hashlib.sha256(json.dumps(words, sort_keys=True).encode()).hexdigest()[:16]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """What tells tokenizers apart whose tokens are not the same: a hash of the fast tokenizer and its special ids."""
    # a chat template writes texts, it changes no token; how batches are padded and cut is not the tokenizer's own
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = {**json.loads(backend.to_str()), "padding": None, "truncation": None} if backend else tokenizer.get_vocab()
    parts = [words, sorted(tokenizer.all_special_ids)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


# ---- running ----------------------------------------------------------------------------------------------------


class ExpertRunner:
    """A place for one base in memory, on which adapters follow each other; another base takes its place."""

    def __init__(self, device: torch.device) -> None:
        self.device = torch.device("cpu") if device.type == "cpu" else device  # safetensors knows no cpu:0
        self._args: BaseArguments | None = None
        self._base: PreTrainedModel | None = None

    def load(self, base: BaseArguments) -> PreTrainedModel:
        """A base alone, on its device and in evaluation mode; loaded if it is not."""
        base = base.base()
        if self._base is None or self._args != base:
            self.release()
            model = load_base(base, base.use_cpu, base.trust_remote_code)
            if not (base.load_in_4bit or base.load_in_8bit):  # bitsandbytes has put it where it belongs
                model.to(self.device)  # type: ignore[arg-type]
            self._args, self._base = base, model.eval()
        return self._base

    @contextlib.contextmanager
    def running(self, expert: Expert) -> Iterator[Any]:
        """The model of an expert, frozen and in evaluation mode."""
        base = self.load(expert.base)
        adapter = expert.adapter
        if adapter is None:
            yield base
            return
        self._base = None
        model = _fit(base, adapter, expert.base.model_name_or_path, torch_device=str(self.device))
        model.requires_grad_(False)
        if expert.merged:
            model = model.merge_and_unload()
        yield model.eval()
        if adapter.only_adds and not expert.merged:
            self._base = model.unload()
            return
        del base, model  # before another base is loaded; what PEFT makes of it refers to itself
        clear_device_cache(garbage_collection=True)

    def release(self) -> None:
        """Free the memory."""
        self._base = None
        clear_device_cache(garbage_collection=True)
