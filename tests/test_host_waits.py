"""Training does not make the host wait for the device: between log lines the package asks for no tensor's value."""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

import heterofusion
from conftest import TokenRows, make_trainer
from heterofusion.training.mixture import Mixture

PACKAGE, TORCH = (str(Path(module.__file__).parent) for module in (heterofusion, torch))
WAITS = (
    "item", "tolist", "numpy", "cpu", "nonzero", "is_nonzero", "__bool__", "__int__", "__float__", "__index__",
    "__array__",
)  # fmt: skip


class Waits(TrainerCallback):
    """Counts what makes the host wait for the device, by the file that asks for it, in steps 2 and 3 of a run."""

    def __init__(self, monkeypatch) -> None:
        self.on = False
        self.counts = Counter()
        for name in WAITS:
            monkeypatch.setattr(torch.Tensor, name, self.counted(getattr(torch.Tensor, name), name))

    def counted(self, function, name):
        def call(*args, **kwargs):
            if self.on:
                frame = sys._getframe(1)
                while frame.f_code.co_filename.startswith(TORCH):
                    frame = frame.f_back
                self.counts[frame.f_code.co_filename, frame.f_code.co_name, name] += 1
            return function(*args, **kwargs)

        return call

    def on_step_begin(self, args, state, control, **kwargs):
        self.on = state.global_step in (1, 2)

    def ours(self) -> dict:
        return {key[1:]: count for key, count in self.counts.items() if key[0].startswith(PACKAGE)}


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("more", [{}, {"max_grad_norm": 1.0, "rdm_weight": 0.0}, {"rows": True}], ids=str)
def test_steps_do_not_wait_for_the_device(tmp_path, monkeypatch, accumulation, more):
    """Between log lines the package asks for no value of any tensor; nor with the losses of two parts."""
    waits = Waits(monkeypatch)
    if "rows" in more:
        more = {"rows": Mixture(TokenRows(6), TokenRows(10, seed=3), 0.375)}
    trainer = make_trainer(
        tmp_path, max_steps=4, logging_steps=100, gradient_accumulation_steps=accumulation, **more,
        trainer_options={"callbacks": [waits]},
    )  # fmt: skip
    trainer.train()
    assert waits.ours() == {}


def test_waits_would_be_noticed(tmp_path, monkeypatch):
    """A log line waits: it asks for the means."""
    waits = Waits(monkeypatch)
    make_trainer(tmp_path, max_steps=4, logging_steps=1, trainer_options={"callbacks": [waits]}).train()
    assert waits.ours()
