"""From flags to objects: adapters and their plan, tokenizer and base model, checked in order of their price."""

import importlib.util
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from huggingface_hub.utils import HFValidationError, validate_repo_id
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_utils import IntervalStrategy

from heterofusion.adapters.alignment import AlignmentPlan, plan_alignment
from heterofusion.adapters.architectures import load_base_config, read_source_configs, read_target_config
from heterofusion.adapters.controls import control_sources
from heterofusion.adapters.lora import LoraAdapter, load_adapter
from heterofusion.data.arguments import AdapterArguments, DataArguments, ModelArguments
from heterofusion.method.base_model import check_base_fits
from heterofusion.runtime.errors import UserError
from heterofusion.training.config import MethodConfig
from heterofusion.training.engines import set_zero_init_dtype, without_zero_init
from heterofusion.training.label_loss import SOFT_IDS

logger = logging.getLogger(__name__)


def load_plan(
    adapters: AdapterArguments,
    method: MethodConfig,
    base: str | None = None,
    base_revision: str | None = None,
    target: LoraAdapter | None = None,
    seed: int = 42,
) -> AlignmentPlan:
    """Read all adapters and align them. No base weights are loaded.

    Args:
        adapters: names of the adapters.
        method: settings of the alignment.
        base: base model of the target; needed only if the target has fused projections and does not name it.
        base_revision: Hub revision of `base`.
        target: the target adapter, in place of the one that `adapters` names.
        seed: of the source control, if `adapters` asks for one.

    Raises:
        AdapterError: an adapter is not usable, or nothing aligns.
        ValueError: settings are out of range.
    """
    method.check_method()
    if target is None:
        target = load_adapter(
            adapters.target_adapter, revision=adapters.target_revision, allow_pickle=adapters.allow_pickle
        )
    sources = [load_adapter(name, allow_pickle=adapters.allow_pickle) for name in adapters.source_adapters]
    if adapters.source_control is not None:
        sources = control_sources(sources, adapters.source_control, seed)
    return plan_alignment(
        target,
        sources,
        layer_alignment=method.layer_alignment,
        transfer_ratio=method.transfer_ratio,
        target_config=read_target_config(target, base, base_revision, adapters.trust_remote_code),
        source_configs=read_source_configs(adapters.source_configs, sources),
    )


def load_tokenizer(
    model: ModelArguments, target: LoraAdapter | None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The target's tokenizer: the one saved with the adapter if there is one, else the base model's.

    Raises:
        ValueError: neither can be loaded.
    """
    own = target is not None and (target.folder / "tokenizer_config.json").is_file()
    name = str(target.folder) if target is not None and own else model.model_name_or_path
    try:
        return AutoTokenizer.from_pretrained(
            name, revision=None if own else model.model_revision, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # tokenizers raises plain Exception, and a broken file breaks transformers in any way
        raise UserError(
            f"tokenizer of {name!r} cannot be loaded ({_first_line(error).rstrip(':')}); save one there, or beside "
            "the target adapter, or give another --model_name_or_path"
        ) from error


def check_base(model: ModelArguments, target: LoraAdapter, trust_remote_code: bool = False) -> PretrainedConfig:
    """Check on the meta device, before any weight is loaded, that the base model has the adapter's modules.

    Returns:
        The base model's config.

    Raises:
        AdapterError: the config cannot be read or a module does not fit.
        ValueError: the config is of no causal language model, or quantization is not possible.
    """
    skeleton = base_skeleton(model, trust_remote_code)
    check_base_fits(skeleton, target)
    return skeleton.config


def base_skeleton(model: ModelArguments, trust_remote_code: bool = False) -> PreTrainedModel:
    """The base model on the meta device: everything but its weights.

    Raises:
        AdapterError: the config cannot be read.
        ValueError: the config is of no causal language model, or quantization is not possible.
    """
    if model.load_in_4bit and model.load_in_8bit:
        raise UserError("--load_in_4bit and --load_in_8bit exclude each other; choose one")
    if (model.load_in_4bit or model.load_in_8bit) and importlib.util.find_spec("bitsandbytes") is None:
        flag = "--load_in_4bit" if model.load_in_4bit else "--load_in_8bit"
        raise UserError(f"{flag} needs bitsandbytes; pip install 'heterofusion[quantization]', or leave the flag out")
    config = load_base_config(
        model.model_name_or_path, "--model_name_or_path", trust_remote_code, revision=model.model_revision
    )
    try:
        with torch.device("meta"), without_zero_init():
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # senseless sizes break a model's constructor in any way
        raise UserError(
            f"--model_name_or_path: no causal language model can be built from config.json of base model "
            f"{model.model_name_or_path!r} ({_first_line(error)}); give the base of the target adapter"
        ) from error


def check_token_ids(datasets: Sequence[Dataset | None], config: PretrainedConfig) -> None:
    """Check that the base model has an embedding for every token: another model's tokenizer may have more.

    Raises:
        ValueError: names the token id and the vocabulary's size.
    """
    size = config.get_text_config().vocab_size
    for dataset in datasets:
        largest = max((max(ids) for ids in dataset["input_ids"]), default=0) if dataset is not None else 0
        if dataset is not None and SOFT_IDS in dataset.column_names:
            largest = max([largest, *(max(map(max, ids)) for ids in dataset[SOFT_IDS] if ids)])
        if largest >= size:
            raise UserError(
                f"the tokenizer gave token id {largest}, but the vocabulary of base model {config.name_or_path} has "
                f"{size} entries: --model_name_or_path and the tokenizer saved with the target adapter do not belong "
                "together"
            )


def load_base(
    model: ModelArguments, use_cpu: bool = False, trust_remote_code: bool = False, bf16: bool = False
) -> PreTrainedModel:
    """Load the target's base model, frozen.

    Args:
        model: which one, and how.
        use_cpu: whether the run stays on the CPU.
        trust_remote_code: whether code of the Hub may run.
        bf16: whether it is to be bfloat16 where `--dtype` is not given.

    Raises:
        ValueError: it cannot be loaded.
    """
    kwargs: dict[str, Any] = {}
    dtype = base_dtype(model, use_cpu, bf16)
    set_zero_init_dtype(_own_dtype(model, trust_remote_code) if dtype == "auto" else dtype)
    if model.load_in_4bit or model.load_in_8bit:
        from transformers import BitsAndBytesConfig

        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=model.load_in_4bit,
            load_in_8bit=model.load_in_8bit,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
        )
    name = model.model_name_or_path
    try:
        result: Any = AutoModelForCausalLM.from_pretrained(
            name,
            revision=model.model_revision,
            dtype=dtype,
            attn_implementation=model.attn_implementation,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **kwargs,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"base model {name!r} cannot be loaded ({_first_line(error)}); check --model_name_or_path and its files"
        ) from error
    base, loaded = result  # typed as a model, but it is a pair with output_loading_info
    if loaded["missing_keys"]:  # transformers would fill them with random numbers
        raise UserError(
            f"the weights of base model {name!r} lack {len(loaded['missing_keys'])} tensors, such as "
            f"{min(loaded['missing_keys'])}; they do not belong to its config.json, download the model again"
        )
    base.requires_grad_(False)
    return base


def base_dtype(model: ModelArguments, use_cpu: bool, bf16: bool = False) -> Any:
    """Dtype of the frozen base: as asked for, else bfloat16 on a GPU that has it, else float32."""
    if model.dtype is not None:
        return model.dtype if model.dtype == "auto" else getattr(torch, model.dtype)
    on_gpu = torch.cuda.is_available() and not use_cpu
    return torch.bfloat16 if bf16 or (on_gpu and torch.cuda.is_bf16_supported()) else torch.float32


def _own_dtype(model: ModelArguments, trust_remote_code: bool) -> torch.dtype:
    config = load_base_config(
        model.model_name_or_path, "--model_name_or_path", trust_remote_code, revision=model.model_revision
    )
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32


def check_run_flags(args: TrainingArguments, data: DataArguments) -> None:
    """Refuse flags that would fail once the base model is loaded, or at the end of the run.

    Raises:
        ValueError: evaluation without data, an integration that is not there, or a name that the Hub cannot have.
    """
    if args.eval_strategy != "no" and not data.eval_dataset_name:
        strategy = IntervalStrategy(args.eval_strategy).value
        raise UserError(f"--eval_strategy is {strategy}, but --eval_dataset_name is not given; name one")
    try:  # Trainer would do so once the base is loaded
        for callback in get_reporting_integration_callbacks(args.report_to):
            callback()
    except (ValueError, RuntimeError) as error:
        names = ", ".join(cast("list[str]", args.report_to))  # a list once it is parsed
        raise UserError(f"--report_to is {names}: {error}") from error
    if args.push_to_hub:  # a name that the Hub cannot have would be refused once the adapter is trained
        try:
            validate_repo_id(args.hub_model_id or Path(str(args.output_dir)).resolve().name)
        except HFValidationError as error:
            raise UserError(str(error)) from error


def check_output_dir(
    output_dir: str, resuming: bool, overwrite: bool, resume_flag: str = "--resume_from_checkpoint"
) -> None:
    """Refuse to write over another run, or where nothing can be written. The folder is not made yet.

    Args:
        output_dir: The folder.
        resuming: Whether what is there is gone on with.
        overwrite: Whether what is there may be replaced.
        resume_flag: What the message calls the flag to resume with.

    Raises:
        ValueError: a file of that name, no permission, or a folder with content that was not asked to be reused.
    """
    folder = Path(output_dir).absolute()
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not nearest.is_dir():
        raise UserError(f"--output_dir {folder}: {nearest} is a file; name a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"--output_dir {folder}: {nearest} is not writable; name another folder")
    if folder == nearest and any(folder.iterdir()) and not (resuming or overwrite):
        raise UserError(
            f"--output_dir {folder} exists and is not empty; name another, resume with "
            f"{resume_flag} true, or pass --overwrite true"
        )


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
