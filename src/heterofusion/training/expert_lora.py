"""The LoRA of an expert: a new one that a fusion can read, or one that is there and is trained on."""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments, set_seed
from transformers.pytorch_utils import Conv1D

from heterofusion.adapters.architectures import module_key
from heterofusion.adapters.config import AdapterError, read_adapter_config
from heterofusion.adapters.lora import LoraAdapter, check_base_fits, load_adapter
from heterofusion.method.basis import fit_basis
from heterofusion.method.expansion import (
    ExpandedAdapter,
    Expansion,
    expand_adapter,
    read_rows,
    set_ranks,
    write_rows,
)
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.files import read_json_object
from heterofusion.runtime.sharding import load_whole_tensors
from heterofusion.training.checkpoints import missing_part
from heterofusion.training.expert import ALL_LINEAR, LORA_B, LoraArguments
from heterofusion.training.mixture_data import check_data_state

STATE_FILE = "expert_state.json"  # in a checkpoint: what the LoRA began as, and what of it is trained
DATA = "data"  # there: what it was trained on
_DROPOUT = 0.05


@dataclass
class ExpertLora:
    """The LoRA that an expert is trained with.

    Attributes:
        config: PEFT's config of it.
        initial: the adapter that it begins as; None for a new one. With `--extra_rank` an expanded one.
        train_only: `lora_B` if nothing else is trained.
    """

    config: LoraConfig
    initial: LoraAdapter | None = None
    train_only: str | None = None

    def put_on(self, base: PreTrainedModel, seed: int) -> PeftModel:
        """Give a base the LoRA, in fp32, with gradients for what is trained.

        Args:
            base: changed in place.
            seed: of a new LoRA's lora_A.

        Raises:
            AdapterError: the initial adapter does not fit.
        """
        set_seed(seed)
        if self.initial is not None:
            return load_initial(base, self.initial, self.train_only, self.config)
        model = get_peft_model(base, self.config)
        freeze_all_but(model, self.train_only)
        return model

    def state(self) -> dict[str, Any]:
        """What a checkpoint to resume from must agree with, beside the config."""
        expansion = self.expansion
        return {
            "init_adapter": self.initial.sha256 if self.initial else None,
            "train_only": self.train_only,
            "extra_rank": expansion.extra_rank if expansion else None,
            "extra_basis": expansion.extra_basis if expansion else None,
        }

    @property
    def expansion(self) -> Expansion | None:
        """What was added to the adapter that it begins as."""
        return self.initial.expansion if isinstance(self.initial, ExpandedAdapter) else None

    def write_state(self, checkpoint: Path, data: Mapping[str, Any] | None = None) -> None:
        """Write that into a checkpoint, and the extra rows that it began with.

        Args:
            checkpoint: its folder.
            data: what it was trained on, see `heterofusion.training.mixture_data.data_state`.
        """
        if self.initial is not None:
            write_rows(checkpoint, self.initial)
        state = self.state() | ({} if data is None else {DATA: dict(data)})
        (checkpoint / STATE_FILE).write_text(json.dumps(state) + "\n", encoding="utf-8")

    def fit_basis(self, model: PeftModel, examples: Sequence[Tensor]) -> None:
        """Fit the extra rows to the inputs that the modules see, and put them into the model. All ranks together.

        Args:
            model: what `put_on` gave, before its first step.
            examples: see `heterofusion.method.basis.fit_basis`.
        """
        assert isinstance(self.initial, ExpandedAdapter)
        self.initial = fit_basis(model, self.initial, examples)
        base: Any = model.get_base_model()
        for path, module in self.initial.modules.items():
            load_whole_tensors(base.get_submodule(path).lora_A["default"], {"weight": module.lora_A})

    def restore_basis(self, checkpoint: Path) -> None:
        """Take the extra rows from a checkpoint to resume from, for the record: its adapter has what became of them.

        Raises:
            ValueError: they cannot be read.
        """
        if isinstance(self.initial, ExpandedAdapter):
            self.initial = read_rows(checkpoint, self.initial)


def choose_lora(skeleton: PreTrainedModel, lora: LoraArguments, seed: int = 42) -> ExpertLora:
    """A new LoRA, or that of `--init_adapter`, as the flags say; everything is checked.

    Args:
        skeleton: the base on the meta device; it may get the LoRA.
        lora: the flags.
        seed: of the rows of `--extra_rank`: those of a fusion with the same seed.

    Raises:
        AdapterError: the initial adapter cannot be read or does not fit the base.
        ValueError: a new one cannot be made.
    """
    if lora.init_adapter is None:
        return ExpertLora(plan_lora(skeleton, lora), None, lora.train_only)
    adapter = load_adapter(lora.init_adapter, revision=lora.init_revision)
    if lora.extra_rank:
        adapter = expand_adapter(adapter, lora, seed)
    config = plan_initial(skeleton, adapter)
    if lora.lora_dropout is not None:
        config.lora_dropout = lora.lora_dropout
    return ExpertLora(config, adapter, lora.train_only)


def check_basis_engine(lora: ExpertLora, args: TrainingArguments) -> None:
    """Refuse extra rows that an engine would not take: DeepSpeed's optimizers train copies that it made before.

    Raises:
        ValueError: lora_A is trained with DeepSpeed.
    """
    if lora.expansion is not None and lora.train_only != LORA_B and args.deepspeed_plugin is not None:
        raise UserError(
            "--extra_rank fits rows of lora_A once the engine is set up, but DeepSpeed trains copies of them that it "
            f"made before; add --train_only {LORA_B}, or launch with DDP or FSDP2"
        )


# ---- an adapter that is there -----------------------------------------------------------------------------------


def plan_initial(skeleton: PreTrainedModel, adapter: LoraAdapter) -> LoraConfig:
    """Check that an adapter fits a base, before its weights are loaded.

    Args:
        skeleton: the base on the meta device.
        adapter: the adapter.

    Returns:
        PEFT's config of it, for training.

    Raises:
        AdapterError: names the first module that does not fit.
    """
    check_base_fits(skeleton, adapter)
    config = LoraConfig.from_pretrained(str(adapter.folder))
    set_ranks(config, adapter)
    config.inference_mode = False
    # as of a new LoRA; PEFT looks this base up when it saves, on the Hub if need be
    config.base_model_name_or_path = skeleton.config.name_or_path
    return config


def load_initial(
    base: PreTrainedModel, adapter: LoraAdapter, train_only: str | None = None, config: LoraConfig | None = None
) -> PeftModel:
    """Put an adapter on a base to be trained on, in fp32.

    Args:
        base: changed in place.
        adapter: the adapter.
        train_only: `lora_B` to freeze everything else of it.
        config: what `plan_initial` gave; read anew by default.

    Raises:
        AdapterError: PEFT cannot place all of its weights.
    """
    config = config or plan_initial(base, adapter)
    model: Any
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            if isinstance(adapter, ExpandedAdapter):  # of shapes that its file does not have
                model = get_peft_model(base, config)
                placed: Any = set_peft_model_state_dict(model, adapter.state_dict())
                lacking = [key for key in placed.missing_keys if "lora_" in key or "modules_to_save" in key]
                if lacking or placed.unexpected_keys:
                    raise UserError(f"missing {lacking[:3]}, unexpected {[*placed.unexpected_keys][:3]}")
            else:
                model = PeftModel.from_pretrained(base, str(adapter.folder), is_trainable=True, config=config)
    except (ValueError, RuntimeError, KeyError, UserWarning) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise AdapterError(
            f"--init_adapter {adapter.name} does not fit base model {base.config.name_or_path} ({error}); give the "
            f"base it was trained on ({adapter.base_model or 'not named in its config'})"
        ) from error
    freeze_all_but(model, train_only)
    return model


def freeze_all_but(model: PeftModel, train_only: str | None) -> None:
    """Take the gradient from every weight whose name does not have `train_only` in it; None leaves all as they are."""
    for name, parameter in model.named_parameters():
        if train_only is not None and f".{train_only}." not in name:
            parameter.requires_grad_(False)


# ---- a new one --------------------------------------------------------------------------------------------------


def plan_lora(skeleton: PreTrainedModel, lora: LoraArguments) -> LoraConfig:
    """Choose the LoRA of an expert and try it out on a base without weights.

    Args:
        skeleton: the base on the meta device; it gets the LoRA.
        lora: the flags.

    Returns:
        PEFT's config for the real base.

    Raises:
        ValueError: the base has no such modules or layers, or the adapter could not be fused.
    """
    name = skeleton.config.name_or_path
    for saved in lora.modules_to_save or ():
        if not any(path == saved or path.endswith(f".{saved}") for path, _ in skeleton.named_modules()):
            raise UserError(f"--modules_to_save: base model {name} has no module {saved}; name one that it has")
    init: Any = True if lora.init_lora_weights == "true" else lora.init_lora_weights
    targets = lora.target_modules or _projections(skeleton)
    layers = None if lora.layers_to_transform is None else sorted(set(lora.layers_to_transform))
    config = LoraConfig(
        task_type="CAUSAL_LM",
        bias="none",
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=_DROPOUT if lora.lora_dropout is None else lora.lora_dropout,
        target_modules=ALL_LINEAR if targets == [ALL_LINEAR] else targets,
        layers_to_transform=layers,
        use_rslora=lora.use_rslora,
        modules_to_save=lora.modules_to_save,
        init_lora_weights=init,
    )
    try:
        with torch.device("meta"):
            model = get_peft_model(skeleton, config)
    except ValueError as error:
        raise UserError(f"--target_modules {' '.join(targets)} with --r {lora.r}: PEFT refuses ({error})") from error
    layers_found = set()
    for path, module in model.get_base_model().named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if not isinstance(module.get_base_layer(), (nn.Linear, Conv1D)):
            kind = type(module.get_base_layer()).__name__
            raise UserError(f"--target_modules: {path} is a {kind}; only LoRA of linear layers can be fused")
        try:
            key = module_key(path)
        except AdapterError as error:
            raise UserError(f"--target_modules: an adapter of {path} could not be fused: {error}") from error
        layers_found |= set() if key is None else {key.layer}
    if not layers_found:
        raise UserError(f"--target_modules {targets}: none lies in a decoder layer of base model {name}")
    if layers is not None and set(layers) != layers_found:
        missing = sorted(set(layers) - layers_found)
        raise UserError(f"--layers_to_transform: base model {name} has no layers {missing} with {targets}")
    for target in targets if targets != [ALL_LINEAR] else ():
        if not any(path == target or path.endswith(f".{target}") for path in model.targeted_module_names):
            raise UserError(f"--target_modules: base model {name} has no module {target}; name one that it has")
    return config


def _projections(skeleton: nn.Module) -> list[str]:
    """Names of the linear layers that do one of the seven roles, as far as a base has them."""
    names = set()
    for path, module in skeleton.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            try:
                key = module_key(path)
            except AdapterError:  # a layer of another kind, such as a router: it gets no LoRA
                continue
            if key is not None:
                names.add(path.rpartition(".")[2])
    if not names:
        raise UserError("the base model has no linear layers of known roles; name some with --target_modules")
    return sorted(names)


# ---- resuming ---------------------------------------------------------------------------------------------------


def check_expert_checkpoint(folder: Path, lora: ExpertLora) -> None:
    """Check that a checkpoint to resume from is complete and of the same LoRA; reads no weights.

    Raises:
        ValueError: files are missing or damaged, or a setting differs; names it.
    """
    lack = missing_part(folder)
    if lack is not None:
        raise UserError(f"{folder} is not a complete checkpoint: {lack}; resume from another one")
    in_folders = any(path.is_dir() for path in folder.iterdir())  # where DeepSpeed and FSDP keep the optimizer
    if not (folder / "optimizer.pt").is_file() and not in_folders:
        raise UserError(f"{folder} holds no optimizer (--save_only_model?); resume from another checkpoint")
    found, wanted = read_adapter_config(folder) | _read_state(folder), lora.config.to_dict() | lora.state()
    for name in (*lora.state(), "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules",
                 "layers_to_transform", "modules_to_save", "rank_pattern", "alpha_pattern"):  # fmt: skip
        there, here = plain(found.get(name)), plain(wanted[name])
        if there != here:
            raise UserError(
                f"{folder} was trained with another {name}: {there}, this run has {here}; resume with the same flags, "
                "or start in a new output_dir"
            )


def check_expert_data(folder: Path, data: Mapping[str, Any]) -> None:
    """Check that a checkpoint to resume from was trained on the same data, used alike.

    Args:
        folder: the checkpoint.
        data: of this run, see `heterofusion.training.mixture_data.data_state`.

    Raises:
        ValueError: names the first thing that differs.
    """
    check_data_state(folder, _read_state(folder).get(DATA), data)


def _read_state(folder: Path) -> dict[str, Any]:
    path = folder / STATE_FILE
    return read_json_object(path) if path.is_file() else {}


def plain(value: Any) -> Any:
    """A setting so that it can be compared and written: sets and lists in order."""
    return sorted(value) if isinstance(value, (list, set)) else value
