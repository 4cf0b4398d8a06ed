"""From results and fused adapters to the report's files: Markdown, JSON and pictures."""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from heterofusion.data.files import load_json, read_text
from heterofusion.data.markdown import markdown_table
from heterofusion.method.diagnostics import DIAGNOSTICS_FILE
from heterofusion.report.claims import Finding
from heterofusion.report.comparison import ComparisonTable, comparison_section
from heterofusion.report.comparison_picture import comparison_drawings
from heterofusion.report.document import (
    as_json,
    claim_numbers,
    claims_table,
    group_numbers,
    group_section,
    group_title,
    link,
    provenance_sentence,
    score_name,
    slug,
)
from heterofusion.report.fusion import Fusion, read_fusion
from heterofusion.report.fusion_pictures import (
    draw_alignment,
    draw_attention,
    draw_delta_ratio,
    draw_gate_sparsity,
)
from heterofusion.report.results import MEAN
from heterofusion.report.rows import Group
from heterofusion.report.score_pictures import draw_curve, draw_score_map, draw_scores
from heterofusion.report.sensitivity import find_curves
from heterofusion.report.training import TRAINER_STATE_FILE, draw_training, read_history
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.files import display_name, staging_folder

REPORT_FILE, NUMBERS_FILE, PICTURES = "report.md", "report.json", "pictures"
MOST_BARS = 10  # rows that bars can still tell apart
_STAGING = ".report-"


@dataclass(frozen=True)
class FusedAdapter:
    """What the pictures of a fused adapter are drawn from.

    Attributes:
        name: last part of its path, or more of it where two have the same.
        fusion: the diagnostics, if they are there.
        history: the log of its training, if it is there.
    """

    name: str
    fusion: Fusion | None
    history: Sequence[dict[str, Any]] | None


@dataclass
class Report:
    """What a report is made of.

    Attributes:
        title: its heading.
        intro: text below the heading.
        command: the command that made the results or the report.
        group_by: the label that makes one table each.
        groups: the tables.
        baseline: row to which differences are shown.
        details: whether all scores of the metrics are told.
        findings: claims and what was found.
        adapters: fused adapters that are drawn.
        comparisons: methods side by side; they come first.
    """

    title: str
    group_by: str = "experiment"
    groups: Sequence[Group] = ()
    intro: str = ""
    command: str = ""
    baseline: str | None = None
    details: bool = False
    findings: Sequence[Finding] = ()
    adapters: Sequence[FusedAdapter] = field(default_factory=list)
    comparisons: Sequence[ComparisonTable] = ()


def read_adapters(folders: Sequence[str | Path]) -> list[FusedAdapter]:
    """Read diagnostics and training logs beside fused adapters.

    Raises:
        ValueError: a folder is missing or has neither, or a file is not as it should be; names it.
    """
    adapters: list[FusedAdapter] = []
    paths = list(dict.fromkeys(Path(given).expanduser().resolve() for given in folders))
    for folder, name in zip(paths, _adapter_names(paths), strict=True):
        if not folder.is_dir():
            raise UserError(f"--adapters {folder} is no folder; name the output_dir of a fusion")
        known = [name for name in (DIAGNOSTICS_FILE, TRAINER_STATE_FILE) if (folder / name).is_file()]
        if not known:
            raise UserError(
                f"--adapters {folder} holds neither {DIAGNOSTICS_FILE} nor {TRAINER_STATE_FILE}; name the output_dir "
                "of a fusion, and fuse again if it is of an earlier version"
            )
        fusion = read_fusion(folder) if DIAGNOSTICS_FILE in known else None
        history = read_history(folder) if TRAINER_STATE_FILE in known else None
        adapters.append(FusedAdapter(name, fusion, history))
    return adapters


def _adapter_names(paths: Sequence[Path]) -> list[str]:
    """As many last parts of the paths as it takes to tell them apart; a sweep calls all its adapters the same."""
    names: list[str] = []
    for depth in range(1, 1 + max((len(path.parts) for path in paths), default=0)):
        names = ["/".join(map(display_name, path.parts[-depth:])) for path in paths]
        if len({slug(name) for name in names}) == len(names):
            break
    return names


def check_output(folder: str | Path, file: str | Path | None, overwrite: bool) -> tuple[Path, Path]:
    """Check that a report may be written, before anything is read.

    Args:
        folder: the output folder.
        file: the Markdown file if it is not in the folder.
        overwrite: whether the folder may hold something and the file may be there.

    Returns:
        Full paths of the folder and of the Markdown file.

    Raises:
        ValueError: a path is of the wrong kind, or something is there and `overwrite` is not set.
    """
    path = Path(folder).expanduser().absolute()
    if path.exists() and not path.is_dir():
        raise UserError(f"--output_dir {path} is a file; name a folder")
    if path.is_dir() and any(not entry.name.startswith(_STAGING) for entry in path.iterdir()) and not overwrite:
        raise UserError(f"--output_dir {path} is not empty; name another folder, or add --overwrite true")
    if file is None:
        return path, path / REPORT_FILE
    document = Path(file).expanduser().absolute()
    if document.is_dir():
        raise UserError(f"--output_file {document} is a folder; name a file")
    if document.exists() and not overwrite:
        raise UserError(f"--output_file {document} exists; name another file, or add --overwrite true")
    return path, document


def write_report(report: Report, folder: Path, document: Path) -> list[str]:
    """Write `report.json`, `pictures/` and the Markdown.

    All is made beside its place and then moved there, `report.json` last; pictures that an earlier `report.json` in
    the folder lists go, other files stay.

    Args:
        report: what it is made of.
        folder: the output folder, as `check_output` gave it.
        document: the Markdown file, as `check_output` gave it.

    Returns:
        Names of the pictures.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    old = _pictures_before(folder)
    with staging_folder(folder, _STAGING) as staging:
        drawn = _Pictures(staging, folder / PICTURES, document.parent)
        text, numbers = _compose(report, drawn)
        (staging / REPORT_FILE).write_text(text, encoding="utf-8")
        (staging / NUMBERS_FILE).write_text(as_json(numbers), encoding="utf-8")
        (folder / NUMBERS_FILE).unlink(missing_ok=True)
        for path in old:
            path.unlink(missing_ok=True)
        (folder / PICTURES).mkdir(exist_ok=True)
        for name in drawn.names:
            os.replace(staging / name, folder / PICTURES / name)
        document.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(staging / REPORT_FILE, document)  # which may be on another file system
        os.replace(staging / NUMBERS_FILE, folder / NUMBERS_FILE)
    return drawn.names


class _Pictures:
    """Pictures of one report: where they are drawn, and how the document links to them."""

    def __init__(self, staging: Path, place: Path, document_folder: Path) -> None:
        self.staging, self.place, self.document_folder = staging, place, document_folder
        self.names: list[str] = []
        self.bar = tqdm(desc="Drawing", unit=" pictures", delay=3)

    def draw(self, name: str, title: str, function: Callable[[Path], Any]) -> tuple[str, str]:
        """Draw one; gives its title and Markdown target. A name that is taken gets a number."""
        stem, number = name, 2
        while f"{name}.png" in self.names:
            name, number = f"{stem}-{number}", number + 1
        file = f"{name}.png"
        function(self.staging / file)
        self.names.append(file)
        self.bar.update()
        return title, link((self.place / file).as_posix(), self.document_folder.as_posix())


def _compose(report: Report, drawn: _Pictures) -> tuple[str, dict[str, Any]]:
    """The Markdown and the numbers; draws the pictures."""
    parts = [f"# {report.title}"]
    if report.intro:
        parts.append(report.intro)
    results = [result for group in report.groups for result in group.results]
    if results or report.comparisons:
        parts.append(provenance_sentence(results, report.comparisons))
    if report.command:
        parts.append(f"Made by\n\n```bash\n{report.command.strip()}\n```")
    for index, table in enumerate(report.comparisons, start=1):
        name = "comparison" if len(report.comparisons) == 1 else f"comparison-{index}"
        parts.append(_comparison_section(table, name, drawn))
    if report.findings:
        parts += [
            "## What the paper claims, and what this shows",
            "Differences are paired by seed. **agrees** and **contradicts**: the whole 95% interval lies on that side "
            "of what is claimed. **undecided**: it does not, or there is one seed only.",
            claims_table(report.findings),
        ]
    for group in report.groups:
        pictures = _score_pictures(report, group, drawn)
        parts.append(group_section(group, report.group_by, report.baseline, report.details, pictures, "##"))
    for adapter in report.adapters:
        parts.append(_adapter_section(adapter, drawn))
    drawn.bar.close()
    numbers = {
        "title": report.title,
        "groups": [group_numbers(group, report.group_by, report.baseline) for group in report.groups],
        "claims": [claim_numbers(finding) for finding in report.findings],
        "adapters": [adapter.name for adapter in report.adapters],
        "comparisons": [table.content for table in report.comparisons],
        "pictures": drawn.names,
    }
    return "\n\n".join(parts) + "\n", numbers


def _comparison_section(table: ComparisonTable, name: str, drawn: _Pictures) -> str:
    pictures: dict[str | None, list[tuple[str, str]]] = {}
    for drawing in comparison_drawings(table, "mean score"):
        file = name if drawing.case is None else f"{name}-{slug(drawing.case)}"
        pictures.setdefault(drawing.case, []).append(drawn.draw(file, drawing.title, drawing.draw))
    of_all = pictures.pop(None, [])
    return comparison_section(table, of_all, "##", {case: shown for case, shown in pictures.items() if case})


def _score_pictures(report: Report, group: Group, drawn: _Pictures) -> list[tuple[str, str]]:
    """Curves of what was varied, and bars or a map of the rows that are in no curve."""
    name = slug(group.value or "results")
    unit = score_name(group)
    title = group_title(group, report.group_by)
    curves = find_curves(group)
    pictures = []
    if not curves or len(group.rows) <= MOST_BARS:
        columns = [*group.columns, MEAN] if len(group.columns) > 1 else list(group.columns)
        scores: dict[str, dict[str, float]] = {}
        halves: dict[str, dict[str, float | None]] = {}
        for row in group.rows:
            found = {column: row.estimate(column, group.columns) for column in columns}
            text = group.text(row, report.group_by)
            scores[text] = {column: each.mean for column, each in found.items() if each is not None}
            halves[text] = {column: each.half_width for column, each in found.items() if each is not None}
        if len(scores) <= MOST_BARS:
            label = f"{unit}, mean and 95% interval" if any(any(half.values()) for half in halves.values()) else unit
            draw = lambda path: draw_scores(scores, columns, path, label, halves)  # noqa: E731
        else:
            draw = lambda path: draw_score_map(scores, columns, path, f"{unit}, mean over seeds")  # noqa: E731
        pictures.append(drawn.draw(f"scores-{name}", f"Scores, {title}", draw))
    for curve in curves:
        pictures.append(
            drawn.draw(
                f"sensitivity-{name}-{slug(curve.setting)}",
                f"Score against {curve.setting}, {title}; grey band: 95% interval of the mean",
                lambda path, curve=curve: draw_curve(curve, path, unit),  # type: ignore[misc]
            )
        )
    return pictures


def _adapter_section(adapter: FusedAdapter, drawn: _Pictures) -> str:
    parts = [f"## The fusion {adapter.name}"]
    name = slug(adapter.name)
    pictures = []
    if adapter.fusion is None:
        parts.append(f"There is no {DIAGNOSTICS_FILE} beside this adapter: its alignment cannot be shown.")
    else:
        fusion = adapter.fusion
        rows = [[index, source, layers] for index, (source, layers) in enumerate(fusion.sources, start=1)]
        parts += [
            f"Target {fusion.target} with {fusion.layers} layers, {len(fusion.modules)} aligned modules.",
            markdown_table(["source", "adapter", "layers"], rows),
        ]
        for kind, title, draw in (
            ("alignment", "Which source layer feeds which target layer", draw_alignment),
            ("attention", "Attention by source and layer", draw_attention),
            ("gates", "Closed gates by layer and role", draw_gate_sparsity),
            ("update", "Size of the update by layer and role", draw_delta_ratio),
        ):
            pictures.append(
                drawn.draw(
                    f"{name}-{kind}",
                    f"{title}, {adapter.name}",
                    lambda path, draw=draw, fusion=fusion: draw(fusion, path),  # type: ignore[misc]
                )
            )
    history = adapter.history
    if history is None:
        parts.append(f"There is no {TRAINER_STATE_FILE} beside this adapter: its training cannot be shown.")
    else:
        draw_history = lambda path: draw_training(history, path)  # noqa: E731
        pictures.append(drawn.draw(f"{name}-training", f"Training curves, {adapter.name}", draw_history))
    return "\n\n".join(parts + [f"![{title}]({target})" for title, target in pictures])


def _pictures_before(folder: Path) -> list[Path]:
    """Pictures that an earlier report in the folder lists."""
    path = folder / NUMBERS_FILE
    if not path.exists():
        return []
    numbers = load_json(read_text(path, f"report {path}"), f"report {path}")
    names = numbers.get("pictures") if isinstance(numbers, dict) else None
    if not isinstance(names, list) or any(not isinstance(n, str) or n != os.path.basename(n) for n in names):
        raise UserError(f"{path} was not written by recipes/report.py; name another --output_dir")
    return [folder / PICTURES / name for name in names]
