"""`AdapterTrainer`: what fusions, experts and students of distillation share on top of transformers' `Trainer`."""

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn
from transformers import Trainer

from heterofusion.data.formats import IGNORE_INDEX
from heterofusion.data.labels import SOFT_COLUMNS, check_settings
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.files import told_writes
from heterofusion.training.checkpoints import last_complete_checkpoint, last_good, stopped_early, whole_checkpoint
from heterofusion.training.config import TrainingConfig
from heterofusion.training.engines import refuse_data_parallel
from heterofusion.training.metrics import WindowMeans, run_metrics
from heterofusion.training.mixture import PART, Mixture, MixtureSampler, SoftCollator, part_losses, soft_losses
from heterofusion.training.nonfinite import NonFiniteError

logger = logging.getLogger(__name__)


class AdapterTrainer(Trainer):
    """transformers' `Trainer` with whole checkpoints, which also trains on a `Mixture` of replay and source labels.

    Of a mixture it logs `loss_replay` and `loss_labels`, means over the label tokens of each part since the last line,
    and with its `soft_weight` `loss_soft`, that of KL(source || model) over the soft labels. A logged loss that is not
    finite ends the run. Nothing is pushed on the way. `add_to_checkpoint` gets the folder of a new checkpoint, on the
    main process, to add files to it.
    """

    args: TrainingConfig
    add_to_checkpoint: Callable[[Path], None] | None = None

    def __init__(self, model: nn.Module, args: Any, train_dataset: Any = None, **kwargs: Any) -> None:
        refuse_data_parallel(args)
        self._soft_weight = None
        if isinstance(train_dataset, Mixture):
            self._soft_weight = train_dataset.soft_weight
            check_settings(args, soft=self._soft_weight is not None)
        if self._soft_weight is not None and kwargs.get("compute_loss_func") is not None:
            raise UserError("compute_loss_func is given, but soft labels are added to the loss of the model itself")
        self._means = WindowMeans()
        self._mixed: MixtureSampler | None = None
        self._stopped_early = False
        super().__init__(model=model, args=args, train_dataset=train_dataset, **kwargs)
        self._set_signature_columns_if_needed()  # other columns do not come into a batch
        cast("list[str]", self._signature_columns).append(PART)
        if self._soft_weight is not None:
            cast("list[str]", self._signature_columns).extend(SOFT_COLUMNS)
            self.data_collator = SoftCollator(self.data_collator)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trainer's `train`; `resume_from_checkpoint=True` takes the last complete checkpoint in `output_dir`.

        A loss or gradient that is not finite is a `NonFiniteError`.
        """
        if resume_from_checkpoint is True:
            found = last_complete_checkpoint(str(self.args.output_dir))
            if found is None:
                raise UserError(f"{self.args.output_dir} holds no complete checkpoint-N folder to resume from")
            resume_from_checkpoint = str(found)
        if resume_from_checkpoint:
            self._check_resumed(resume_from_checkpoint)
        self._stopped_early = bool(resume_from_checkpoint) and stopped_early(Path(str(resume_from_checkpoint)))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def run(self, checkpoint: Path | None) -> dict[str, Any]:
        """Train, from a checkpoint if there is one, and evaluate where there is data for it; the run's metrics."""
        result = self.train(None if checkpoint is None else str(checkpoint))
        metrics = run_metrics(result.metrics, self.state.log_history)
        if self.eval_dataset is not None:
            metrics |= self.evaluate()
        self.log_metrics("all", metrics)
        with told_writes(f"the trainer's state could not be written to {self.args.output_dir}"):
            self.save_state()
        return metrics

    def _check_resumed(self, checkpoint: str) -> None:
        """Look at a checkpoint before anything of it is read."""

    # ---- order and loss of a mixture ----------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        self._mixed = dataset.sampler(self.args, self._train_batch_size) if isinstance(dataset, Mixture) else None
        return self._mixed or super()._get_train_sampler(train_dataset)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        self._means = WindowMeans()
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def _run_epoch(self, model: nn.Module, epoch: int, *args: Any, **kwargs: Any) -> None:
        if self._stopped_early or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True  # Trainer would make one step more
            return
        if self._mixed is not None:  # of a resumed run on several ranks, neither Trainer nor accelerate reaches it
            self._mixed.set_epoch(epoch)
        super()._run_epoch(model, epoch, *args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a micro-batch; what it is, `_loss` says."""
        loss, outputs = self._loss(model, inputs, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _loss(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any) -> tuple[Tensor, Any]:
        """Trainer's, with soft labels in training, which notes the losses of a mixture's parts; and the outputs."""
        labels, parts = inputs.get("labels"), inputs.get(PART)
        soft = [inputs[name] for name in SOFT_COLUMNS if name in inputs]
        ours = (PART, *SOFT_COLUMNS)  # no inputs of the model
        inputs = {name: value for name, value in inputs.items() if name not in ours}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        # the wrapper of DeepSpeed does not tell whether it trains
        if labels is None or parts is None or not cast("nn.Module", self.model).training:
            return loss, outputs
        for name, counted in part_losses(outputs["logits"], labels, parts).items():
            self._means.add(name, counted)
        if self._soft_weight is not None:
            difference, counted = soft_losses(outputs["logits"], labels, *soft)
            self._means.add("loss_soft", counted)
            loss = loss + self._soft_weight * difference * self._per_token(labels, num_items_in_batch)
        return loss, outputs

    def _per_token(self, labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor | float:
        """What a sum over label tokens is multiplied with to count as the tokens of `Trainer.compute_loss` do."""
        if not self.model_accepts_loss_kwargs or num_items_in_batch is None:
            return 1 / (labels[:, 1:] != IGNORE_INDEX).sum()  # a mean over the micro-batch
        # the gradients of all ranks are averaged, not added
        ranks = self.accelerator.num_processes // self.get_tp_size() if self.args.average_tokens_across_devices else 1
        return ranks / num_items_in_batch

    # ---- log and checkpoints ------------------------------------------------------------------------------------

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self.control.should_save:  # a checkpoint's log tells of all its steps: resumed runs count on it
            self.control.should_log = True
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add figures of our own to a training log line."""
        if "loss" in logs:
            logs.update(self.own_figures())
            if not math.isfinite(logs["loss"]):
                raise self.nonfinite_error(f"step {self.state.global_step}: the loss is not finite")
        super().log(logs, start_time)

    def own_figures(self) -> dict[str, float]:
        """Figures for a log line beside Trainer's, of what there was since the last one. All ranks together."""
        self._means.commit()
        return self._means.take(self.accelerator)

    def nonfinite_error(self, reason: str) -> NonFiniteError:
        """The error of a run that something not finite ends, with what is left and what to do."""
        left = last_good(self._get_output_dir(trial=None))
        return NonFiniteError(
            f"{reason}; {left}. Lower --learning_rate, clip with --max_grad_norm, or look at the data"
        )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir = Path(self._get_output_dir(trial=trial))
        with whole_checkpoint(run_dir, self.state, self.args, self.accelerator.wait_for_everyone) as folder:
            super()._save_checkpoint(model, trial)
            if self.args.should_save and self.add_to_checkpoint is not None:
                self.add_to_checkpoint(folder)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Nothing is created before there is something to push."""

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Checkpoints hold optimizer states and local paths; they are not pushed."""
