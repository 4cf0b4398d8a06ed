"""The models of an evaluation: one base, and adapters that are put on it one after the other with plain PEFT."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from huggingface_hub import snapshot_download
from huggingface_hub.utils import HFValidationError, validate_repo_id
from peft import PeftConfig, PeftModel, PeftType, TaskType, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from heterofusion.adapters.config import AdapterError, keeps_base
from heterofusion.adapters.lora import CONFIG_FILE, WEIGHTS_FILE
from heterofusion.evaluation.arguments import NO_ADAPTER, EvalModelArguments
from heterofusion.publish.record import PROVENANCE_FILE, RECORD_FILES, find_record
from heterofusion.runtime.errors import UserError, one_line
from heterofusion.runtime.files import file_sha256, read_json_object
from heterofusion.runtime.loading import base_skeleton, load_base, load_tokenizer

logger = logging.getLogger(__name__)

_HUB_FILES = ["*.json", WEIGHTS_FILE, "tokenizer.model", "*.jinja", "merges.txt", "vocab.*"]
# what a base's answers depend on beside configuration and weights: beginnings of file names
_ANSWER_FILES = ("generation_config", "tokenizer", "special_tokens_map", "added_tokens", "vocab.", "merges.")


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk.

    Args:
        given: What the user wrote.
        folder: Where its files are.
        config: PEFT's config.
        shapes: Shape by key of every tensor in its file.
        sha256: Of that file.
    """

    given: str
    folder: Path
    config: PeftConfig
    shapes: dict[str, tuple[int, ...]]
    sha256: str

    @property
    def only_adds(self) -> bool:
        """Whether it is LoRA and nothing else, so that it can be taken off the base without a trace."""
        init = getattr(self.config, "init_lora_weights", None)
        if self.config.peft_type != PeftType.LORA or getattr(self.config, "layer_replication", None):
            return False
        return keeps_base(init) and all(".lora_" in key for key in self.shapes)

    @property
    def virtual_tokens(self) -> int:
        """Tokens that it puts before every prompt."""
        return int(getattr(self.config, "num_virtual_tokens", 0)) if self.config.is_prompt_learning else 0


def find_adapter(name: str, revision: str | None = None) -> Adapter | None:
    """Find an adapter and read everything but its weights.

    Args:
        name: A local folder, a Hub id, or `none`.
        revision: Commit, branch or tag of a Hub id.

    Returns:
        The adapter; None for `none`.

    Raises:
        AdapterError: it is not there, has no safetensors file, or PEFT does not know its config.
    """
    if name == NO_ADAPTER:
        return None
    folder = _find_folder(name, revision)
    read_json_object(folder / CONFIG_FILE)  # PEFT's own messages name no file
    weights = folder / WEIGHTS_FILE
    if not weights.is_file():
        raise AdapterError(f"{weights} is missing; save the adapter with save_pretrained(), in safetensors")
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError) as error:
        raise AdapterError(f"adapter {folder}: PEFT cannot read its {CONFIG_FILE} ({one_line(error)})") from error
    if config.task_type not in (None, TaskType.CAUSAL_LM):
        raise AdapterError(
            f"adapter {folder} is for the task {config.task_type}; only adapters of causal language models answer"
        )
    config.inference_mode = True
    try:
        with safe_open(weights, "pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{weights} is damaged or truncated ({error}); download or save it again") from error
    return Adapter(name, folder, config, shapes, file_sha256(weights))


def _find_folder(name: str, revision: str | None) -> Path:
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if folder.exists():
        raise AdapterError(f"adapter {folder.resolve()} is a file; name the adapter's folder instead")
    missing = f"adapter folder {folder.absolute()} does not exist"
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise AdapterError(f"{missing}; name a folder that holds {CONFIG_FILE}, or a Hub id") from None
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_HUB_FILES))
    except Exception as error:  # the Hub client raises its own, its transport's and the system's types
        raise AdapterError(
            f"adapter {name!r} is neither a local folder ({folder.absolute()} does not exist) nor reachable on the "
            f"Hub ({type(error).__name__}); check the name and the network, or download it first"
        ) from error


def check_adapters(model: EvalModelArguments, adapters: Sequence[Adapter | None]) -> PretrainedConfig:
    """Check on the meta device, before any weight is loaded, that LoRA adapters fit the base.

    Adapters of other kinds, and those that need the base's weights to start with, are checked when they are loaded.

    Args:
        model: The base.
        adapters: What `find_adapter` gave.

    Returns:
        The base's config.

    Raises:
        AdapterError: an adapter does not fit; names it and a module.
        ValueError: the base cannot be built.
    """
    skeleton = base_skeleton(model, model.trust_remote_code)
    width = skeleton.config.get_text_config().hidden_size
    for adapter in adapters:
        token_dim = getattr(adapter.config, "token_dim", None) if adapter is not None else None
        if adapter is not None and token_dim not in (None, width):  # of prompt tuning and the like
            reason = f"its virtual tokens have {token_dim} features, the base has {width}"
            raise _unfit(adapter, model.model_name_or_path, reason)
        if adapter is not None and model.merge_adapters and adapter.config.is_prompt_learning:
            raise AdapterError(
                f"adapter {adapter.given} puts tokens before the prompt, which cannot be merged into the base: leave "
                "--merge_adapters out"
            )
        if adapter is None or not adapter.only_adds:
            continue
        with torch.device("meta"):
            fitted = _fit(skeleton, adapter, model.model_name_or_path, low_cpu_mem_usage=True, torch_device="cpu")
        expected = get_peft_model_state_dict(fitted, save_embedding_layers=False)
        surplus = sorted(adapter.shapes.keys() - expected.keys())
        if surplus:
            raise _unfit(adapter, model.model_name_or_path, f"the base has no place for {surplus[0]}")
        skeleton = fitted.unload()
    return skeleton.config


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
    wanted = adapter.config.base_model_name_or_path or "not named in its config"
    return AdapterError(
        f"adapter {adapter.given} does not fit base model {base_name} ({reason}); give the base it was trained on "
        f"({wanted})"
    )


def adapter_tokenizer(model: EvalModelArguments, adapter: Adapter | None) -> PreTrainedTokenizerBase:
    """The tokenizer saved beside an adapter, or else the base model's.

    Raises:
        ValueError: it cannot be loaded.
    """
    if adapter is not None and (adapter.folder / "tokenizer_config.json").is_file():
        model = replace(model, model_name_or_path=str(adapter.folder), model_revision=None)
    return load_tokenizer(model, None, model.trust_remote_code)


def base_fingerprint(name: str) -> str | None:
    """What tells a local base model from another one of the same folder name, or from what it was before.

    Args:
        name: A local folder or a Hub id.

    Returns:
        A hash of its configuration, of what it ends answers with and of its tokenizer, and of the names, sizes and
        times of its weight files; None for a Hub id, which `--model_revision` pins.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return None
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.iterdir()):
        if path.suffix in (".safetensors", ".bin"):
            status = path.stat()
            digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}".encode())
        elif path.is_file() and path.name.startswith(_ANSWER_FILES):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def prompt_limit(config: PretrainedConfig, max_new_tokens: int, wanted: int | None, virtual: int = 0) -> int | None:
    """Number of tokens that a prompt may have.

    Args:
        config: The base's.
        max_new_tokens: Tokens of an answer.
        wanted: `--max_prompt_length`, if given.
        virtual: Tokens that an adapter puts before the prompt.

    Returns:
        `wanted`, or the context length minus everything else; None where the config names no context length.

    Raises:
        ValueError: prompt and answer do not fit into the context length.
    """
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context is None:
        return wanted
    room = int(context) - max_new_tokens - virtual
    if room < 2:
        raise UserError(
            f"--max_new_tokens {max_new_tokens} leaves no room for a prompt: the model's context has {context} tokens"
            + (f", {virtual} of which the adapter takes" if virtual else "")
            + "; lower it"
        )
    if wanted is not None and wanted > room:
        raise UserError(
            f"--max_prompt_length {wanted} and --max_new_tokens {max_new_tokens} exceed the model's context of "
            f"{context} tokens; give {room} at most"
        )
    return room if wanted is None else wanted


class Models:
    """The base model, loaded when it is first needed, with one adapter at a time.

    Args:
        args: The base and how it is loaded.
        device: Where it goes.
    """

    def __init__(self, args: EvalModelArguments, device: torch.device) -> None:
        self.args = args
        self.device = torch.device("cpu") if device.type == "cpu" else device  # safetensors knows no cpu:0
        self._base: PreTrainedModel | None = None

    @contextlib.contextmanager
    def with_adapter(self, adapter: Adapter | None) -> Iterator[Any]:
        """The base with an adapter, in evaluation mode.

        Raises:
            AdapterError: the adapter does not fit.
            ValueError: the base cannot be loaded.
        """
        base = self.load()
        self._base = None
        if adapter is None:
            yield base
            self._base = base
            return
        with _enough_memory(f"adapter {adapter.given}"):
            model = _fit(base, adapter, self.args.model_name_or_path, torch_device=str(self.device))
        model.requires_grad_(False)
        if self.args.merge_adapters:
            model = model.merge_and_unload()
        yield model.eval()
        if adapter.only_adds and not self.args.merge_adapters:
            self._base = model.unload()
            return
        del base, model  # before another base is loaded; what PEFT makes of it refers to itself
        clear_device_cache(garbage_collection=True)

    def load(self) -> PreTrainedModel:
        """The base alone, on its device; loaded if it is not.

        Raises:
            ValueError: it cannot be loaded.
        """
        if self._base is None:
            with _enough_memory(f"base model {self.args.model_name_or_path}"):
                base = load_base(self.args, self.args.use_cpu, self.args.trust_remote_code)
                if not (self.args.load_in_4bit or self.args.load_in_8bit):  # bitsandbytes has put it where it belongs
                    base.to(self.device)  # type: ignore[arg-type]
            self._base = base.eval()
        return self._base


@contextlib.contextmanager
def _enough_memory(what: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{what} does not fit into memory ({one_line(error)[:200]}); load the base with --dtype bfloat16 or "
            "--load_in_4bit true"
        ) from error


def records_beside(adapter: Adapter) -> dict[str, Any]:
    """What results tell of an adapter's making, from the record that was written for its weights.

    Returns:
        `fusion`, None unless it is a fused adapter, and `made_by`, None where no record tells of it.
    """
    nothing: dict[str, Any] = {"fusion": None, "made_by": None}
    if not any((adapter.folder / name).is_file() for name in RECORD_FILES):
        return nothing
    try:
        name, record = find_record(adapter.folder, adapter.sha256)
    except UserError as error:
        logger.warning("%s; results do not tell what made adapter %s", error, adapter.given)
        return nothing
    try:
        made_by = record.get("made_by")
        if not (made_by is None or isinstance(made_by, dict)):
            raise TypeError(f"made_by is {made_by!r}, not an object")
        return {"fusion": _fusion_record(record) if name == PROVENANCE_FILE else None, "made_by": made_by}
    except (KeyError, TypeError, AttributeError) as error:
        path = adapter.folder / name
        logger.warning("%s is of another program or damaged (%s); results do not tell of it", path, one_line(error))
        return nothing


def _fusion_record(record: dict[str, Any]) -> dict[str, Any]:
    method = record["method"]
    return {
        **{name: method.get(name) for name in ("preset", "alpha_init", "mu_gate", "seed")},
        "sources": [source["name"] for source in record["sources"]],
        "train_seconds": record.get("metrics", {}).get("train_runtime"),
    }
