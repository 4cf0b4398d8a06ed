"""FuseLLM as a rival: the target's LoRA is trained on answers and on what source experts think of them.

    L = lambda * CLM + (1 - lambda) * KL(P || Q)

CLM is the cross-entropy of the answers, P the fused labels (`fusellm.py`) and Q the distributions of the model that is
trained, both at the answers' tokens. The gradient of KL(P || Q) is that of the cross-entropy of Q under P.

Origin: FuseLLM, arXiv 2401.10491, section 3.1 (its continual training, here of a LoRA on the replay).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from heterofusion.adapters.lora import LoraAdapter
from heterofusion.data.formats import IGNORE_INDEX
from heterofusion.data.replay import DataArguments, make_collator
from heterofusion.experts.teachers import Teacher
from heterofusion.publish.record import adapter_record, control_of, make_record, training_cost
from heterofusion.rivals.fusellm import TEACHER_IDS, TEACHER_PROBS, FusionReport
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.flags import check_ranges, flag
from heterofusion.training.base import AdapterTrainer
from heterofusion.training.config import ExpertConfig, ExpertModelArguments, OutputArguments
from heterofusion.training.expert import export_lora
from heterofusion.training.mixture import kl_divergences, pad_rows


@dataclass
class DistillArguments:
    """The target's adapter, the teachers, and their labels."""

    init_adapter: str = flag(help="The target's adapter, which is trained on: local folder or Hub id.")
    teacher_models: list[str] = flag(
        help="Base models of the teachers, of any family: one for each adapter, or one for all."
    )
    teacher_adapters: list[str] = flag(
        help="Adapters of the teachers: local folders or Hub ids; the word none is a base alone."
    )
    init_revision: str | None = flag(None, help="Hub revision of --init_adapter.")
    lora_dropout: float | None = flag(
        None, help="Dropout of the inputs of lora_A; that of --init_adapter by default.", range="[0, 1)"
    )
    top_k_logits: int = flag(10, help="Tokens of a teacher that are kept at each position.", range="[1, inf)")
    teacher_batch_size: int = flag(8, help="Examples per batch when a teacher runs.", range="[1, inf)")
    logits_cache: str | None = flag(
        None,
        help="Folder that keeps soft and fused labels and maps of vocabularies; heterofusion/soft_labels in HF_HOME "
        "(~/.cache/huggingface) by default.",
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        if not all(self.teacher_models) or len(self.teacher_models) not in (1, len(self.teacher_adapters)):
            raise UserError(
                f"--teacher_models has {len(self.teacher_models)} values, but --teacher_adapters has "
                f"{len(self.teacher_adapters)}: give one base per adapter, or one for all"
            )

    def bases(self) -> list[str]:
        """The teachers' bases, one each."""
        return self.teacher_models * (len(self.teacher_adapters) if len(self.teacher_models) == 1 else 1)


@dataclass
class DistillConfig(ExpertConfig):
    """The training flags of an expert, and the weight of the two losses."""

    distill_lambda: float = flag(
        0.9, help="Weight of the answers' own loss; the teachers' has the rest, up to 1.", range="[0, 1]"
    )
    ddp_timeout: int = flag(
        7 * 24 * 3600, help="Seconds that processes wait for each other, as they do while the first runs the teachers."
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.label_smoothing_factor or self.use_liger_kernel:
            raise UserError("--label_smoothing_factor and --use_liger_kernel are of other losses: leave them out")
        super().__post_init__()


DISTILL_ARGUMENTS = (ExpertModelArguments, DistillArguments, DataArguments, OutputArguments, DistillConfig)


def distillation_losses(
    logits: Tensor, labels: Tensor, teacher_ids: Tensor | None = None, teacher_probs: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sums of the two losses over the answers' tokens, in float32.

    Args:
        logits: (batch, length, vocabulary).
        labels: (batch, length); the logits at a place are of the label after it.
        teacher_ids: (batch, answer, k): for the labels of each example, in order, k token ids; padded at the end.
        teacher_probs: (batch, answer, k): their probabilities, which add up to 1; a token of probability 0 counts
            for nothing. None if there are no teachers.

    Returns:
        Sum of the negative log-likelihoods, and sum of KL(P || Q); zero without teachers.
    """
    wanted = labels[:, 1:] != IGNORE_INDEX  # (batch, length - 1)
    log_probs = torch.log_softmax(logits[:, :-1][wanted].float(), dim=-1)  # (tokens, vocabulary)
    nll = -log_probs.gather(1, labels[:, 1:][wanted].unsqueeze(1)).sum()
    if teacher_ids is None or teacher_probs is None:
        return nll, torch.zeros_like(nll)
    counts = wanted.sum(dim=1, keepdim=True)  # (batch, 1)
    real = torch.arange(teacher_ids.shape[1], device=labels.device) < counts  # (batch, answer)
    probs = teacher_probs[real].float()  # (tokens, k), in the order of log_probs
    return nll, kl_divergences(log_probs, teacher_ids[real].long(), probs).sum()


class DistillCollator:
    """Pads examples on the right, and their teachers' labels with probability 0."""

    def __init__(self, tokenizer: Any) -> None:
        self._collate = make_collator(tokenizer)

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        own = {TEACHER_IDS: torch.long, TEACHER_PROBS: torch.float32}
        batch = dict(self._collate([{k: v for k, v in example.items() if k not in own} for example in examples]))
        for name, dtype in own.items() if TEACHER_IDS in examples[0] else ():  # an evaluation has none
            rows = [example[name] for example in examples]
            shape = (len(rows), max(map(len, rows)), max(len(row[0]) for row in rows))  # (batch, answer, k)
            batch[name] = pad_rows(rows, shape, dtype)
        return batch


class DistillationTrainer(AdapterTrainer):
    """The trainer of experts with the loss of FuseLLM: a mean over the answers' tokens of a window on all ranks.

    Both parts are logged: `clm_loss` and `kl_loss`, of which `loss` is the weighted sum. An evaluation has no
    teachers, its loss is that of the answers.
    """

    args: DistillConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # compute_loss divides by num_items_in_batch, whatever the model does
        cast("list[str]", self._signature_columns).extend([TEACHER_IDS, TEACHER_PROBS])

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The weighted sum of both losses."""
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        teacher = (inputs.pop(TEACHER_IDS, None), inputs.pop(TEACHER_PROBS, None))
        outputs = model(**inputs)
        nll, kl = distillation_losses(outputs.logits, labels, *teacher)
        if cast("nn.Module", self.model).training:
            tokens = (labels[:, 1:] != IGNORE_INDEX).sum()
            self._means.add("clm_loss", torch.stack([nll, tokens]))
            self._means.add("kl_loss", torch.stack([kl, tokens]))
        weight = self.args.distill_lambda if teacher[0] is not None else 1.0
        loss = (weight * nll + (1 - weight) * kl) * self._per_token(labels, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


def export_student(
    trainer: DistillationTrainer,
    folder: Path,
    anchor: LoraAdapter,
    models: Sequence[Teacher],  # the target first
    labels: FusionReport,
    top_k_logits: int,
    data: Mapping[str, Any],
    metrics: Mapping[str, Any],
    resumed_from_step: int | None,
) -> None:
    """Write the adapter that was trained with `distillation.json`, all ranks together.

    Labels and maps that came from disk cost as long as it once took to make them.
    """
    args, cost = trainer.args, training_cost(metrics, resumed_from_step)
    if cost["seconds"] is not None:
        cost["seconds"] = round(cost["seconds"] + labels.seconds, 3)
    rows = zip(models, labels.picked, labels.mean_cross_entropy, strict=True)
    target, *teachers = [{**m.record(), "picked": picked, "mean_cross_entropy": e} for m, picked, e in rows]
    training = {**args.training_dict(), "steps": trainer.state.global_step, "processes": args.world_size}
    record = make_record(
        "distillation",
        "fusellm",
        models[0].expert.base.model_name_or_path,
        cost,
        seed=args.seed,
        ran_source_models=True,
        control=control_of(anchor),
        target=target | adapter_record(anchor),
        teachers=teachers,
        method={"distill_lambda": args.distill_lambda, "top_k_logits": top_k_logits},
        one_to_one_positions=labels.one_to_one,
        soft_positions=labels.soft,
        training={**training, "data": data},
        metrics=dict(metrics),
    )
    about = (
        f"The LoRA adapter `{record['target']['name']}` of `{record['base_model']}`, trained on with answers and with "
        f"what {len(teachers)} source expert(s) think of them, as in [FuseLLM](https://arxiv.org/abs/2401.10491): "
        f"lambda {args.distill_lambda}, top {top_k_logits} tokens. `picked` counts the examples for which a model's "
        f"labels were taken, the one of lowest cross-entropy; {labels.soft:.1%} of the answers' tokens have a model's "
        "distribution as their label, the others the answer's token itself."
    )
    export_lora(trainer, folder, record, about)
