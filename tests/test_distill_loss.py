"""The loss of FuseLLM against a dense reference, its normalization, and a training that comes nearer to a teacher."""

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from conftest import GOLDEN, fresh_base, token_batch
from heterofusion import load_adapter
from heterofusion.rivals.distillation import (
    DistillationTrainer,
    DistillCollator,
    DistillConfig,
    distillation_losses,
)
from heterofusion.rivals.fusellm import TEACHER_IDS, TEACHER_PROBS
from heterofusion.training.expert import load_initial
from recipe_runner import save_tokenizer

VOCABULARY, K = 64, 3


def examples(count: int = 8, seed: int = 0, length: int = 10) -> list[dict]:
    """Rows with different numbers of labels, and random teachers' labels for them."""
    generator = torch.Generator().manual_seed(seed)
    batch = token_batch(count, length, seed)
    rows = []
    for index in range(count):
        labels = batch["labels"][index].tolist()
        labels[3 : 3 + index % 5] = [-100] * (index % 5)
        n = sum(label != -100 for label in labels)
        probs = torch.rand(n, K, generator=generator)
        probs[::2, 1:] = 0  # one-hot, padded
        row = {"input_ids": batch["input_ids"][index].tolist(), "attention_mask": [1] * length, "labels": labels}
        row[TEACHER_IDS] = [torch.randperm(VOCABULARY, generator=generator)[:K].tolist() for _ in range(n)]
        row[TEACHER_PROBS] = (probs / probs.sum(1, keepdim=True)).tolist()
        rows.append(row)
    return rows


def naive(logits: torch.Tensor, rows: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    """Both losses, token by token, with the teacher's distribution over the whole vocabulary."""
    nll = kl = torch.zeros((), dtype=torch.float64)
    for row, example in zip(logits.double(), rows, strict=True):
        places = [place for place, label in enumerate(example["labels"]) if label != -100]
        for n, place in enumerate(places):
            log_q = torch.log_softmax(row[place - 1], dim=-1)
            p = torch.zeros(VOCABULARY, dtype=torch.float64)
            for token, prob in zip(example[TEACHER_IDS][n], example[TEACHER_PROBS][n], strict=True):
                p[token] += prob
            nll = nll - log_q[example["labels"][place]]
            kl = kl + torch.nn.functional.kl_div(log_q, p, reduction="sum")
    return nll, kl


@pytest.fixture(scope="module")
def collator(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return DistillCollator(AutoTokenizer.from_pretrained(folder))


def test_losses_are_those_of_the_dense_reference(collator):
    rows = examples()
    logits = torch.randn(8, 10, VOCABULARY, generator=torch.Generator().manual_seed(1), requires_grad=True)
    batch = collator(rows)
    parts = distillation_losses(logits, batch["labels"], batch[TEACHER_IDS], batch[TEACHER_PROBS])
    reference = naive(logits, rows)
    for part, expected in zip(parts, reference, strict=True):
        torch.testing.assert_close(part.double(), expected, rtol=1e-5, atol=1e-4)
        (gradient,) = torch.autograd.grad(part, logits, retain_graph=True)
        (wanted,) = torch.autograd.grad(expected, logits, retain_graph=True)
        torch.testing.assert_close(gradient, wanted.float(), rtol=1e-4, atol=1e-5)


def trained(folder, collator, rows, **changes):
    """The golden target's adapter after a plain SGD run; gives the trainer."""
    args = DistillConfig(
        output_dir=str(folder), use_cpu=True, save_strategy="no", disable_tqdm=True, logging_steps=1,
        **{"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "warmup_steps": 0, "max_steps": 1,
           "max_grad_norm": 0.0, "distill_lambda": 0.7, **changes},
    )  # fmt: skip
    model = load_initial(fresh_base(), load_adapter(GOLDEN / "target_llama"))
    trainer = DistillationTrainer(model, args, train_dataset=Dataset.from_list(rows), data_collator=collator)
    trainer.train()
    return trainer


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_a_step_is_that_of_the_reference_whatever_the_accumulation(accumulation, collator, tmp_path):
    rows = examples()
    batch = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
    trainer = trained(tmp_path, collator, rows, **batch)
    model = load_initial(fresh_base(), load_adapter(GOLDEN / "target_llama"))
    before = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name.rpartition(".lora_")[2][0] for name in before} == {"A", "B"}
    nll, kl = naive(model(input_ids=torch.tensor([row["input_ids"] for row in rows])).logits, rows)
    tokens = sum(label != -100 for row in rows for label in row["labels"])
    loss = (0.7 * nll + 0.3 * kl) / tokens
    gradients = torch.autograd.grad(loss, list(before.values()))
    moved = weights(trainer)
    for (name, old), gradient in zip(before.items(), gradients, strict=True):
        torch.testing.assert_close(old - moved[name], 0.1 * gradient.float(), rtol=1e-3, atol=1e-6, msg=name)
    (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert entry["clm_loss"] == pytest.approx(nll.item() / tokens, rel=1e-5)
    assert entry["kl_loss"] == pytest.approx(kl.item() / tokens, rel=1e-5)
    assert entry["loss"] == pytest.approx(loss.item(), rel=1e-4)


def test_kl_to_the_teacher_falls(collator, tmp_path):
    """The teacher is the same model with another LoRA, so that it can be learned; all of its distribution is given."""
    teacher = load_initial(fresh_base(), load_adapter(GOLDEN / "target_llama"))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            if ".lora_B." in name:
                parameter += 0.5 * torch.randn(parameter.shape, generator=generator)
    rows = examples(4)
    for row in rows:
        with torch.no_grad():
            probs = torch.softmax(teacher(input_ids=torch.tensor([row["input_ids"]])).logits[0], dim=-1)
        places = [place for place, label in enumerate(row["labels"]) if label != -100]
        row[TEACHER_IDS] = [list(range(VOCABULARY))] * len(places)
        row[TEACHER_PROBS] = [probs[place - 1].tolist() for place in places]
    settings = {"distill_lambda": 0.0, "max_steps": 15, "optim": "adamw_torch", "learning_rate": 0.02}
    log = trained(tmp_path, collator, rows, per_device_train_batch_size=4, **settings).state.log_history
    falling = [entry["kl_loss"] for entry in log if "kl_loss" in entry]
    assert len(falling) == 15 and falling[-1] < 0.5 * falling[0], falling
    assert all(entry["loss"] == pytest.approx(entry["kl_loss"], rel=1e-4) for entry in log if "loss" in entry)


def test_evaluation_is_the_loss_of_the_answers(collator, tmp_path):
    rows = examples(6)
    plain = [{k: v for k, v in row.items() if k not in (TEACHER_IDS, TEACHER_PROBS)} for row in rows]
    trainer = trained(tmp_path, collator, rows, learning_rate=1e-9, per_device_eval_batch_size=6)
    found = trainer.evaluate(Dataset.from_list(plain))["eval_loss"]
    logits = trainer.model(input_ids=torch.tensor([row["input_ids"] for row in rows])).logits
    tokens = sum(label != -100 for row in rows for label in row["labels"])
    assert found == pytest.approx(naive(logits, rows)[0].item() / tokens, rel=1e-5)
