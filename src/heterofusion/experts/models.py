"""The models of an evaluation: one base, and adapters that are put on it one after the other with plain PEFT."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from peft import get_peft_model_state_dict
from transformers import PretrainedConfig, PreTrainedModel

from heterofusion.adapters.config import AdapterError
from heterofusion.experts.expert import (  # noqa: F401
    Adapter,
    BaseArguments,
    _enough_memory,
    _fit,
    _unfit,
    adapter_tokenizer,
    base_fingerprint,
    find_adapter,
    prompt_limit,
)
from heterofusion.publish.record import PROVENANCE_FILE, RECORD_FILES, find_record
from heterofusion.runtime.errors import UserError, one_line
from heterofusion.runtime.loading import base_skeleton, load_base

logger = logging.getLogger(__name__)


def check_adapters(model: BaseArguments, adapters: Sequence[Adapter | None]) -> PretrainedConfig:
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
        if adapter is not None and getattr(model, "merge_adapters", False) and adapter.config.is_prompt_learning:
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


class Models:
    """The base model, loaded when it is first needed, with one adapter at a time.

    Args:
        args: The base and how it is loaded.
        device: Where it goes.
    """

    def __init__(self, args: BaseArguments, device: torch.device) -> None:
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
        if getattr(self.args, "merge_adapters", False):
            model = model.merge_and_unload()
        yield model.eval()
        if adapter.only_adds and not getattr(self.args, "merge_adapters", False):
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
