"""Run the experiments of sweep files: one file, or all files of a table.

    python recipes/sweep.py --sweeps recipes/demo/single_source.yaml recipes/demo/noise.yaml [--dry_run true]

A sweep file names variables and their values, and the flags in which they stand: of recipes/train.py, expert.py,
merge.py or distill.py, and of recipes/eval.py; see recipes/README.md. Runs that are finished are skipped, interrupted
ones go on where they were, and a failure does not stop the others. One run at a time on every GPU of --gpus, or --jobs
of them on the CPU.
"""

import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path

# what libraries warn of while they are imported must not stand beside an error
logging.getLogger().addHandler(logging.NullHandler())

from heterofusion.cli import command, parse_arguments, set_up_logging
from heterofusion.runtime.errors import UserError
from heterofusion.sweeps import Run, read_sweep, run_all
from heterofusion.sweeps.places import PlaceArguments, describe, end_runs_when_told, outcome_table
from heterofusion.sweeps.pool import FAILED, NOT_RUN

FOLDER = Path(__file__).resolve().parent


@dataclass
class SweepArguments(PlaceArguments):
    """What is run, and where."""

    sweeps: list[str] = field(default_factory=list, metadata={"help": "Sweep files, run one after the other."})
    only: list[str] = field(
        default_factory=list,
        metadata={"help": "Run only what has one of these texts in its title, as --dry_run true shows the titles."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sweeps:
            raise UserError("--sweeps is missing: name at least one sweep file")


def read_runs(options: SweepArguments) -> list[list[Run]]:
    """The runs of every sweep file.

    Raises:
        UserError: two of them share a folder, or --only matches none.
    """
    files = [read_sweep(path) for path in options.sweeps]
    writers: dict[Path, Run] = {}
    for run in [run for runs in files for run in runs]:
        for folder in {run.folder, *(step.folder for step in run.steps)}:
            other = writers.setdefault(folder.resolve(), run)
            if other is not run:
                raise UserError(f"{other.title} and {run.title} both write to {folder}; change an output_dir")
    if options.only:
        files = [[run for run in runs if any(text in run.title for text in options.only)] for runs in files]
        if not any(files):
            raise UserError(f"--only {' '.join(options.only)} matches no run; --dry_run true shows their titles")
    return files


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
    pool, outcomes = options.pool(FOLDER), []
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
