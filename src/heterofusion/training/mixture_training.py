"""Training on a `Mixture` of replay and source labels: what the trainer of a fusion and that of an adapter share.

The same flags give both the same examples in the same order, so that they can be compared.
"""

from typing import Any, cast

from torch import Tensor, nn

from heterofusion.data.formats import IGNORE_INDEX
from heterofusion.data.labels import SOFT_COLUMNS, check_settings
from heterofusion.runtime.errors import UserError
from heterofusion.training.label_loss import SoftCollator, soft_losses
from heterofusion.training.metrics import WindowMeans
from heterofusion.training.mixture import PART, Mixture, MixtureSampler, part_losses
from heterofusion.training.whole_checkpoints import WholeCheckpointTrainer


class MixtureTrainer(WholeCheckpointTrainer):
    """transformers' `Trainer` that also trains on a `Mixture`: in its order, resumed too, and logs each part's loss.

    Logged besides Trainer's own: of a `Mixture` `loss_replay` and `loss_labels`, means over the label tokens of each
    part since the last line, and with its `soft_weight` `loss_soft`, that of KL(source || model) over the soft labels.
    Other data sets are read as by `Trainer`.

    Args:
        model: the model to train.
        args: of the training.
        train_dataset: examples with `input_ids` and `labels` (see `build_replay`), or a `Mixture` with source labels.
        **kwargs: passed on to `Trainer`.

    Raises:
        ValueError: settings that do not go with a `Mixture`.
    """

    def __init__(self, model: nn.Module, args: Any, train_dataset: Any = None, **kwargs: Any) -> None:
        self._soft_weight = train_dataset.soft_weight if isinstance(train_dataset, Mixture) else None
        if isinstance(train_dataset, Mixture):
            check_settings(args, soft=self._soft_weight is not None)
        if self._soft_weight is not None and kwargs.get("compute_loss_func") is not None:
            raise UserError(
                "compute_loss_func is given, but soft labels are added to the loss of the model itself: leave one "
                "of the two out"
            )
        self._means = WindowMeans()
        self._mixed: MixtureSampler | None = None
        super().__init__(model=model, args=args, train_dataset=train_dataset, **kwargs)
        self._set_signature_columns_if_needed()  # other columns do not come into a batch
        cast("list[str]", self._signature_columns).append(PART)
        if self._soft_weight is not None:
            cast("list[str]", self._signature_columns).extend(SOFT_COLUMNS)
            self.data_collator = SoftCollator(self.data_collator)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        self._mixed = dataset.sampler(self.args, self._train_batch_size) if isinstance(dataset, Mixture) else None
        return self._mixed or super()._get_train_sampler(train_dataset)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        self._means = WindowMeans()
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def _run_epoch(self, model: nn.Module, epoch: int, *args: Any, **kwargs: Any) -> None:
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
        """Trainer's loss; in training, soft labels are added to it, and the losses of a mixture's parts are noted."""
        labels, parts = inputs.get("labels"), inputs.get(PART)
        soft = [inputs[name] for name in SOFT_COLUMNS if name in inputs]
        ours = (PART, *SOFT_COLUMNS)  # no inputs of the model
        inputs = {name: value for name, value in inputs.items() if name not in ours}
        # the wrapper of DeepSpeed does not tell whether it trains
        if labels is None or parts is None or not cast("nn.Module", self.model).training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        for name, counted in part_losses(outputs["logits"], labels, parts).items():
            self._means.add(name, counted)
        if self._soft_weight is not None:
            difference, counted = soft_losses(outputs["logits"], labels, *soft)
            self._means.add("loss_soft", counted)
            loss = loss + self._soft_weight * difference * self._per_token(labels, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _per_token(self, labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor | float:
        """What a sum over label tokens is multiplied with to count as the tokens of `Trainer.compute_loss` do."""
        if not self.model_accepts_loss_kwargs or num_items_in_batch is None:
            return 1 / (labels[:, 1:] != IGNORE_INDEX).sum()  # a mean over the micro-batch
        # the gradients of all ranks are averaged, not added
        ranks = self.accelerator.num_processes // self.get_tp_size() if self.args.average_tokens_across_devices else 1
        return ranks / num_items_in_batch

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self.control.should_save:  # a checkpoint's log tells of all its steps: resumed runs count on it
            self.control.should_log = True
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add figures of our own to a training log line."""
        if "loss" in logs:
            self.complete_log(logs)
        super().log(logs, start_time)

    def complete_log(self, logs: dict[str, float]) -> None:
        """Add what was noted since the last line to a line that has a `loss`, in place. All ranks together."""
        self._means.commit()
        logs.update(self._means.take(self.accelerator))
