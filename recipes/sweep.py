"""Run the experiments of sweep files: one file, or all files of a table.

    python recipes/sweep.py --sweeps recipes/demo/single_source.yaml recipes/demo/noise.yaml [--dry_run true]

A sweep file names variables and their values, and the flags of recipes/expert.py, recipes/train.py and recipes/eval.py
in which they stand; see recipes/README.md. Runs that are finished are skipped, interrupted ones go on where they were,
and a failure does not stop the others. One run at a time on every GPU of --gpus, or --jobs of them on the CPU.
"""

import logging
import os
import signal
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

# what libraries warn of while they are imported must not stand beside an error
logging.getLogger().addHandler(logging.NullHandler())

import torch
import yaml

from heterofusion.cli import UsageError, command, parse_arguments, set_up_logging
from heterofusion.markdown import markdown_table
from heterofusion.sweeps import Pool, Run, read_sweep, run_all
from heterofusion.sweeps.pool import FAILED, NOT_RUN, Outcome

FOLDER = Path(__file__).resolve().parent


@dataclass
class SweepArguments:
    """What is run, and where."""

    sweeps: list[str] = field(default_factory=list, metadata={"help": "Sweep files, run one after the other."})
    only: list[str] = field(
        default_factory=list,
        metadata={"help": "Run only what has one of these texts in its title, as --dry_run true shows the titles."},
    )
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
    delete_checkpoints: bool = field(
        default=False, metadata={"help": "Remove the checkpoints of a run once it is finished; its adapter stays."}
    )
    dry_run: bool = field(default=False, metadata={"help": "Print the runs with their flags and stop."})
    overwrite: bool = field(
        default=False, metadata={"help": "Run again what is finished, or was made with other flags."}
    )

    def __post_init__(self) -> None:
        if not self.sweeps:
            raise ValueError("--sweeps is missing: name at least one sweep file")
        if self.jobs is not None and self.jobs < 1:
            raise ValueError(f"--jobs is {self.jobs}; it must be at least 1")
        if self.jobs is not None and (self.gpus or self.accelerate_config):
            raise ValueError("--jobs is for the CPU; leave it out with --gpus or --accelerate_config")
        if len(set(self.gpus)) < len(self.gpus):
            raise ValueError(f"--gpus names a GPU twice: {' '.join(self.gpus)}")
        if self.accelerate_config and not Path(self.accelerate_config).is_file():
            raise ValueError(f"--accelerate_config {self.accelerate_config} does not exist")

    def pool(self) -> Pool:
        """Where the runs go."""
        options = {"overwrite": self.overwrite, "delete_checkpoints": self.delete_checkpoints}
        if self.accelerate_config:
            return Pool.launched(FOLDER, self.accelerate_config, self.gpus, **options)
        gpus = self.gpus or ([] if self.jobs else visible_gpus())
        return Pool.on_gpus(FOLDER, gpus, **options) if gpus else Pool.on_cpu(FOLDER, self.jobs or 1, **options)


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    count = torch.cuda.device_count()
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",")[:count] if given else [str(index) for index in range(count)]


def read_runs(options: SweepArguments) -> list[list[Run]]:
    """The runs of every sweep file.

    Raises:
        UsageError: two of them share a folder, or --only matches none.
    """
    files = [read_sweep(path) for path in options.sweeps]
    writers: dict[Path, Run] = {}
    for run in [run for runs in files for run in runs]:
        for folder in {run.folder, *(step.folder for step in run.steps)}:
            other = writers.setdefault(folder.resolve(), run)
            if other is not run:
                raise UsageError(f"{other.title} and {run.title} both write to {folder}; change an output_dir")
    if options.only:
        files = [[run for run in runs if any(text in run.title for text in options.only)] for runs in files]
        if not any(files):
            raise UsageError(f"--only {' '.join(options.only)} matches no run; --dry_run true shows their titles")
    return files


def describe(run: Run) -> str:
    """A run with the flags of its steps, as YAML."""
    steps = {step.recipe: step.flags for step in run.steps}
    return f"==== {run.title} ====\n{yaml.safe_dump(steps, sort_keys=False, allow_unicode=True, width=1000)}"


def outcome_table(outcomes: list[Outcome]) -> str:
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


@command
def main(argv: list[str]) -> None:
    (options,) = parse_arguments((SweepArguments,), argv, __doc__)
    set_up_logging(logging.INFO)
    files = read_runs(options)
    count = sum(map(len, files))
    if options.dry_run:
        for run in [run for runs in files for run in runs]:
            print(describe(run))
        print(f"{count} runs")
        return
    end_runs_when_told()
    pool, outcomes = options.pool(), []
    for runs in files:  # one file after the other: a later one may need what an earlier one makes
        outcomes += run_all(runs, pool)
    print(outcome_table(outcomes))
    failed = sum(outcome.status in (FAILED, NOT_RUN) for outcome in outcomes)
    if failed:
        raise ChildProcessError(
            f"{failed} of {count} runs did not finish; the same command, without --overwrite, tries them again"
        )


if __name__ == "__main__":
    sys.exit(main())
