"""Base models and tokenizers: read, checked without weights, loaded frozen."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from heterofusion.runtime.errors import UserError, one_line
from heterofusion.runtime.flags import flag
from heterofusion.runtime.ranks import set_zero_init_dtype, without_zero_init


@dataclass
class ModelArguments:
    """The target's base model and how it is loaded."""

    model_name_or_path: str = flag(help="Base model of the target adapter: local folder or Hub id.")
    model_revision: str | None = flag(None, help="Hub revision of the base model.")
    dtype: str | None = flag(
        None,
        help="Dtype of the frozen base; by default bfloat16 on a GPU that has it, else float32.",
        choices=["auto", "float32", "bfloat16", "float16"],
    )
    attn_implementation: str | None = flag(None, help="Attention of the base: sdpa, flash_attention_2, eager, ...")
    load_in_8bit: bool = flag(False, help="Load the base in 8 bit with bitsandbytes.")
    load_in_4bit: bool = flag(False, help="Load the base in 4 bit (nf4) with bitsandbytes.")


def load_tokenizer(
    model: ModelArguments, adapter_folder: Path | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer saved with the adapter if there is one, else the base model's."""
    name, revision = model.model_name_or_path, model.model_revision
    if adapter_folder is not None and (adapter_folder / "tokenizer_config.json").is_file():
        name, revision = str(adapter_folder), None
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers raises plain Exception, and a broken file breaks transformers in any way
        raise UserError(
            f"tokenizer of {name!r} cannot be loaded ({one_line(error)[:200].rstrip(':')}); save one there, or beside "
            "the target adapter, or give another --model_name_or_path"
        ) from error


def load_base_config(
    name_or_path: str, what: str, trust_remote_code: bool = False, revision: str | None = None
) -> PretrainedConfig:
    """A base model's `config.json`, local or from the Hub; `what` says whose base it is, or which flag names it."""
    try:
        if not Path(name_or_path).exists():
            # transformers' own download retries for half a minute without a network; this one fails at once
            snapshot_download(name_or_path, revision=revision, allow_patterns=["config.json"])
        return AutoConfig.from_pretrained(name_or_path, trust_remote_code=trust_remote_code, revision=revision)
    except Exception as error:  # every config class checks its values in its own way, with its own types
        flags = "" if what.startswith("--") else " with --source_configs or, for the target, --model_name_or_path"
        raise UserError(
            f"{what}: config.json of base model {name_or_path!r} cannot be read ({one_line(error)[:200]}); name a "
            f"folder that holds it{flags}"
        ) from error


def base_skeleton(model: ModelArguments, trust_remote_code: bool = False) -> PreTrainedModel:
    """The base model on the meta device: everything but its weights."""
    flags = [f"--{name}" for name in ("load_in_4bit", "load_in_8bit") if getattr(model, name)]
    if len(flags) > 1:
        raise UserError(f"{' and '.join(flags)} exclude each other; choose one")
    if flags and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"{flags[0]} needs bitsandbytes; pip install 'heterofusion[quantization]', or leave it out")
    config = _config(model, trust_remote_code)
    try:
        with torch.device("meta"), without_zero_init():
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # senseless sizes break a model's constructor in any way
        raise UserError(
            f"--model_name_or_path: no causal language model can be built from config.json of base model "
            f"{model.model_name_or_path!r} ({one_line(error)[:200]}); give the base of the target adapter"
        ) from error


def load_base(
    model: ModelArguments, use_cpu: bool = False, trust_remote_code: bool = False, bf16: bool = False
) -> PreTrainedModel:
    """Load the target's base model, frozen; it is bfloat16 with `bf16` where `--dtype` is not given."""
    kwargs: dict[str, Any] = {}
    dtype = base_dtype(model, use_cpu, bf16)
    held = _config(model, trust_remote_code).dtype if dtype == "auto" else dtype
    set_zero_init_dtype(held if isinstance(held, torch.dtype) else torch.float32)
    if model.load_in_4bit or model.load_in_8bit:
        from transformers import BitsAndBytesConfig

        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=model.load_in_4bit,
            load_in_8bit=model.load_in_8bit,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
        )
    name = model.model_name_or_path
    kwargs |= {"revision": model.model_revision, "trust_remote_code": trust_remote_code, "dtype": dtype}
    kwargs["attn_implementation"] = model.attn_implementation
    try:
        result: Any = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **kwargs)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"base model {name!r} cannot be loaded ({one_line(error)[:200]}); check --model_name_or_path and its files"
        ) from error
    base, loaded = result  # typed as a model, but it is a pair with output_loading_info
    if loaded["missing_keys"]:  # transformers would fill them with random numbers
        raise UserError(
            f"the weights of base model {name!r} lack {len(loaded['missing_keys'])} tensors, such as "
            f"{min(loaded['missing_keys'])}; they do not belong to its config.json, download the model again"
        )
    return base.requires_grad_(False)


def base_dtype(model: ModelArguments, use_cpu: bool, bf16: bool = False) -> Any:
    """Dtype of the frozen base: as asked for, else bfloat16 on a GPU that has it, else float32."""
    if model.dtype is not None:
        return model.dtype if model.dtype == "auto" else getattr(torch, model.dtype)
    on_gpu = torch.cuda.is_available() and not use_cpu
    return torch.bfloat16 if bf16 or (on_gpu and torch.cuda.is_bf16_supported()) else torch.float32


def check_token_ids(datasets: Sequence[Dataset | None], config: PretrainedConfig) -> None:
    """Check that the base model has an embedding for every token: another model's tokenizer may have more.

    Looked at are the columns whose names end with `_ids`: tokens, and those of soft labels.
    """

    def largest_in(ids: Any) -> int:  # of lists of lists
        innermost = isinstance(ids, list) and ids and isinstance(ids[0], int)
        return max(ids if innermost else map(largest_in, ids), default=0)

    size = config.get_text_config().vocab_size
    for dataset in filter(None, datasets):
        columns = [name for name in dataset.column_names if name.endswith("_ids")]
        largest = max((largest_in(dataset[name]) for name in columns), default=0)
        if largest >= size:
            raise UserError(
                f"the tokenizer gave token id {largest}, but the vocabulary of base model {config.name_or_path} has "
                f"{size} entries: --model_name_or_path and the tokenizer saved with the target adapter do not belong "
                "together"
            )


def _config(model: ModelArguments, trust_remote_code: bool) -> PretrainedConfig:
    return load_base_config(model.model_name_or_path, "--model_name_or_path", trust_remote_code, model.model_revision)
