"""One report of many evaluations: tables with intervals over seeds, pictures, and how a paper's claims fare.

    python recipes/report.py --results outputs/eval --adapters outputs/fused --output_dir outputs/report \
        --baseline sft --claims claims.yaml

Reads every results.json of recipes/eval.py in the folders. Results that agree in name and in all labels but the seed
make one row; one table per value of the label --group_by. --comparisons shows what recipes/compare.py wrote, with or
without such results. Writes output_dir/report.md, report.json and pictures/.
"""

import logging
import sys
from dataclasses import dataclass, field

# what libraries warn of while they are imported must not stand beside an error
logging.getLogger().addHandler(logging.NullHandler())

from heterofusion.cli import command, parse_arguments, release_logging, set_up_logging
from heterofusion.report.claims import judge, read_claims
from heterofusion.report.comparison import read_comparison
from heterofusion.report.document import claims_table, group_table, group_title
from heterofusion.report.results import find_results
from heterofusion.report.rows import baseline_rows, make_groups
from heterofusion.report.style import require_matplotlib
from heterofusion.report.write import Report, check_output, read_adapters, write_report
from heterofusion.runtime.errors import UserError


@dataclass
class ReportArguments:
    """What is read, how it is arranged, and where it goes."""

    output_dir: str = field(metadata={"help": "Folder for report.md, report.json and pictures."})
    results: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Files results.json of recipes/eval.py, and folders that are searched for them. These, or "
            "--comparisons or --adapters, must be given."
        },
    )
    comparisons: list[str] = field(
        default_factory=list,
        metadata={"help": "Files comparison.json of recipes/compare.py, whose tables and pictures come first."},
    )
    adapters: list[str] = field(
        default_factory=list,
        metadata={"help": "Fused adapters whose alignment, attention, gates, updates and training are drawn."},
    )
    output_file: str | None = field(
        default=None, metadata={"help": "File for the Markdown in place of report.md in output_dir."}
    )
    title: str = field(default="Results", metadata={"help": "Heading of the report."})
    intro: str = field(default="", metadata={"help": "Text below the heading, in Markdown."})
    command: str = field(default="", metadata={"help": "Command that is shown as what the report was made by."})
    group_by: str = field(default="experiment", metadata={"help": "Label whose values make one table each."})
    rows: list[str] = field(
        default_factory=list, metadata={"help": "Names of rows that come first, in this order; the others follow."}
    )
    columns: list[str] = field(
        default_factory=list, metadata={"help": "Data sets that come first, in this order; the others follow."}
    )
    baseline: str | None = field(
        default=None,
        metadata={
            "help": "Row to which differences are shown: a name, or a name with labels as the tables have it, such as "
            "'fused (case clean)'."
        },
    )
    details: bool = field(
        default=False, metadata={"help": "Also show all scores of the metrics, such as precision and recall."}
    )
    claims: str | None = field(
        default=None, metadata={"help": "YAML file with claims that the results are held against."}
    )
    overwrite: bool = field(
        default=False,
        metadata={
            "help": "Write into an output_dir that is not empty and over an output_file; the pictures of an earlier "
            "report there go."
        },
    )


@command
def main(argv: list[str]) -> None:
    (options,) = parse_arguments((ReportArguments,), argv, __doc__)
    set_up_logging(logging.INFO, hold=True)
    _check_inputs(options)
    folder, document = check_output(options.output_dir, options.output_file, options.overwrite)
    require_matplotlib()
    claims = read_claims(options.claims) if options.claims else []
    results = find_results(options.results)
    groups = make_groups(results, options.group_by, options.rows, options.columns)
    if options.baseline and not any(baseline_rows(group, options.baseline, options.group_by) for group in groups):
        names = sorted({row.name for group in groups for row in group.rows})
        raise UserError(f"--baseline {options.baseline!r} is no row of the results; there is {', '.join(names)}")
    report = Report(
        title=options.title,
        intro=options.intro,
        command=options.command,
        group_by=options.group_by,
        groups=groups,
        baseline=options.baseline,
        details=options.details,
        findings=[judge(claim, results) for claim in claims],
        adapters=read_adapters(options.adapters),
        comparisons=[read_comparison(path) for path in options.comparisons],
    )
    release_logging()
    write_report(report, folder, document)
    for group in groups:
        print(f"{group_title(group, options.group_by)}\n\n{group_table(group, options.group_by)}\n")
    if report.findings:
        print(f"{claims_table(report.findings)}\n")
    print(f"written to {document}" + (f" and {folder}" if document.parent != folder else ""))


def _check_inputs(options: ReportArguments) -> None:
    if not (options.results or options.comparisons or options.adapters):
        raise UserError("there is nothing to report; give --results, --comparisons or --adapters")
    for flag in ("claims", "baseline", "rows", "columns"):
        if getattr(options, flag) and not options.results:
            raise UserError(f"--{flag} is about --results, of which there are none; give some or leave it out")


if __name__ == "__main__":
    sys.exit(main())
