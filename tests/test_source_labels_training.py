"""Training on replay and source labels together: the order, the loss of each part, resuming.

Gradients, with soft labels too: test_soft_labels_training.py; on two ranks: test_distributed.py.
"""

from fractions import Fraction
from itertools import product

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from torch.utils.data import DataLoader

from conftest import TokenRows, make_trainer
from heterofusion.training.mixture import PART, Mixture, MixtureSampler, epoch_length, replay_places

SHARES = [Fraction(3, 8), Fraction(1, 2), Fraction(1, 10), Fraction(9, 10), Fraction(333, 1000), Fraction(0)]


def mixture(replay: int = 9, labels: int = 15, fraction: float | None = 0.375) -> Mixture:
    return Mixture(TokenRows(replay), TokenRows(labels, seed=3), fraction)


# ---- the order --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", SHARES, ids=str)
def test_every_run_of_neighbours_has_the_share(share):
    """Floor or ceiling of the exact number, whatever the length and the place; so a batch of 32 at 12/32 has 12."""
    marks = np.concatenate([replay_places(share, 0, 700), replay_places(share, 700, 500)])
    sums = np.concatenate([[0], np.cumsum(marks)])
    for length in (1, 2, 3, 7, 8, 32, 100, 333):
        found = sums[length:] - sums[:-length]
        assert set(found) <= {int(share * length), -int(-share * length // 1)}, length


@pytest.mark.parametrize(
    ("counts", "share", "step"), list(product([(6, 10), (30, 7), (1, 50)], SHARES[:5], [1, 8, 12]))
)
def test_every_epoch_holds_every_example_in_whole_steps(counts, share, step):
    sampler = MixtureSampler(Mixture(range(counts[0]), range(counts[1]), float(share)), step, seed=1)
    length = epoch_length(counts, share, step)
    assert len(sampler) == length and length % step == 0
    fewer = length - step  # of any steps fewer, one part would not be seen whole in some epoch
    assert int(fewer * share) < counts[0] or int(fewer * (1 - share)) < counts[1]
    for epoch in range(3):
        sampler.set_epoch(epoch)
        assert set(sampler) == set(range(sum(counts)))


def test_parts_are_shuffled_anew_when_used_up_and_every_epoch():
    sampler = MixtureSampler(Mixture(range(4), range(60), 0.5), 8, seed=1)
    first = list(sampler)
    replay = [index for index in first if index < 4]
    rounds = [tuple(replay[i : i + 4]) for i in range(0, len(replay), 4)]
    assert all(set(part) == set(range(4)) for part in rounds) and len(set(rounds)) > 5
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert list(MixtureSampler(Mixture(range(4), range(60), 0.5), 8, seed=2)) != first


def test_ranks_read_the_order_of_one_process_and_resume_in_it():
    """In the second epoch, where accelerate does not reach a sampler behind two wrappers.

    Every batch and window then has the share, as all neighbours do.
    """
    data = Mixture(range(9), range(15))
    data.__class__ = type("Indices", (Mixture,), {"__getitem__": lambda self, index: {PART: index}})
    whole = MixtureSampler(data, 8, seed=5)
    whole.set_epoch(1)
    wanted = np.array(list(whole)).reshape(-1, 2, 4)  # (windows, ranks, batch)
    for rank in range(2):
        sampler = MixtureSampler(data, 8, seed=5)
        plain = DataLoader(data, 4, sampler=sampler, collate_fn=lambda rows: [row[PART] for row in rows])
        rest = skip_first_batches(prepare_data_loader(plain, None, 2, rank, put_on_device=False), 2)
        rest.set_epoch(1)
        sampler.set_epoch(1)  # as the trainer does
        assert list(rest) == wanted[2:, rank].tolist()


# ---- the loss ---------------------------------------------------------------------------------------------------


def in_order(data: Mixture, step: int = 8) -> list[dict]:
    return [data[index] for index in MixtureSampler(data, step, seed=42)]


def naive_means(model, rows: list[dict]) -> dict[str, float]:
    """Token means of each part, one example at a time."""
    sums = {0: [0.0, 0], 1: [0.0, 0]}
    for row in rows:
        example = {name: value.unsqueeze(0) for name, value in row.items() if name != PART}
        count = int((example["labels"][:, 1:] != -100).sum())
        with torch.no_grad():
            sums[row[PART]][0] += float(model(**example).loss) * count
        sums[row[PART]][1] += count
    return {name: sums[index][0] / sums[index][1] for index, name in enumerate(("loss_replay", "loss_labels"))}


@pytest.mark.parametrize("accumulation", [1, 4])
def test_loss_per_part_is_the_token_mean_since_the_last_line(tmp_path, accumulation):
    """Two windows a line, with uneven numbers of tokens; the learning rate is too small to move anything."""
    data = mixture()
    trainer = make_trainer(
        tmp_path, rows=data, per_device_train_batch_size=8 // accumulation, gradient_accumulation_steps=accumulation,
        max_steps=3, logging_steps=2, learning_rate=1e-12,
    )  # fmt: skip
    wanted = naive_means(trainer.model.train(), in_order(data)[:16])
    trainer.train()
    log = trainer.state.log_history[0]
    for name, value in wanted.items():
        assert log[name] == pytest.approx(value, abs=1e-5), name
    assert wanted["loss_replay"] != pytest.approx(wanted["loss_labels"], abs=1e-2)


def test_resumed_run_equals_an_uninterrupted_one(tmp_path):
    """In the middle of the second epoch, whose order is another one than the first's."""
    settings = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 4}
    whole = make_trainer(tmp_path / "whole", rows=mixture(), **settings)
    whole.train()
    again = make_trainer(tmp_path / "again", rows=mixture(), **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    wanted = whole.model.hypernetworks.state_dict()
    for name, tensor in again.model.hypernetworks.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name
    lines = [{k: v for k, v in t.state.log_history[4].items() if k.startswith("loss")} for t in (whole, again)]
    assert lines[0] == lines[1] and len(lines[0]) == 3


# ---- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("replay", "labels", "share"),
    [(0, 15, 0), (60, 1800, 1 / 31), (9, 15, 0.375), (300, 15, 20 / 21), (3, 4_000_000, 0.001), (4_000_000, 3, 0.999)],
)
def test_by_default_all_examples_come_equally_often(replay, labels, share):
    mixed = Mixture(range(replay), range(labels))
    assert float(mixed.share) == pytest.approx(share)


@pytest.mark.parametrize(
    ("replay", "labels", "fraction", "words"),
    [
        *((9, 15, bad, r"is .*at least 0 and below 1") for bad in (-0.1, 1.0, 0.0001, 0.9999, float("nan"))),
        (9, 15, 0.0, "--replay_fraction is 0 with 9 replay examples"),
        (0, 4, 0.5, r"--replay_fraction is 0\.5 with 0 replay examples"),
        (4, 0, 0.5, "no source labels"),
    ],
)
def test_fraction_out_of_range_or_of_nothing_raises(replay, labels, fraction, words):
    with pytest.raises(ValueError, match=words):
        mixture(replay, labels, fraction)


def test_trainer_refuses_settings_that_break_the_shares(tmp_path):
    with pytest.raises(ValueError, match="--train_sampling_strategy is"):
        make_trainer(tmp_path, rows=mixture(), train_sampling_strategy="group_by_length")
