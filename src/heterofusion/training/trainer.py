"""`HeteroFusionTrainer`: transformers' Trainer for hypernetworks around a target model.

The LM loss comes back normalized over the label tokens of the whole accumulation window and all ranks; RDM is added
once per window, on its last micro-batch. Checkpoints hold the hypernetworks; `save_model` exports the fused adapter.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers import PreTrainedTokenizerBase, default_data_collator
from transformers.trainer_callback import ProgressCallback

from heterofusion.data.replay import make_collator
from heterofusion.method.base_model import cast_base, refuse_reentrant_checkpointing
from heterofusion.method.diagnostics import diagnostic_logs
from heterofusion.method.expansion import FitBasis
from heterofusion.method.model import HeteroFusionModel
from heterofusion.publish.hub import push_output
from heterofusion.publish.write import export_adapter
from heterofusion.runtime.sharding import broadcast_parameters
from heterofusion.training.base import AdapterTrainer
from heterofusion.training.checkpoints import (
    check_checkpoint,
    fusion_identity,
    load_hypernetworks,
    restore_basis,
    save_hypernetworks,
)
from heterofusion.training.config import HeteroFusionConfig
from heterofusion.training.engines import ONCE_PER_WINDOW, check_engine, engine_record, set_up_engine
from heterofusion.training.metrics import FusionProgressCallback
from heterofusion.training.nonfinite import FiniteGuard, gradient_norms

logger = logging.getLogger(__name__)


class HeteroFusionTrainer(AdapterTrainer):
    """Trains the hypernetworks of a `HeteroFusionModel` by the LM loss on replay plus RDM; used as `Trainer` is.

    Logged besides Trainer's own: `lm_loss` (soft labels included), `rdm_loss`,
    of a `Mixture` the losses of its parts (see `AdapterTrainer`), per role `alpha/`, `gate_sparsity/`, `delta_ratio/`
    (||alpha dB|| / ||B||), the share of attention per source `attention/`, and `hypernetwork_seconds` (forward, per
    optimizer step).

    Args:
        model: the model to train.
        args: a `HeteroFusionConfig`.
        train_dataset: examples with `input_ids` and `labels` (see `build_replay`), or a `Mixture` with source labels.
        processing_class: the target's tokenizer; saved with the adapter and used for padding.
        run_record: plain values about the run and its data, for the provenance.
        checkpoint_record: plain values that stand in every checkpoint, for whoever resumes from it.
        **kwargs: passed on to `Trainer`; the data collator is `make_collator` of the tokenizer by default.

    Raises:
        TypeError: model or args are of another type.
        UserError: model and args differ in the method's settings; or an engine that cannot carry a fusion.
    """

    args: HeteroFusionConfig

    def __init__(
        self,
        model: HeteroFusionModel,
        args: HeteroFusionConfig,
        train_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        data_collator: Any = None,
        run_record: Mapping[str, Any] | None = None,
        checkpoint_record: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(model, HeteroFusionModel):
            raise TypeError(f"model is a {type(model).__name__}; build it with HeteroFusionModel.from_adapters()")
        if not isinstance(args, HeteroFusionConfig):
            raise TypeError(f"args is a {type(args).__name__}; a HeteroFusionConfig was expected")
        model.method.check_same(args)
        if data_collator is None:
            data_collator = make_collator(processing_class) if processing_class else default_data_collator
        self._once_per_window = False
        self._guard = FiniteGuard([key.name for key in model.plan.groups])
        self.run_record, self.checkpoint_record = dict(run_record or {}), dict(checkpoint_record or {})
        self.fusion_model = model
        kwargs |= {"processing_class": processing_class, "data_collator": data_collator}
        super().__init__(model, args, train_dataset, **kwargs)
        check_engine(self.accelerator)
        if args.base_in_bf16:
            cast_base(model, torch.bfloat16)
        if args.extra_rank > 0 and train_dataset is not None:
            self.add_callback(FitBasis(model.fit_basis, train_dataset))
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(FusionProgressCallback)

    def _check_resumed(self, checkpoint: str) -> None:
        model = self.fusion_model
        identity = fusion_identity(model.plan, model.hypernetworks.config, model.method)
        check_checkpoint(checkpoint, identity | engine_record(self.accelerator))
        restore_basis(model, checkpoint)

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

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        accelerator, updates = self.accelerator, self.fusion_model.updates
        engine, precision = accelerator.distributed_type, accelerator.mixed_precision
        # a gradient scaler would scale the last micro-batch only
        self._once_per_window = engine in ONCE_PER_WINDOW and precision != "fp16" and accelerator.scaler is None
        if not self._once_per_window and self.args.gradient_accumulation_steps > 1:
            logger.info("%s, precision %s: hypernetworks run in every micro-batch", engine.value, precision)
        set_up_engine(self.fusion_model, accelerator, self._once_per_window, self.args.ddp_reduce)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        self._align_ranks()
        refuse_reentrant_checkpointing(self.fusion_model.base_model)
        updates.seconds = 0.0
        self._guard.forget()
        updates.discard_gradients()
        updates.invalidate()
        return prepared

    def _align_ranks(self) -> None:
        """Give all ranks the hypernetworks of rank 0 where no engine keeps them alike."""
        if self.fusion_model.updates.average_over_ranks:
            broadcast_parameters(self.fusion_model.hypernetworks)
            self.fusion_model.updates.invalidate()

    def _loss_divisor(self, num_items_in_batch: Tensor | int | None) -> int:
        """What a micro-batch's loss is divided by: 1 if it is normalized over the window's label tokens already."""
        normalized = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return 1 if normalized or self.compute_loss_func is not None else self.current_gradient_accumulation_steps

    def _loss(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any) -> tuple[Tensor, Any]:
        """LM loss with live updates, plus `rdm_weight` * RDM on the last micro-batch of an accumulation window."""
        if not self.fusion_model.training:  # DeepSpeed's engine does not tell
            return super()._loss(model, inputs, num_items_in_batch)
        with_rdm = self.accelerator.sync_gradients and self.args.rdm_weight > 0
        if with_rdm:
            inputs = {**inputs, "rdm_step": self.state.global_step}
        loss, outputs = super()._loss(model, inputs, num_items_in_batch)
        divisor = self._loss_divisor(num_items_in_batch)
        self._means.add("lm_loss", loss / divisor)
        if with_rdm:
            rdm = cast("Tensor", self.fusion_model.rdm_loss)
            self._means.add("rdm_loss", rdm)
            loss = loss + self.args.rdm_weight * rdm * divisor
        return loss, outputs

    def own_figures(self) -> dict[str, float]:
        """The losses since the last line, and the state of the fusion by role and source. All ranks together."""
        windows, updates = self._means.windows, self.fusion_model.updates
        logs = self._means.take(self.accelerator) | {"hypernetwork_seconds": updates.seconds / windows}
        updates.seconds = 0.0
        return logs | diagnostic_logs(self.fusion_model)

    # ---- what is not finite -------------------------------------------------------------------------------------

    def _own_grad_norm(self) -> Tensor | None:
        """Norm of all gradients from those of every role, in one pass; None if that is the engine's business."""
        updates, scaled = self.fusion_model.updates, self.accelerator.scaler is not None
        norms = {} if scaled else gradient_norms(self.fusion_model.hypernetworks)
        updates.finite.update({name: norm.isfinite() for name, norm in norms.items()})
        return get_total_norm(norms.values()) if norms else None

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if (norm := self._own_grad_norm()) is None:
            return super()._clip_grad_norm(model)
        clip_grads_with_norm_(self.fusion_model.hypernetworks.parameters(), self.args.max_grad_norm, norm)
        return norm

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Gradient norm of an optimizer step, before the step is taken; notes what is not finite."""
        norm = self._own_grad_norm() if grad_norm is None else grad_norm
        norm = super()._get_grad_norm(model, norm)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        scaled = self.accelerator.scaler is not None  # an overflow is the scaler's business: it skips and scales down
        self._guard.note(
            self.state.global_step + 1,
            self._means.window["lm_loss"] + self._means.window.get("rdm_loss", 0),
            None if scaled else norm,
            {} if scaled else self.fusion_model.updates.finite,
            self.fusion_model.updates.finite_updates,
        )
        self._means.commit()
        return norm

    def _raise_if_not_finite(self) -> None:
        if (reason := self._guard.first_bad(self.accelerator)) is not None:
            raise self.nonfinite_error(reason)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self._raise_if_not_finite()
        self._align_ranks()
        return super()._finalize_training(*args, **kwargs)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self.fusion_model.updates.invalidate()  # fused and DeepSpeed optimizers change parameters unnoticed
        if self.control.should_log or self.control.should_evaluate or self.control.should_save:
            self._raise_if_not_finite()
        if self.control.should_evaluate or self.control.should_save:
            self._align_ranks()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    # ---- saving -------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Export the fused adapter (a user's call), or save a checkpoint's hypernetworks (Trainer's). All ranks."""
        if not _internal_call:
            self.export(output_dir or str(self.args.output_dir))
        elif output_dir is not None:
            record = engine_record(self.accelerator) | {"save_only_model": self.args.save_only_model}
            save_hypernetworks(self.fusion_model, output_dir, record | self.checkpoint_record, self.args.should_save)

    def export(self, output_dir: str | Path, metrics: Mapping[str, Any] | None = None) -> Path:
        """Write the fused adapter, provenance and card: all ranks together, rank 0 writes. See `export_adapter`."""
        self._raise_if_not_finite()
        run = {"steps": self.state.global_step, "processes": self.args.world_size, "replay": {}}
        return export_adapter(
            self.fusion_model,
            output_dir,
            tokenizer=self.processing_class,
            training=self.args.training_dict() | run | self.run_record,
            metrics=dict(metrics or {}),
            write=self.args.should_save,
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_hypernetworks(self.fusion_model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        best = str(self.state.best_model_checkpoint)
        logger.info("loading the best hypernetworks from %s (%s)", best, self.state.best_metric)
        load_hypernetworks(self.fusion_model, best)

    def push_to_hub(  # type: ignore[override]  # one adapter, after training: nothing to wait for
        self, commit_message: str | None = None, **given: Any
    ) -> str | None:
        """Push the exported adapter in `output_dir`; see `push_output`. Returns the commit's address on rank 0."""
        return push_output(self.args, commit_message=commit_message, **given) if self.is_world_process_zero() else None
