"""From flags to objects: adapters and their plan, tokenizer and base model, checked in order of their price."""

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from heterofusion.adapters import LoraAdapter, load_adapter
from heterofusion.architectures import load_base_config, module_key, read_source_configs
from heterofusion.config import AdapterArguments, MethodConfig, ModelArguments
from heterofusion.modeling import check_base_fits
from heterofusion.topology import AlignmentPlan, plan_alignment

logger = logging.getLogger(__name__)


def load_plan(adapters: AdapterArguments, method: MethodConfig, base: str | None = None) -> AlignmentPlan:
    """Read all adapters and align them. No base weights are loaded.

    Args:
        adapters: names of the adapters.
        method: settings of the alignment.
        base: base model of the target; needed only if the target has fused projections and does not name it.

    Raises:
        AdapterError: an adapter is not usable, or nothing aligns.
        ValueError: settings are out of range.
    """
    method.check_method()
    target = load_adapter(
        adapters.target_adapter, revision=adapters.target_revision, allow_pickle=adapters.allow_pickle
    )
    sources = [load_adapter(name, allow_pickle=adapters.allow_pickle) for name in adapters.source_adapters]
    return plan_alignment(
        target,
        sources,
        layer_alignment=method.layer_alignment,
        transfer_ratio=method.transfer_ratio,
        target_config=_target_config(target, base, adapters.trust_remote_code),
        source_configs=read_source_configs(adapters.source_configs, sources),
    )


def _target_config(target: LoraAdapter, base: str | None, trust_remote_code: bool) -> PretrainedConfig | None:
    keys = [module_key(path) for path in target.modules]
    if not any(key is not None and key.is_fused for key in keys) or not (base or target.base_model):
        return None
    return load_base_config(str(base or target.base_model), "target adapter", trust_remote_code)


def load_tokenizer(
    model: ModelArguments, target: LoraAdapter, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The target's tokenizer: the one saved with the adapter if there is one, else the base model's.

    Raises:
        ValueError: neither can be loaded.
    """
    own = (target.folder / "tokenizer_config.json").is_file()
    name = str(target.folder) if own else model.model_name_or_path
    try:
        return AutoTokenizer.from_pretrained(
            name, revision=None if own else model.model_revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"tokenizer of {name!r} cannot be loaded: {_first_line(error)}") from error


def check_base(model: ModelArguments, target: LoraAdapter, trust_remote_code: bool = False) -> None:
    """Check on the meta device, before any weight is loaded, that the base model has the adapter's modules.

    Raises:
        AdapterError: the config cannot be read or a module does not fit.
    """
    config = load_base_config(
        model.model_name_or_path, "--model_name_or_path", trust_remote_code, revision=model.model_revision
    )
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    check_base_fits(skeleton, target)


def load_base(model: ModelArguments, use_cpu: bool = False, trust_remote_code: bool = False) -> PreTrainedModel:
    """Load the target's base model, frozen, without a cache of keys and values in training.

    Raises:
        ValueError: it cannot be loaded.
    """
    kwargs: dict[str, Any] = {}
    if model.load_in_4bit or model.load_in_8bit:
        from transformers import BitsAndBytesConfig

        if model.load_in_4bit and model.load_in_8bit:
            raise ValueError("--load_in_4bit and --load_in_8bit exclude each other; choose one")
        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=model.load_in_4bit,
            load_in_8bit=model.load_in_8bit,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=base_dtype(model, use_cpu),
        )
    try:
        base = AutoModelForCausalLM.from_pretrained(
            model.model_name_or_path,
            revision=model.model_revision,
            dtype=base_dtype(model, use_cpu),
            attn_implementation=model.attn_implementation,
            trust_remote_code=trust_remote_code,
            **kwargs,
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"base model {model.model_name_or_path!r} cannot be loaded: {_first_line(error)}") from error
    base.requires_grad_(False)
    return base


def base_dtype(model: ModelArguments, use_cpu: bool) -> Any:
    """Dtype of the frozen base: as asked for, else bfloat16 on a GPU that has it, else float32."""
    if model.dtype is not None:
        return model.dtype if model.dtype == "auto" else getattr(torch, model.dtype)
    on_gpu = torch.cuda.is_available() and not use_cpu
    return torch.bfloat16 if on_gpu and torch.cuda.is_bf16_supported() else torch.float32


def check_output_dir(output_dir: str | None, resuming: bool, overwrite: bool) -> Path:
    """Refuse to write over another run.

    Raises:
        ValueError: no output_dir, a file of that name, or a folder with content that was not asked to be reused.
    """
    if not output_dir:
        raise ValueError("--output_dir is missing; name the folder for the fused adapter")
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir {folder.absolute()} is a file; name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (resuming or overwrite):
        raise ValueError(
            f"--output_dir {folder.absolute()} exists and is not empty; name another, resume with "
            "--resume_from_checkpoint true, or pass --overwrite true"
        )
    return folder


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
