"""What a fusion is doing: scale of the updates, how much the gates close, which sources are attended to."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers.trainer_callback import ProgressCallback

from heterofusion.export import display_name
from heterofusion.modeling import HeteroFusionModel


class FusionProgressCallback(ProgressCallback):
    """Trainer's progress bar; of the entries per role the terminal shows the mean, reports get them all."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        super().on_log(args, state, control, logs=mean_over_roles(logs or {}), **kwargs)


class WindowMeans:
    """Means over accumulation windows of scalars that add up over the micro-batches of one.

    Attributes:
        window: sums of the window that is open, detached, on the device.
        windows: windows that were committed since the last `take`.
    """

    def __init__(self) -> None:
        self.window: dict[str, Tensor] = {}
        self.windows = 0
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor) -> None:
        """Add a micro-batch's value to the open window."""
        self.window[name] = self.window[name] + value.detach() if name in self.window else value.detach()

    def drop(self) -> None:
        """Forget the open window."""
        self.window = {}

    def commit(self) -> None:
        """Close the open window."""
        for name, value in self.window.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self.windows += 1
        self.window = {}

    def take(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over windows and ranks, and begin anew. All ranks together; waits for the device."""
        means = {name: accelerator.reduce(value, "mean").item() / self.windows for name, value in self._sums.items()}
        self._sums, self.windows = {}, 0
        return means


def mean_over_roles(logs: Mapping[str, Any]) -> dict[str, Any]:
    """Log entries with `alpha/<role>`, ... replaced by one mean per quantity; attention stays per source."""
    parts: dict[str, list[float]] = defaultdict(list)
    short: dict[str, Any] = {}
    for name, value in logs.items():
        quantity, _, role = name.partition("/")
        if role and quantity in ("alpha", "gate_sparsity", "delta_ratio"):
            parts[quantity].append(value)
        else:
            short[name] = value
    return short | {f"mean {quantity}": sum(values) / len(values) for quantity, values in parts.items()}


def mean_logged_loss(history: Sequence[Mapping[str, Any]]) -> float | None:
    """Mean training loss per optimizer step over a run's log, resumed or not; None if nothing was logged.

    Args:
        history: `TrainerState.log_history`. Steps after its last `loss` do not count.
    """
    total, last = 0.0, 0
    for entry in history:
        if "loss" in entry:
            total += entry["loss"] * (entry["step"] - last)
            last = entry["step"]
    return total / last if last else None


def run_metrics(metrics: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Trainer's metrics of a run for its record, with the mean loss of all its steps, resumed or not."""
    kept = {name: value for name, value in metrics.items() if name not in ("total_flos", "train_loss")}
    loss = mean_logged_loss(history)  # Trainer's own begins anew when a run resumes
    return kept if loss is None else kept | {"train_loss": loss}


def diagnostic_logs(model: HeteroFusionModel) -> dict[str, float]:
    """The state of the fusion as flat log entries: `alpha/q_proj`, ..., `attention/<source>` over all roles."""
    groups = {key.name: key for key in model.plan.groups}
    roles = [key.role for key in groups.values()]
    shares = defaultdict(list)
    logs: dict[str, float] = {}
    for name, values in fusion_diagnostics(model).items():
        label = groups[name].role if roles.count(groups[name].role) == 1 else name
        for entry, value in values.items():
            if entry.startswith("attention/"):
                shares[int(entry.removeprefix("attention/"))].append(value)
            else:
                logs[f"{entry}/{label}"] = value
    for index, parts in sorted(shares.items()):
        source = display_name(model.plan.sources[index].name)
        logs[f"attention/{index + 1}-{source}"] = sum(parts) / len(parts)
    return logs


@torch.no_grad()
def fusion_diagnostics(model: HeteroFusionModel) -> dict[str, dict[str, float]]:
    """State of the fusion, by group name: one extra forward of the hypernetworks, on all ranks together.

    Args:
        model: the model, as it is now.

    Returns:
        Per group: `alpha`; `gate_sparsity`, the share of zeros in the sources' gates; `delta_ratio`,
        ||alpha dB|| / ||B|| over the group's modules; `attention/<i>`, the share of attention that B blocks give
        to source i (counted from 0).
    """
    report = {}
    outputs = model.updates.predict(diagnostics=True)
    for name, output in outputs.items():
        context = model.updates.contexts[name]
        assert output.attention is not None and output.source_gate is not None and output.alpha is not None
        real = context.source_of_block >= 0  # (M, N_s)
        attention = output.attention.flatten(0, 1)[context.decode_index]  # (T, N_s)
        origin = context.source_of_block.repeat_interleave(output.attention.shape[1], 0)[context.decode_index]
        # padded rows are part of the blocks but not of the update: cut them as the update does
        norm = torch.stack(
            [
                blocks.flatten(0, 1)[: item.target.out_features].square().sum()
                for item, blocks in zip(context.members, output.update.split(context.b_blocks), strict=True)
            ]
        ).sum()
        weight = sum(float(item.target.lora_B.float().square().sum()) for item in context.members)
        report[name] = {
            "alpha": float(output.alpha),
            "gate_sparsity": float((output.source_gate[real] == 0).float().mean()),
            "delta_ratio": float(norm.sqrt()) / max(weight**0.5, 1e-12),
        }
        for index in range(len(model.plan.sources)):
            report[name][f"attention/{index}"] = float((attention * (origin == index)).sum(-1).mean())
    return report
