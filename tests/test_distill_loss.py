"""The loss of FuseLLM against a dense reference, its normalization, and a training that comes nearer to a teacher."""

import pytest
import torch

from conftest import GOLDEN, TokenRows, fresh_base
from heterofusion.rivals.distillation import DistillationTrainer, DistillConfig
from heterofusion.training.config import LoraArguments
from heterofusion.training.expert import choose_lora
from test_soft_labels_training import SoftRows, count_labels, dense


def initial():
    base = fresh_base()
    return choose_lora(base, LoraArguments(init_adapter=str(GOLDEN / "target_llama"))).put_on(base, 42)


def trained(folder, rows, **changes):
    """The golden target's adapter after a plain SGD run; gives the trainer."""
    args = DistillConfig(
        output_dir=str(folder), use_cpu=True, save_strategy="no", disable_tqdm=True, logging_steps=1,
        **{"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "warmup_steps": 0, "max_steps": 1,
           "max_grad_norm": 0.0, "distill_lambda": 0.7, **changes},
    )  # fmt: skip
    trainer = DistillationTrainer(initial(), args, train_dataset=rows)
    trainer.train()
    return trainer


def references(model, rows, weight: float) -> list[torch.Tensor]:
    """Loss, cross-entropy and KL(P || Q), where P is a single token wherever there is no soft label."""
    outputs = [model(input_ids=row["input_ids"].unsqueeze(0)).logits[0] for row in rows]
    losses = [(*dense(o, row, weight)[:2], dense(o, row, 1.0)[0]) for o, row in zip(outputs, rows, strict=True)]
    return [sum(parts) / sum(map(count_labels, rows)) for parts in zip(*losses, strict=True)]


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_a_step_is_that_of_the_reference_whatever_the_accumulation(accumulation, tmp_path):
    rows = SoftRows(8)
    batch = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
    trainer = trained(tmp_path, rows, **batch)
    model = initial()
    before = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name.rpartition(".lora_")[2][0] for name in before} == {"A", "B"}
    loss, entropy, divergence = references(model, rows.rows, 0.3)
    moved = dict(trainer.model.named_parameters())
    for (name, old), gradient in zip(before.items(), torch.autograd.grad(loss, [*before.values()]), strict=True):
        torch.testing.assert_close(old - moved[name], 0.1 * gradient.float(), rtol=1e-3, atol=1e-6, msg=name)
    (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert entry["clm_loss"] == pytest.approx(entropy.item(), rel=1e-5)
    assert entry["kl_loss"] == pytest.approx(divergence.item(), rel=1e-5)
    assert entry["loss"] == pytest.approx(loss.item(), rel=1e-4)


def test_evaluation_is_the_loss_of_the_answers(tmp_path):
    rows = TokenRows(6)
    trainer = trained(tmp_path, SoftRows(6), learning_rate=1e-9, per_device_eval_batch_size=6)
    found = trainer.evaluate(rows)["eval_loss"]
    assert found == pytest.approx(references(trainer.model, rows.rows, 0.3)[1].item(), rel=1e-5)
