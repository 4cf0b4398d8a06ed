"""FuseLLM as a rival: the target's LoRA is trained on answers and on what source experts think of them.

    L = lambda * CLM + (1 - lambda) * KL(P || Q)

CLM is the cross-entropy of the answers, P the fused labels (`fusellm.py`) and Q the distributions of the model that is
trained, both at the answers' tokens; where no teacher's token is aligned, P is the answer's token itself. The gradient
of KL(P || Q) is that of the cross-entropy of Q under P.

Origin: FuseLLM, arXiv 2401.10491, section 3.1 (its continual training, here of a LoRA on the replay).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heterofusion.adapters.lora import LoraAdapter
from heterofusion.data.formats import IGNORE_INDEX
from heterofusion.data.labels import SOFT_COLUMNS
from heterofusion.data.replay import DataArguments
from heterofusion.experts.soft_labels import Teacher
from heterofusion.publish.record import adapter_record, control_of, make_record, training_cost
from heterofusion.rivals.fusellm import FusionReport
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.flags import check_ranges, flag
from heterofusion.training.base import AdapterTrainer
from heterofusion.training.config import ExpertConfig, ExpertModelArguments, OutputArguments
from heterofusion.training.expert import export_lora
from heterofusion.training.mixture import SoftCollator, soft_losses


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
        help="Folder that keeps the teachers' soft labels for further runs; heterofusion/soft_labels in HF_HOME "
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


class DistillationTrainer(AdapterTrainer):
    """The trainer of experts with the loss of FuseLLM: a mean over the answers' tokens of a window on all ranks.

    Both parts are logged: `clm_loss` and `kl_loss`, of which `loss` is the weighted sum. An evaluation has no
    teachers, its loss is that of the answers.
    """

    args: DistillConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # the loss divides by num_items_in_batch, whatever the model does
        cast("list[str]", self._signature_columns).extend(SOFT_COLUMNS)
        self.data_collator = SoftCollator(self.data_collator)

    def _loss(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any) -> tuple[Tensor, Any]:
        """The weighted sum of both losses; KL(P || Q) is the cross-entropy where P is a single token."""
        inputs = dict(inputs)
        labels, *soft = (inputs.pop(name) for name in ("labels", *SOFT_COLUMNS))
        outputs = model(**inputs)
        wanted = labels[:, 1:] != IGNORE_INDEX  # (batch, length - 1)
        nll = F.cross_entropy(outputs.logits[:, :-1][wanted].float(), labels[:, 1:][wanted], reduction="sum")
        difference, _ = soft_losses(outputs.logits, labels, *soft)  # 0 in an evaluation
        if cast("nn.Module", self.model).training:
            self._means.add("clm_loss", torch.stack([nll, wanted.sum()]))
            self._means.add("kl_loss", torch.stack([nll + difference, wanted.sum()]))
        loss = (nll + (1 - self.args.distill_lambda) * difference) * self._per_token(labels, num_items_in_batch)
        return loss, outputs


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
