"""All methods in one table under the same conditions: baselines, controls, upper bounds and the fusion itself.

    python recipes/compare.py --config recipes/demo/compare.yaml [--jobs 2] [--dry_run true]

The file names the methods, each with the flags of its recipe (train, expert, merge, distill, or an evaluation alone)
and the values of its hyper-parameters to try; see recipes/README.md. What several methods share (labels of source
experts, further adapters) is made first. Then every method with hyper-parameters gets --search_budget runs that are
scored on validation data; at last all methods run once per case and seed with what was best, and are scored on the
test data. Runs that are finished are skipped, so the same command goes on after an interruption. Writes
output_dir/comparison.json, and report.md with a picture to output_dir/report.
"""

import json
import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path

# what libraries warn of while they are imported must not stand beside an error
logging.getLogger().addHandler(logging.NullHandler())

from heterofusion.cli import command, set_up_logging
from heterofusion.cli_before import parse_with_sections
from heterofusion.comparison import (
    COMPARISON_FILE,
    SECTIONS,
    check_apart,
    check_datasets,
    choose,
    collect,
    final_runs,
    finished_folders,
    lost_methods,
    made_runs,
    make,
    plan_comparison,
    run_unblocked,
    search_runs,
)
from heterofusion.report.comparison import comparison_table, gain_sentences, parse_comparison
from heterofusion.report.style import require_matplotlib
from heterofusion.report.write import Report, check_output, write_report
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.files import write_whole
from heterofusion.sweeps.places import PlaceArguments, describe, end_runs_when_told, outcome_table
from heterofusion.sweeps.pool import FAILED, NOT_RUN, Outcome

FOLDER = Path(__file__).resolve().parent


@dataclass
class CompareArguments(PlaceArguments):
    """What is compared, how often, and where it runs."""

    output_dir: str = field(default="outputs/compare", metadata={"help": "Folder for everything that is made."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of the runs in the table."})
    search_seed: int = field(
        default=100, metadata={"help": "Seed of the runs that hyper-parameters are chosen by; none of --seeds."}
    )
    search_budget: int = field(
        default=5, metadata={"help": "Validation runs that every method with hyper-parameters gets."}
    )
    title: str = field(default="Methods side by side", metadata={"help": "Heading of the table."})
    only: list[str] = field(
        default_factory=list, metadata={"help": "Compare only these methods, by their names in the file."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"--seeds is {self.seeds}; give one or more, all different")
        if self.search_seed in self.seeds:
            raise UserError(
                f"--search_seed {self.search_seed} is one of --seeds {self.seeds}: hyper-parameters would be chosen "
                "by a run that is in the table; give another"
            )
        if self.search_budget < 1:
            raise UserError(f"--search_budget is {self.search_budget}; it must be at least 1")


def unfinished(outcomes: list[Outcome]) -> list[Outcome]:
    """Those that did not end well; prints what became of all."""
    if outcomes:
        print(outcome_table(outcomes), flush=True)
    return [outcome for outcome in outcomes if outcome.status in (FAILED, NOT_RUN)]


@command
def main(argv: list[str]) -> None:
    (options,), sections, file = parse_with_sections((CompareArguments,), argv, __doc__, SECTIONS)
    set_up_logging(logging.INFO)
    if file is None:
        raise UserError("--config is missing: name a comparison file, such as recipes/demo/compare.yaml")
    folder = Path(options.output_dir).expanduser()
    comparison = plan_comparison(
        sections, file, folder, options.seeds, options.search_seed, options.search_budget, options.only
    )
    # all flags are checked here
    made, searching, reported = made_runs(comparison), search_runs(comparison), final_runs(comparison, {})
    check_apart(searching, reported, comparison.where, made)
    check_datasets(comparison.gains, reported, comparison.where)
    if options.dry_run:
        for run in (*made, *searching, *reported):
            print(describe(run))
        first = f"{len(made)} runs to make what methods share, " if made else ""
        print(f"{first}{len(searching)} runs to choose hyper-parameters by, {len(reported)} to report")
        return
    require_matplotlib()
    report_folder, document = check_output(folder / "report", None, overwrite=True)
    end_runs_when_told()
    pool = options.pool(FOLDER)
    again = "the same command, without --overwrite, tries them again"
    failed = unfinished(make(made, pool))
    if pool.stopped:
        raise ChildProcessError(
            f"{len(failed)} of {len(made)} runs that make what methods share did not finish; {again}"
        )
    there = finished_folders(made)
    unable = {run.name for run in searching if any(folder not in there for folder in run.needs)}
    lost = lost_methods(comparison, unable, "for what that needs is not there")
    searching = [run for run in searching if run.name not in lost]
    failed = unfinished(run_unblocked(searching, made, pool))
    if pool.stopped:
        raise ChildProcessError(f"{len(failed)} of {len(searching)} validation runs did not finish; {again}")
    lost |= lost_methods(comparison, {each.run.name for each in failed}, "for not all of its runs have ended well")
    chosen = choose(comparison, without=lost)
    reported = final_runs(comparison, {name: each["settings"] for name, each in chosen.items()})
    failed = unfinished(run_unblocked(reported, made, pool, lost))
    told = f"{len(failed)} of {len(reported)} runs did not finish; {again}"
    content = {"title": options.title, **collect(comparison, chosen)}
    if failed and not content["rows"]:
        raise ChildProcessError(told)
    write_whole(folder / COMPARISON_FILE, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    table = parse_comparison(content, f"comparison {folder / COMPARISON_FILE}")
    write_report(Report(options.title, comparisons=[table]), report_folder, document)
    print("\n" + comparison_table(table) + "\n")
    print("\n".join(gain_sentences(table)))
    print(f"written to {document}")
    if failed:
        raise ChildProcessError(told)


if __name__ == "__main__":
    sys.exit(main())
