"""Figures of a training: means over accumulation windows, what a log line holds, the metrics of a whole run."""

from collections.abc import Mapping, Sequence
from typing import Any

from accelerate import Accelerator
from torch import Tensor
from transformers.trainer_callback import ProgressCallback

PER_ROLE = ("alpha/", "gate_sparsity/", "delta_ratio/")


class FusionProgressCallback(ProgressCallback):
    """Trainer's progress bar; of the entries per role the terminal shows the mean, reports get them all."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        super().on_log(args, state, control, logs=mean_over_roles(logs or {}), **kwargs)


class WindowMeans:
    """Means of what adds up over the micro-batches of accumulation windows.

    A scalar is averaged over windows and ranks. A pair (sum, number), shape (2,), gives the quotient of its totals
    over windows and ranks: the mean over all that was counted, however uneven windows and ranks are.
    """

    def __init__(self) -> None:
        self.window: dict[str, Tensor] = {}  # sums of the window that is open, detached, on the device
        self.windows = 0  # that were committed since the last `take`
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor) -> None:
        """Add a micro-batch's value to the open window; under the same names on all ranks."""
        self.window[name] = self.window.get(name, 0) + value.detach()

    def commit(self) -> None:
        """Close the open window."""
        for name, value in self.window.items():
            self._sums[name] = self._sums.get(name, 0) + value
        self.windows += 1
        self.window = {}

    def take(self, accelerator: Accelerator) -> dict[str, float]:
        """The means, and begin anew; without pairs that counted nothing. All ranks together; waits for the device."""
        means = {}
        for name, value in self._sums.items():
            if value.ndim == 0:
                means[name] = accelerator.reduce(value, "mean").item() / self.windows
                continue
            total, number = accelerator.reduce(value, "sum").tolist()
            if number > 0:
                means[name] = total / number
        self._sums, self.windows = {}, 0
        return means


def mean_over_roles(logs: Mapping[str, Any]) -> dict[str, Any]:
    """Log entries with `alpha/<role>`, ... replaced by one mean per quantity; attention stays per source."""
    short = {name: value for name, value in logs.items() if not name.startswith(PER_ROLE)}
    for quantity in PER_ROLE:
        if values := [value for name, value in logs.items() if name.startswith(quantity)]:
            short[f"mean {quantity.rstrip('/')}"] = sum(values) / len(values)
    return short


def run_metrics(metrics: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Trainer's metrics of a run for its record, with the mean loss of all its steps by `TrainerState.log_history`.

    Trainer's own mean begins anew when a run resumes. Steps after the last logged loss do not count.
    """
    kept = {name: value for name, value in metrics.items() if name not in ("total_flos", "train_loss")}
    total, last = 0.0, 0
    for entry in history:
        if "loss" in entry:
            total += entry["loss"] * (entry["step"] - last)
            last = entry["step"]
    return kept | ({"train_loss": total / last} if last else {})
