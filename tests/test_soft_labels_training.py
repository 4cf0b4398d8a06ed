"""Soft labels in training: the loss against a dense reference, its normalization, and what is refused."""

from pathlib import Path

import pytest
import torch

from conftest import TokenRows, first_gradients, make_trainer
from heterofusion.data.labels import SOFT_COLUMNS, SOFT_IDS, SOFT_POSITIONS, SOFT_PROBS
from heterofusion.training.mixture import PART, Mixture, MixtureSampler, SoftCollator, soft_losses

VOCABULARY, K, WEIGHT = 64, 3, 0.3


class SoftRows(TokenRows):
    """Rows with random soft labels at every second label token, and one row without any."""

    def __init__(self, count: int, seed: int = 3):
        super().__init__(count, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        for index, row in enumerate(self.rows):
            places = [] if index == 1 else [i for i, label in enumerate(row["labels"].tolist()) if label != -100][::2]
            probs = torch.rand(len(places), K, generator=generator)
            probs[::3, 2] = 0  # fewer tokens than k
            row[SOFT_POSITIONS] = places
            row[SOFT_IDS] = [torch.randperm(VOCABULARY, generator=generator)[:K].tolist() for _ in places]
            row[SOFT_PROBS] = (probs / probs.sum(1, keepdim=True)).tolist()


def mixture(soft_weight: float | None = WEIGHT) -> Mixture:
    return Mixture(TokenRows(9), SoftRows(15), 0.375, soft_weight)


def dense(logits: torch.Tensor, row: dict, weight: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss of one example as the sum over its label tokens, its cross-entropy, and its KL, with P over the vocabulary.

    Args:
        logits: (length, vocabulary).
    """
    log_q = torch.log_softmax(logits.double(), dim=-1)
    soft = {int(place): n for n, place in enumerate(row.get(SOFT_POSITIONS, []))}
    loss = entropy = divergence = torch.zeros((), dtype=torch.float64)
    for place, label in enumerate(row["labels"].tolist()):
        if label == -100:
            continue
        nll = -log_q[place - 1, label]
        entropy = entropy + nll
        if place in soft:
            p = torch.zeros(logits.shape[-1], dtype=torch.float64)
            p[row[SOFT_IDS][soft[place]]] = torch.tensor(row[SOFT_PROBS][soft[place]], dtype=torch.float64)
            kl = torch.nn.functional.kl_div(log_q[place - 1], p, reduction="sum")
            divergence = divergence + kl
            nll = (1 - weight) * nll + weight * kl
        loss = loss + nll
    return loss, entropy, divergence


def count_labels(row: dict) -> int:
    return int((row["labels"] != -100).sum())


# ---- the loss ---------------------------------------------------------------------------------------------------


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    return SoftCollator(lambda plain: {"labels": torch.stack([row["labels"] for row in plain])})(rows)


def test_batch_without_soft_labels_has_the_columns_and_no_loss():
    batch = collate(TokenRows(2).rows)
    assert [tuple(batch[name].shape) for name in SOFT_COLUMNS] == [(2, 1), (2, 1, 1), (2, 1, 1)]
    logits = torch.randn(2, 10, VOCABULARY)
    difference, counted = soft_losses(logits, batch["labels"], *(batch[name] for name in SOFT_COLUMNS))
    assert float(difference) == 0 and counted.tolist() == [0, 0]


def stepped(folder: Path, monkeypatch, rows, accumulation: int):
    """Gradients of the first step, and the trainer after it."""
    trainer = make_trainer(
        folder, rows=rows, per_device_train_batch_size=8 // accumulation, gradient_accumulation_steps=accumulation,
        max_steps=1, max_grad_norm=1e9, rdm_weight=0.0,
    )  # fmt: skip
    return first_gradients(monkeypatch, trainer), trainer


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Gradients and losses of the first eight examples, one at a time."""
    trainer = make_trainer(tmp_path_factory.mktemp("reference"), rows=mixture(), rdm_weight=0.0)
    model, data = trainer.fusion_model.train(), mixture()
    rows = [data[index] for index in MixtureSampler(data, 8, seed=42)][:8]
    found = [dense(model(input_ids=row["input_ids"].unsqueeze(0)).logits[0], row, WEIGHT) for row in rows]
    loss = sum(loss for loss, *_ in found) / sum(map(count_labels, rows))
    parameters = [p for p in model.hypernetworks.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    sums = {part: [0.0, 0] for part in ("replay", "labels", "soft")}
    for row, (_, entropy, kl) in zip(rows, found, strict=True):
        part = sums["labels" if row[PART] else "replay"]
        part[0], part[1] = part[0] + entropy.item(), part[1] + count_labels(row)
        sums["soft"][0] += kl.item()
        sums["soft"][1] += len(row.get(SOFT_POSITIONS, []))
    logged = {f"loss_{part}": total / number for part, (total, number) in sums.items()}
    return gradients, {"lm_loss": loss.item(), **logged}


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_step_is_that_of_the_reference_whatever_the_accumulation(tmp_path, monkeypatch, reference, accumulation):
    gradients, logged = reference
    found, trainer = stepped(tmp_path, monkeypatch, mixture(), accumulation)
    assert max(float(gradient.abs().max()) for gradient in found) > 1e-3
    for a, b in zip(found, gradients, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, atol=1e-6, rtol=1e-4)
    line = trainer.state.log_history[0]
    for name, value in logged.items():
        assert line[name] == pytest.approx(value, abs=1e-5), name
    assert line["loss"] == pytest.approx(logged["lm_loss"], abs=1e-5)


def test_weight_zero_and_no_weight_train_as_hard_labels_do(tmp_path, monkeypatch):
    """Bit for bit; columns of soft labels are then no matter."""
    plain = SoftRows(15)
    plain.rows = [{name: value for name, value in row.items() if name not in SOFT_COLUMNS} for row in plain.rows]
    wanted, trainer = stepped(tmp_path / "hard", monkeypatch, Mixture(TokenRows(9), plain, 0.375), 2)
    for weight in (None, 0.0):
        found, other = stepped(tmp_path / str(weight), monkeypatch, mixture(weight), 2)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
        assert other.state.log_history[0]["loss"] == trainer.state.log_history[0]["loss"]
        assert ("loss_soft" in other.state.log_history[0]) == (weight is not None)


def test_models_that_normalize_by_themselves_get_the_mean_of_micro_batches(tmp_path, monkeypatch):
    """Some models take no `num_items_in_batch`; hard and soft labels then count alike too."""
    trainer = make_trainer(
        tmp_path, rows=mixture(1.0), rdm_weight=0.0, per_device_train_batch_size=4, max_steps=1, learning_rate=1e-12
    )
    trainer.model_accepts_loss_kwargs = False
    data, model = mixture(1.0), trainer.fusion_model.train()
    rows = [data[index] for index in MixtureSampler(data, 8, seed=42)][:8]
    with torch.no_grad():
        losses = [float(dense(model(input_ids=r["input_ids"].unsqueeze(0)).logits[0], r, 1.0)[0]) for r in rows]
    counts = list(map(count_labels, rows))
    wanted = sum(losses[:4]) / sum(counts[:4]) / 2 + sum(losses[4:]) / sum(counts[4:]) / 2
    trainer.train()
    assert trainer.state.log_history[0]["lm_loss"] == pytest.approx(wanted, abs=1e-5)


def test_columns_reach_neither_the_model_nor_its_evaluation(tmp_path):
    trainer = make_trainer(tmp_path, rows=mixture(), max_steps=1, trainer_options={"eval_dataset": mixture()})
    seen: list[bool] = []
    trainer.model.get_base_model().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(bool({PART, *SOFT_COLUMNS} & set(kwargs))), with_kwargs=True
    )
    trainer.train()
    hard = make_trainer(tmp_path, rows=mixture(None), trainer_options={"eval_dataset": mixture(None)})
    hard.fusion_model.load_state_dict(trainer.fusion_model.state_dict())
    assert trainer.evaluate()["eval_loss"] == hard.evaluate()["eval_loss"]
    assert seen and not any(seen)


def test_own_loss_is_refused(tmp_path):
    with pytest.raises(ValueError, match="compute_loss_func is given"):
        make_trainer(tmp_path, rows=mixture(), trainer_options={"compute_loss_func": lambda *args, **kwargs: None})


@pytest.mark.parametrize("weight", [-0.1, 1.5, float("nan")])
def test_weight_out_of_range_raises(weight):
    with pytest.raises(ValueError, match=r"soft_weight is .*from 0 to 1"):
        mixture(weight)
