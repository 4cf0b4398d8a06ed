"""`HeteroFusionTrainer`: transformers' Trainer for hypernetworks around a target model.

The LM loss comes back normalized over the label tokens of the whole accumulation window and all ranks; RDM is added
once per window, on its last micro-batch. Checkpoints hold the hypernetworks; `save_model` exports the fused adapter.
"""

import logging
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer, default_data_collator
from transformers.trainer_callback import ProgressCallback

from heterofusion.base_model import refuse_reentrant_checkpointing
from heterofusion.checkpoints import load_hypernetworks, save_hypernetworks
from heterofusion.config import HeteroFusionConfig
from heterofusion.data import make_collator
from heterofusion.diagnostics import fusion_diagnostics
from heterofusion.export import display_name, export_adapter, push_adapter
from heterofusion.modeling import HeteroFusionModel

logger = logging.getLogger(__name__)

# Engines on which a backward outside the wrapper is safe; the others run the hypernetworks in every micro-batch.
_ONCE_PER_WINDOW = {
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
}


class FusionProgressCallback(ProgressCallback):
    """Trainer's progress bar; of the entries per role the terminal shows the mean, reports get them all."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        super().on_log(args, state, control, logs=mean_over_roles(logs or {}), **kwargs)


def mean_over_roles(logs: Mapping[str, Any]) -> dict[str, Any]:
    """Log entries with `alpha/<role>`, ... replaced by one mean per quantity; attention stays per source."""
    parts: dict[str, list[float]] = defaultdict(list)
    short: dict[str, Any] = {}
    for name, value in logs.items():
        quantity, _, role = name.partition("/")
        if role and quantity in ("alpha", "gate_sparsity", "delta_ratio"):
            parts[quantity].append(value)
        else:
            short[name] = value
    return short | {f"mean {quantity}": sum(values) / len(values) for quantity, values in parts.items()}


def refuse_data_parallel(args: HeteroFusionConfig) -> None:
    """Refuse several GPUs in one process.

    Raises:
        ValueError: Trainer would use DataParallel, whose replicas do not see the live updates.
    """
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs in one process would use DataParallel, which cannot carry live updates; "
            "start with `accelerate launch`, or set CUDA_VISIBLE_DEVICES to one GPU"
        )


def _check_same_method(model: HeteroFusionModel, args: HeteroFusionConfig) -> None:
    """Refuse a trainer whose settings of the method are others than the model's."""
    wanted = args.method_dict()
    for name, value in model.method.method_dict().items():
        if value != wanted[name]:
            raise ValueError(
                f"{name} is {value} in the model and {wanted[name]} in args; build the model with the same "
                "HeteroFusionConfig"
            )


class HeteroFusionTrainer(Trainer):
    """Trains the hypernetworks of a `HeteroFusionModel` by the LM loss on replay plus RDM.

    It is used as `Trainer` is. Logged besides Trainer's own: `lm_loss`, `rdm_loss`,
    and per role `alpha/`, `gate_sparsity/`, `delta_ratio/` (||alpha dB|| / ||B||), the share of attention per source
    `attention/`, and `hypernetwork_seconds` (forward, per optimizer step).

    Args:
        model: the model to train.
        args: a `HeteroFusionConfig`.
        train_dataset: examples with `input_ids` and `labels` (see `build_replay`).
        eval_dataset: the same, for evaluation.
        processing_class: the target's tokenizer; saved with the adapter and used for padding.
        data_collator: pads and batches; `make_collator` of the tokenizer by default.
        replay_record: plain values about the replay, for the provenance.
        **kwargs: passed on to `Trainer`.

    Raises:
        TypeError: model or args are of another type.
        ValueError: model and args differ in the method's settings; or an engine that cannot carry a fusion: several
            GPUs in one process, FSDP, ZeRO-3, DeepSpeed with mixed precision.
    """

    args: HeteroFusionConfig

    def __init__(
        self,
        model: HeteroFusionModel,
        args: HeteroFusionConfig,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        data_collator: Any = None,
        replay_record: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(model, HeteroFusionModel):
            raise TypeError(f"model is a {type(model).__name__}; build it with HeteroFusionModel.from_adapters()")
        if not isinstance(args, HeteroFusionConfig):
            raise TypeError(f"args is a {type(args).__name__}; a HeteroFusionConfig was expected")
        refuse_data_parallel(args)
        _check_same_method(model, args)
        if data_collator is None:
            data_collator = make_collator(processing_class) if processing_class else default_data_collator
        self._sums: dict[str, Tensor] = {}
        self._windows = 0
        self._once_per_window = False
        self.replay_record = replay_record or {}
        self.fusion_model = model
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=data_collator,
            **kwargs,
        )
        self._refuse_engines()
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(FusionProgressCallback)

    # ---- objective ----------------------------------------------------------------------------------------------

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """All parameters decay: norms, biases and alphas too, as in the published recipe."""
        return [name for name, _ in model.named_parameters()]

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One micro-batch. The hypernetworks run twice and backpropagate once per window, whatever the accumulation.

        All micro-batches but the last use detached updates, whose gradient is collected; their backward needs no
        reduction, so it bypasses the engine's wrapper. The last one takes the ordinary path.
        """
        updates = self.fusion_model.updates
        if not self._once_per_window:
            return super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            with updates.close_window():
                return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        set_training_mode = getattr(self.optimizer, "train", None)  # of schedule-free optimizers, as in Trainer
        if callable(set_training_mode):
            set_training_mode()
        inputs = self._prepare_inputs(inputs)
        with updates.collect_gradients(), self.compute_loss_context_manager():
            loss = self.compute_loss(self.fusion_model, inputs, num_items_in_batch=num_items_in_batch)
            loss = loss / self._loss_divisor(num_items_in_batch)
            loss.backward()
        return loss.detach()

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        refuse_reentrant_checkpointing(self.fusion_model.base_model)
        engine, precision = self.accelerator.distributed_type, self.accelerator.mixed_precision
        # a gradient scaler would scale the last micro-batch only
        self._once_per_window = engine in _ONCE_PER_WINDOW and precision != "fp16" and self.accelerator.scaler is None
        if not self._once_per_window and self.args.gradient_accumulation_steps > 1:
            logger.info("%s, precision %s: hypernetworks run in every micro-batch", engine.value, precision)
        self._sums, self._windows, self.fusion_model.updates.seconds = {}, 0, 0.0
        self.fusion_model.updates.discard_gradients()
        return prepared

    def _refuse_engines(self) -> None:
        """Refuse engines on which parameters are sharded or cast: their checkpoints and exports are not handled."""
        if self.is_fsdp_enabled:
            raise ValueError("FSDP shards the hypernetworks, which is not supported; use DDP or DeepSpeed ZeRO-2")
        if not self.is_deepspeed_enabled:
            return
        stage = self.accelerator.state.deepspeed_plugin.zero_stage
        if stage == 3:
            raise ValueError("DeepSpeed ZeRO-3 shards the hypernetworks, which is not supported; use ZeRO-2 or DDP")
        if self.accelerator.mixed_precision != "no":
            raise ValueError(
                f"DeepSpeed with mixed precision {self.accelerator.mixed_precision} casts the hypernetworks, which "
                "must stay float32; launch with --mixed_precision no and load the base with --dtype bfloat16"
            )

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self.fusion_model.updates.invalidate()  # fused and DeepSpeed optimizers change parameters unnoticed
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _loss_divisor(self, num_items_in_batch: Tensor | int | None) -> int:
        """What a micro-batch's loss is divided by: 1 if it is normalized over the window's label tokens already."""
        normalized = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return 1 if normalized or self.compute_loss_func is not None else self.current_gradient_accumulation_steps

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """LM loss with live updates, plus `rdm_weight` * RDM on the last micro-batch of an accumulation window."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        closes_window = self.accelerator.sync_gradients
        if closes_window and self.args.rdm_weight > 0:
            inputs = {**inputs, "rdm_step": self.state.global_step}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        divisor = self._loss_divisor(num_items_in_batch)
        self._add("lm_loss", loss / divisor)
        if closes_window:
            self._windows += 1
            if self.args.rdm_weight > 0:
                rdm = self.fusion_model.rdm_loss
                assert rdm is not None  # rdm_step was given
                self._add("rdm_loss", rdm)
                loss = loss + self.args.rdm_weight * rdm * divisor
        return (loss, outputs) if return_outputs else loss

    # ---- logging ------------------------------------------------------------------------------------------------

    def _add(self, name: str, value: Tensor) -> None:
        value = value.detach()
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the method's own figures to a training log line."""
        if "loss" in logs and self._windows:
            for name, value in self._sums.items():
                logs[name] = self.accelerator.reduce(value, "mean").item() / self._windows
            logs["hypernetwork_seconds"] = self.fusion_model.updates.seconds / self._windows
            self._sums, self._windows, self.fusion_model.updates.seconds = {}, 0, 0.0
            logs.update(self.method_logs())
        super().log(logs, start_time)

    def method_logs(self) -> dict[str, float]:
        """The state of the fusion as flat log entries: `alpha/q_proj`, ..., `attention/<source>` over all roles."""
        groups = {key.name: key for key in self.fusion_model.plan.groups}
        roles = [key.role for key in groups.values()]
        shares = defaultdict(list)
        logs: dict[str, float] = {}
        for name, values in fusion_diagnostics(self.fusion_model).items():
            label = groups[name].role if roles.count(groups[name].role) == 1 else name
            for entry, value in values.items():
                if entry.startswith("attention/"):
                    shares[int(entry.removeprefix("attention/"))].append(value)
                else:
                    logs[f"{entry}/{label}"] = value
        for index, parts in sorted(shares.items()):
            source = display_name(self.fusion_model.plan.sources[index].name)
            logs[f"attention/{index + 1}-{source}"] = sum(parts) / len(parts)
        return logs

    # ---- saving -------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Export the fused adapter (a user's call), or save the hypernetworks (a checkpoint of the Trainer)."""
        if _internal_call:
            if self.args.should_save and output_dir is not None:
                save_hypernetworks(self.fusion_model, output_dir)
            return
        self.export(output_dir or str(self.args.output_dir))

    def export(self, output_dir: str | Path, metrics: Mapping[str, Any] | None = None) -> Path:
        """Write the fused adapter with provenance and card, on rank 0; see `export_adapter`."""
        if not self.args.should_save:
            return Path(output_dir)
        return export_adapter(
            self.fusion_model,
            output_dir,
            tokenizer=self.processing_class,
            training=self.training_record(),
            metrics=dict(metrics or {}),
        )

    def training_record(self) -> dict[str, Any]:
        """How the hypernetworks were trained, as plain values."""
        names = (
            "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "seed", "data_seed",
            "per_device_train_batch_size", "gradient_accumulation_steps", "bf16", "optim",
        )  # fmt: skip
        settings = self.args.to_dict()  # enums as plain values
        record = {name: settings[name] for name in names}
        record |= {"steps": self.state.global_step, "processes": self.args.world_size, "replay": self.replay_record}
        return record

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_hypernetworks(self.fusion_model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        best = str(self.state.best_model_checkpoint)
        logger.info("loading the best hypernetworks from %s (%s)", best, self.state.best_metric)
        load_hypernetworks(self.fusion_model, best)

    # ---- the Hub ------------------------------------------------------------------------------------------------

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Nothing is created before there is something to push: see `push_to_hub`."""

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Checkpoints hold hypernetworks and optimizer states; they are not pushed."""

    def push_to_hub(  # type: ignore[override]  # one adapter, after training: nothing to wait for
        self,
        commit_message: str | None = None,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
    ) -> str | None:
        """Push the exported adapter in `output_dir`; see `push_adapter`. Returns the commit's address on rank 0."""
        if not self.is_world_process_zero():
            return None
        folder = Path(str(self.args.output_dir))
        return push_adapter(
            folder,
            self.args.hub_model_id or folder.resolve().name,
            token=token or self.args.hub_token,
            private=self.args.hub_private_repo if private is None else private,
            revision=revision or self.args.hub_revision,
            commit_message=commit_message or "Upload fused adapter",
        )
