"""Run the experiments of sweep files: one file, or all files of a table.

    python recipes/sweep.py --sweeps recipes/demo/single_source.yaml recipes/demo/noise.yaml [--dry_run true]

A sweep file names variables and their values, and the flags of recipes/expert.py, recipes/train.py and recipes/eval.py
in which they stand; see recipes/README.md. Runs that are finished are skipped, interrupted ones go on where they were,
and a failure does not stop the others. One run at a time on every GPU of --gpus, or --jobs of them on the CPU.
"""

import logging
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path

# what libraries warn of while they are imported must not stand beside an error
logging.getLogger().addHandler(logging.NullHandler())

import torch
import yaml

from heterofusion.cli import UsageError, command, parse_arguments, set_up_logging
from heterofusion.report import markdown_table
from heterofusion.sweeps import Pool, Run, read_sweep, run_all
from heterofusion.sweeps.pool import FAILED, NOT_RUN, Outcome

FOLDER = Path(__file__).resolve().parent


@dataclass
class SweepArguments:
    """What is run, and where."""

    sweeps: list[str] = field(default_factory=list, metadata={"help": "Sweep files, run in this order."})
    only: list[str] = field(
        default_factory=list,
        metadata={"help": "Run only what has one of these texts in its title, as --dry_run true shows the titles."},
    )
    gpus: list[str] = field(
        default_factory=list,
        metadata={"help": "GPUs that take one run at a time each, such as 0 1 2 3; all there are by default."},
    )
    jobs: int | None = field(
        default=None, metadata={"help": "Runs at a time on the CPU, which share its cores (1); without --gpus."}
    )
    accelerate_config: str | None = field(
        default=None,
        metadata={
            "help": "Launch each run on several GPUs with this accelerate config, one run after the other, in place "
            "of one run per GPU."
        },
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
        if self.accelerate_config:
            launch = (sys.executable, "-m", "accelerate.commands.launch", "--config_file", self.accelerate_config)
            return Pool(FOLDER, [",".join(self.gpus)] if self.gpus else (), 1, self.overwrite, launch)
        gpus = self.gpus or ([] if self.jobs else [str(index) for index in range(torch.cuda.device_count())])
        return Pool(FOLDER, gpus, self.jobs or 1, self.overwrite)


def read_runs(options: SweepArguments) -> list[Run]:
    """The runs of all sweep files.

    Raises:
        UsageError: two of them share a folder, or --only matches none.
    """
    runs: list[Run] = []
    writers: dict[Path, Run] = {}
    for run in [run for path in options.sweeps for run in read_sweep(path)]:
        for folder in {run.folder, *(step.folder for step in run.steps)}:
            other = writers.setdefault(folder.resolve(), run)
            if other is not run:
                raise UsageError(f"{other.title} and {run.title} both write to {folder}; change an output_dir")
        runs.append(run)
    if options.only:
        runs = [run for run in runs if any(text in run.title for text in options.only)]
        if not runs:
            raise UsageError(f"--only {' '.join(options.only)} matches no run; --dry_run true shows their titles")
    return runs


def describe(run: Run) -> str:
    """A run with the flags of its steps, as YAML."""
    steps = {step.recipe: step.flags for step in run.steps}
    return f"==== {run.title} ====\n{yaml.safe_dump(steps, sort_keys=False, allow_unicode=True, width=1000)}"


def outcome_table(outcomes: list[Outcome]) -> str:
    """What became of the runs, and of those that failed why."""
    counts: dict[str, int] = {}
    for outcome in outcomes:
        counts[outcome.status] = counts.get(outcome.status, 0) + 1
    lines = [", ".join(f"{count} {status}" for status, count in counts.items())]
    bad = [outcome for outcome in outcomes if outcome.status in (FAILED, NOT_RUN)]
    if bad:
        rows = [[item.run.title, item.status, item.reason.replace("|", "\\|") or None] for item in bad]
        lines += ["", markdown_table(["run", "", "why"], rows)]
    return "\n".join(lines)


@command
def main(argv: list[str]) -> None:
    (options,) = parse_arguments((SweepArguments,), argv, __doc__)
    set_up_logging(logging.INFO)
    runs = read_runs(options)
    if options.dry_run:
        for run in runs:
            print(describe(run))
        print(f"{len(runs)} runs")
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the runs end too
    outcomes = run_all(runs, options.pool())
    print(outcome_table(outcomes))
    failed = sum(outcome.status in (FAILED, NOT_RUN) for outcome in outcomes)
    if failed:
        raise ChildProcessError(f"{failed} of {len(runs)} runs did not finish; the same command tries them again")


if __name__ == "__main__":
    sys.exit(main())
