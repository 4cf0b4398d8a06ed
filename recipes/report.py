"""One report of any evaluations and fusions: tables with intervals over seeds, differences, and pictures.

    python recipes/report.py --results outputs/eval --adapters outputs/fused --output_dir outputs/report --baseline sft

Reads every results.json of recipes/eval.py in the folders. Results that agree in name and in all labels but the seed
make one row; there is one table per value of the label --group_by. Writes report.md, scores.csv and pictures.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from heterofusion.data.files import load_json, read_text
from heterofusion.evaluation.results import row_name
from heterofusion.experiments.page import Page
from heterofusion.experiments.pictures import draw_curves, draw_scores
from heterofusion.experiments.tables import NO_SEED, SCORES_ARE, Row, difference_table, score_frame, score_table
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.flags import flag
from heterofusion.runtime.program import command, parse_arguments, set_up_logging


@dataclass
class ReportArguments:
    """What is read, how it is arranged, and where it goes."""

    output_dir: str = flag(help="Folder for report.md, scores.csv and pictures.")
    results: list[str] = flag(default_factory=list, help="Files results.json, and folders that are searched for them.")
    adapters: list[str] = flag(default_factory=list, help="Fused adapters whose fusion and training are drawn.")
    title: str = flag("Results", help="Heading of the report.")
    intro: str = flag("", help="Text below the heading, in Markdown.")
    group_by: str = flag("experiment", help="Label whose values make one table each.")
    baseline: str | None = flag(None, help="Name of the row that differences are shown to.")

    def __post_init__(self) -> None:
        if not (self.results or self.adapters):
            raise UserError("there is nothing to report; give --results or --adapters")


def read_rows(folders: list[str]) -> list[Row]:
    """Rows of all `results.json` in folders, by the names and labels that the evaluations were given."""
    rows = []
    for folder in map(Path, folders):
        paths = [folder] if folder.is_file() else sorted(folder.rglob("results.json"))
        if not paths:
            raise UserError(f"--results {folder} holds no results.json; name the output_dir of evaluations")
        for path in paths:
            content = load_json(read_text(path, f"results {path}"), f"results {path}")
            if not isinstance(content, dict) or not {"name", "datasets", "seconds"} <= content.keys():
                raise UserError(f"results {path} is no result of recipes/eval.py; leave it out")
            labels = dict(content.get("labels") or {})
            seed = labels.pop("seed", None) or (content.get("made_by") or {}).get("seed")
            rows.append(Row(row_name(content), [content], NO_SEED if seed is None else int(seed), labels))
    return rows


def add_group(page: Page, title: str, frame: pd.DataFrame, labels: list[str], baseline: str | None) -> None:
    """Tables and pictures of the rows that belong together."""
    by = ["name", *(label for label in labels if frame[label].nunique() > 1)]
    page.add(*([f"## {title}"] if title else []), SCORES_ARE, score_table(frame, by))
    slug = "".join(letter if letter.isalnum() else "-" for letter in title) or "all"
    if baseline in set(frame["name"]):
        page.add(f"Difference to `{baseline}`, paired by seed and shared labels; bold: not undecided.")
        page.add(difference_table(frame, str(baseline), by))
    page.add_picture(draw_scores(frame, by), f"scores-{slug}", f"Scores {title}".strip())
    for label in by[1:]:
        values = pd.to_numeric(frame[label], errors="coerce")
        if values.notna().all() and values.nunique() >= 3:
            page.add_picture(draw_curves(frame, label), f"{label}-{slug}", f"Mean score over {label}")


@command
def main(argv: list[str]) -> None:
    (options,) = parse_arguments((ReportArguments,), argv, __doc__)
    set_up_logging(hold=True)
    rows = read_rows(options.results)
    names = sorted({row.name for row in rows})
    if options.baseline is not None and options.baseline not in names:
        raise UserError(f"--baseline {options.baseline!r} is no row of the results; there is {', '.join(names)}")
    page = Page(options.output_dir, options.title, options.intro)
    if rows:
        frame = score_frame(rows)
        page.frames.append(frame)
        labels = [
            name for name in dict.fromkeys(name for row in rows for name in row.labels) if name != options.group_by
        ]
        groups = frame.groupby(options.group_by, sort=False) if options.group_by in frame else [("", frame)]
        for title, part in groups:
            add_group(page, str(title), part, labels, options.baseline)
    page.add_fusions(options.adapters)
    document = page.write()
    print("\n\n".join(page.parts[2:3]))
    print(f"written to {document}")


if __name__ == "__main__":
    sys.exit(main())
