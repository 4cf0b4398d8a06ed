"""Experts: LoRA supervised fine-tuning, of a new adapter or of one that is there; what a fusion is compared with.

The same flags give a fusion and its directly tuned twin the same token ids in the same order. What `load_adapter`
would refuse (DoRA, biases, PiSSA, ...) has no flag.
"""

import contextlib
import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments, set_seed
from transformers.pytorch_utils import Conv1D

from heterofusion.adapters.architectures import module_key
from heterofusion.adapters.config import AdapterError, read_adapter_config
from heterofusion.adapters.lora import LoraAdapter, check_base_fits, load_adapter
from heterofusion.data.labels import is_labelled_by_sources
from heterofusion.method.expansion import (
    ExpandedAdapter,
    Expansion,
    expand_adapter,
    fit_basis,
    read_rows,
    set_ranks,
    write_rows,
)
from heterofusion.publish.record import (
    adapter_record,
    basis_record,
    control_of,
    describe_basis,
    describe_labels,
    join_controls,
    label_control,
    make_record,
    training_cost,
)
from heterofusion.publish.write import write_adapter
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.files import read_json_object, write_json
from heterofusion.runtime.sharding import load_whole_tensors, whole_tensors
from heterofusion.training.base import AdapterTrainer
from heterofusion.training.checkpoints import check_complete, check_same
from heterofusion.training.config import ALL_LINEAR, LORA_B, LoraArguments
from heterofusion.training.mixture import TrainingData

SETTINGS = (
    "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "layers_to_transform", "modules_to_save"
)  # fmt: skip
STATE_FILE = "expert_state.json"  # in a checkpoint: what the LoRA began as, what of it is trained, and on what


# ---- the LoRA ---------------------------------------------------------------------------------------------------


@dataclass
class ExpertLora:
    """The LoRA that an expert is trained with: PEFT's config, the adapter that it begins as, and what is trained.

    `initial` is None for a new one and, with `--extra_rank`, an expanded one; `train_only` None trains all of it.
    """

    config: LoraConfig
    initial: LoraAdapter | None = None
    train_only: str | None = None

    @property
    def expansion(self) -> Expansion | None:
        """What was added to the adapter that it begins as."""
        return self.initial.expansion if isinstance(self.initial, ExpandedAdapter) else None

    def put_on(self, base: PreTrainedModel, seed: int) -> PeftModel:
        """Give a base the LoRA, in fp32, with gradients for what is trained; `seed` is of a new LoRA's lora_A."""
        set_seed(seed)
        model = get_peft_model(base, self.config) if self.initial is None else self._load_initial(base, self.initial)
        for name, parameter in model.named_parameters():
            if self.train_only is not None and f".{self.train_only}." not in name:
                parameter.requires_grad_(False)
        return model

    def _load_initial(self, base: PreTrainedModel, adapter: LoraAdapter) -> PeftModel:
        """Put the adapter on a base (changed in place) to be trained on, in fp32."""
        try:
            model: Any = get_peft_model(base, self.config)
            placed: Any = set_peft_model_state_dict(model, adapter.state_dict())
            lacking = [key for key in placed.missing_keys if "lora_" in key or "modules_to_save" in key]
            if lacking or placed.unexpected_keys:
                raise UserError(f"missing {lacking[:3]}, unexpected {[*placed.unexpected_keys][:3]}")
        except (ValueError, RuntimeError, KeyError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise AdapterError(
                f"--init_adapter {adapter.name} does not fit base model {base.config.name_or_path} ({error}); give "
                f"the base it was trained on ({adapter.base_model or 'not named in its config'})"
            ) from error
        return model

    def state(self) -> dict[str, Any]:
        """What a checkpoint to resume from must agree with, beside the config."""
        return {
            "init_adapter": self.initial.sha256 if self.initial else None,
            "train_only": self.train_only,
            "extra_rank": self.expansion.extra_rank if self.expansion else None,
            "extra_basis": self.expansion.extra_basis if self.expansion else None,
        }

    def write_state(self, checkpoint: Path, data: Mapping[str, Any]) -> None:
        """Write that into a checkpoint, with the extra rows that it began with and what it was trained on."""
        if self.initial is not None:
            write_rows(checkpoint, self.initial)
        write_json(checkpoint / STATE_FILE, self.state() | dict(data))

    def fit_basis(self, model: PeftModel, examples: Sequence[Tensor]) -> None:
        """Fit the extra rows to the inputs that the modules see, and put them into the model. All ranks together."""
        assert isinstance(self.initial, ExpandedAdapter)
        self.initial = fit_basis(model, self.initial, examples)
        base: Any = model.get_base_model()
        for path, module in self.initial.modules.items():
            load_whole_tensors(base.get_submodule(path).lora_A["default"], {"weight": module.lora_A})

    def restore_basis(self, checkpoint: Path) -> None:
        """Take the extra rows from a checkpoint to resume from; its adapter has what became of them."""
        if isinstance(self.initial, ExpandedAdapter):
            self.initial = read_rows(checkpoint, self.initial)

    def check_checkpoint(self, folder: Path, data: Mapping[str, Any] | None = None) -> None:
        """Check that a checkpoint to resume from is complete and of the same LoRA and data; reads no weights."""
        check_complete(folder)
        in_folders = any(path.is_dir() for path in folder.iterdir())  # where DeepSpeed and FSDP keep the optimizer
        if not (folder / "optimizer.pt").is_file() and not in_folders:
            raise UserError(f"{folder} holds no optimizer (--save_only_model?); resume from another checkpoint")
        check_same(folder, read_json_object(folder / STATE_FILE), self.state() | dict(data or {}))
        names = (*SETTINGS, "rank_pattern", "alpha_pattern")
        found, wanted = read_adapter_config(folder), self.config.to_dict()
        check_same(folder, settings(found, names), settings(wanted, names))


def settings(config: Mapping[str, Any], names: Sequence[str] = SETTINGS) -> dict[str, Any]:
    """Settings of a PEFT config so that they can be compared and written: sets and lists in order."""
    values = {name: config.get(name) for name in names}
    return {name: sorted(value) if isinstance(value, (list, set)) else value for name, value in values.items()}


def choose_lora(skeleton: PreTrainedModel, lora: LoraArguments, seed: int = 42) -> ExpertLora:
    """A new LoRA, or that of `--init_adapter`; all is checked on a base on the meta device, which may get it."""
    if lora.init_adapter is None:
        return ExpertLora(_plan_new(skeleton, lora), None, lora.train_only)
    adapter = load_adapter(lora.init_adapter, revision=lora.init_revision)
    if lora.extra_rank:
        adapter = expand_adapter(adapter, lora, seed)
    config = _plan_initial(skeleton, adapter)
    if lora.lora_dropout is not None:
        config.lora_dropout = lora.lora_dropout
    return ExpertLora(config, adapter, lora.train_only)


def check_basis_engine(lora: ExpertLora, args: TrainingArguments) -> None:
    """Refuse extra rows that an engine would not take: DeepSpeed's optimizers train copies that it made before."""
    if lora.expansion is not None and lora.train_only != LORA_B and args.deepspeed_plugin is not None:
        raise UserError(
            "--extra_rank fits rows of lora_A of which DeepSpeed has made the copies that it trains: add "
            f"--train_only {LORA_B}, or launch with DDP or FSDP2"
        )


def _plan_initial(skeleton: PreTrainedModel, adapter: LoraAdapter) -> LoraConfig:
    """PEFT's config of an adapter that fits a base, for training."""
    check_base_fits(skeleton, adapter)
    config = LoraConfig.from_pretrained(str(adapter.folder))
    set_ranks(config, adapter)
    config.inference_mode = False
    config.base_model_name_or_path = skeleton.config.name_or_path  # PEFT looks it up when it saves
    return config


def _plan_new(skeleton: PreTrainedModel, lora: LoraArguments) -> LoraConfig:
    """PEFT's config of a new LoRA, tried out on a base without weights: it must be one that can be fused."""
    name = str(skeleton.config.name_or_path)
    paths = [path for path, _ in skeleton.named_modules()]
    _check_named("--modules_to_save", lora.modules_to_save or (), paths, name)
    targets = lora.target_modules or _projections(skeleton)
    layers = None if lora.layers_to_transform is None else sorted(set(lora.layers_to_transform))
    config = LoraConfig(
        task_type="CAUSAL_LM",
        bias="none",
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=0.05 if lora.lora_dropout is None else lora.lora_dropout,
        target_modules=ALL_LINEAR if targets == [ALL_LINEAR] else targets,
        layers_to_transform=layers,
        use_rslora=lora.use_rslora,
        modules_to_save=lora.modules_to_save,
        init_lora_weights=True if lora.init_lora_weights == "true" else lora.init_lora_weights,  # type: ignore[arg-type]
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
    _check_named("--target_modules", targets if targets != [ALL_LINEAR] else (), model.targeted_module_names, name)
    return config


def _check_named(flag: str, names: Sequence[str], paths: Sequence[str], base: str) -> None:
    for name in names:
        if not any(path == name or path.endswith(f".{name}") for path in paths):
            raise UserError(f"{flag}: base model {base} has no module {name}; name one that it has")


def _projections(skeleton: nn.Module) -> list[str]:
    """Names of the linear layers that do one of the seven roles, as far as a base has them."""
    names = set()
    for path, module in skeleton.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            with contextlib.suppress(AdapterError):  # a layer of another kind, such as a router: it gets no LoRA
                if module_key(path) is not None:
                    names.add(path.rpartition(".")[2])
    if not names:
        raise UserError("the base model has no linear layers of known roles; name some with --target_modules")
    return sorted(names)


# ---- the result -------------------------------------------------------------------------------------------------


def export_expert(
    trainer: AdapterTrainer,
    folder: Path,
    base: str,
    lora: ExpertLora,
    data: TrainingData,
    metrics: Mapping[str, Any],
    resumed_from_step: int | None,
) -> None:
    """Write an expert with settings, data and metrics of its run in `expert.json`. All ranks together."""
    args, labels = trainer.args, data.labels_record
    settled = {"steps": trainer.state.global_step, "processes": args.world_size, "data": data.replay_record}
    training = args.training_dict() | settled
    record = make_record(
        "tuning",
        lora.train_only or "lora",
        base,
        training_cost(metrics, resumed_from_step),
        seed=args.seed,
        ran_source_models=is_labelled_by_sources(labels),
        control=join_controls(label_control(labels), control_of(lora.initial)),
        lora=settings(lora.config.to_dict(), (*SETTINGS, "init_lora_weights")),
        init_adapter=adapter_record(lora.initial) if lora.initial else None,
        basis=basis_record(lora.initial),
        train_only=lora.train_only,
        training=training if labels is None else training | {"source_labels": labels},
        metrics=dict(metrics),
    )
    begun = f", begun as the adapter `{record['init_adapter']['name']}`" if record["init_adapter"] else ""
    part = f" Its `{record['train_only']}` alone was trained." if record["train_only"] else ""
    rank, base = record["lora"]["r"], record["base_model"]
    text = f"A LoRA adapter of rank {rank} for `{base}`{begun}, trained with the loss on the answers only.{part}"
    sets = [*data.replay_record.get("datasets", []), *(labels["files"] if labels else [])]
    rows = "\n".join(["| data set | examples |", "|---|---|", *(f"| {one['name']} | {one['kept']} |" for one in sets)])
    about = "\n\n".join(filter(None, [text, describe_basis(record["basis"]), rows, describe_labels(labels)]))
    export_lora(trainer, folder, record, about)


def export_lora(trainer: AdapterTrainer, folder: Path, record: Mapping[str, Any], about: str) -> None:
    """Write the adapter that was trained, with its record and card. All ranks together."""
    model: Any = trainer.model
    names = ((name, p) for name, p in model.named_parameters() if "lora_" in name or ".modules_to_save." in name)
    weights = get_peft_model_state_dict(model, whole_tensors(names), save_embedding_layers=False)
    if trainer.args.should_save:
        config = copy.copy(model.peft_config["default"])
        config.inference_mode = True
        write_adapter(folder, weights, config, record, about=about, tokenizer=trainer.processing_class)
    trainer.accelerator.wait_for_everyone()
