"""What a training log line of a fusion holds beside Trainer's own figures."""

import math

from accelerate import Accelerator

from heterofusion.method.diagnostics import WindowMeans, diagnostic_logs
from heterofusion.method.model import HeteroFusionModel
from heterofusion.training.config import HeteroFusionConfig


def complete_log(
    logs: dict[str, float],
    means: WindowMeans,
    model: HeteroFusionModel,
    args: HeteroFusionConfig,
    accelerator: Accelerator,
) -> None:
    """Add the method's own figures to a line of Trainer's that has a `loss`. All ranks together.

    Args:
        logs: the line, changed in place; without `loss` where every step since the last line was skipped.
        means: of the losses since the last line; they begin anew.
        model: its state is logged by role and source, and the seconds of its hypernetworks begin anew.
        args: of the run.
        accelerator: of the run.
    """
    windows = means.windows
    if args.skip_nonfinite_steps:  # Trainer counts a skipped step as one without loss
        if not windows:
            del logs["loss"]
        if not math.isfinite(logs.get("grad_norm", 0.0)):
            del logs["grad_norm"]
    if not windows:
        return
    logs.update(means.take(accelerator))
    if args.skip_nonfinite_steps:
        logs["loss"] = logs["lm_loss"] + args.rdm_weight * logs.get("rdm_loss", 0.0)
    logs["hypernetwork_seconds"] = model.updates.seconds / windows
    model.updates.seconds = 0.0
    logs.update(diagnostic_logs(model))
