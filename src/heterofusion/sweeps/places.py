"""What programs that run other recipes share: flags of where runs go, how runs are shown and how they are ended."""

import os
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml

from heterofusion.data.markdown import markdown_table
from heterofusion.runtime.errors import UserError
from heterofusion.sweeps.pool import FAILED, NOT_RUN, Outcome, Pool
from heterofusion.sweeps.runs import Run


@dataclass
class PlaceArguments:
    """Where runs go, and what becomes of what is there."""

    gpus: list[str] = field(
        default_factory=list,
        metadata={
            "help": "GPUs that take one run at a time each, as CUDA_VISIBLE_DEVICES names them (0 1 2 3, or ids); by "
            "default those of CUDA_VISIBLE_DEVICES, or all."
        },
    )
    jobs: int | None = field(
        default=None, metadata={"help": "Runs at a time on the CPU, which share its cores (1); without --gpus."}
    )
    accelerate_config: str | None = field(
        default=None,
        metadata={
            "help": "Launch every run on several GPUs with this accelerate config, one run after the other; an "
            "optimizer step then has the examples of all processes."
        },
    )
    preload: bool = field(
        default=False,
        metadata={
            "help": "Fork the runs of --jobs from one process that has imported torch and transformers already, which "
            "saves the seconds that every recipe needs for that (Linux)."
        },
    )
    delete_checkpoints: bool = field(
        default=False, metadata={"help": "Remove the checkpoints of a run once it is finished; its adapter stays."}
    )
    dry_run: bool = field(default=False, metadata={"help": "Print the runs with their flags and stop."})
    overwrite: bool = field(
        default=False, metadata={"help": "Run again what is finished, or was made with other flags."}
    )

    def __post_init__(self) -> None:
        if self.jobs is not None and self.jobs < 1:
            raise UserError(f"--jobs is {self.jobs}; it must be at least 1")
        if self.jobs is not None and (self.gpus or self.accelerate_config):
            raise UserError("--jobs is for the CPU; leave it out with --gpus or --accelerate_config")
        if self.preload and self.jobs is None:
            raise UserError("--preload is for runs on the CPU; give --jobs too, or leave it out")
        if self.preload and sys.platform != "linux":
            raise UserError(f"--preload forks a process that has loaded torch, which needs Linux, not {sys.platform}")
        if len(set(self.gpus)) < len(self.gpus):
            raise UserError(f"--gpus names a GPU twice: {' '.join(self.gpus)}")
        if self.accelerate_config and not Path(self.accelerate_config).is_file():
            raise UserError(f"--accelerate_config {self.accelerate_config} does not exist")

    def pool(self, recipes: Path) -> Pool:
        """Where the runs go.

        Args:
            recipes: folder of the recipes.
        """
        options = {"overwrite": self.overwrite, "delete_checkpoints": self.delete_checkpoints}
        if self.accelerate_config:
            return Pool.launched(recipes, self.accelerate_config, self.gpus, **options)
        gpus = self.gpus or ([] if self.jobs else visible_gpus())
        if gpus:
            return Pool.on_gpus(recipes, gpus, **options)
        return Pool.on_cpu(recipes, self.jobs or 1, self.preload, **options)


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    count = torch.cuda.device_count()
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",")[:count] if given else [str(index) for index in range(count)]


def describe(run: Run) -> str:
    """A run with the flags of its steps, as YAML."""
    steps = {step.recipe: step.flags for step in run.steps}
    return f"==== {run.title} ====\n{yaml.safe_dump(steps, sort_keys=False, allow_unicode=True, width=1000)}"


def outcome_table(outcomes: Sequence[Outcome]) -> str:
    """What became of the runs, and of those that failed why."""
    counts = Counter(outcome.status for outcome in outcomes)
    lines = [", ".join(f"{count} {status}" for status, count in counts.items())]
    bad = [outcome for outcome in outcomes if outcome.status in (FAILED, NOT_RUN)]
    if bad:
        rows = [[item.run.title, item.status, item.reason or None] for item in bad]
        lines += ["", markdown_table(["run", "", "why"], rows)]
    return "\n".join(lines)


def end_runs_when_told() -> None:
    """Let every signal that ends a program end the runs too, as Ctrl-C does; a second one does not count."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def interrupt(number: int, frame: object) -> None:
        for each in signals:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    for each in signals:
        signal.signal(each, interrupt)
