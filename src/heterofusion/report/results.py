"""Reading what recipes/eval.py wrote: `results.json`, one evaluated model each."""

import logging
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heterofusion.data.files import load_json, read_text
from heterofusion.evaluation.results import RESULTS_FILE
from heterofusion.report.fields import Fields, shown
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.flags import as_text

logger = logging.getLogger(__name__)

MEAN = "mean"
SEED = "seed"
CONTROL = "source_control"
# Of a fusion; rows differ by them even where no label says so.
SETTINGS = ("preset", "alpha_init", "mu_gate", CONTROL)
_OURS = ("name", "labels", "datasets")  # what no other program's results.json has all of


@dataclass(frozen=True)
class DatasetResult:
    """Scores of one data set.

    Attributes:
        metric: name of the metric (NER, cola, ...).
        primary: which of its scores stands for it.
        score: that score.
        scores: all of its scores.
        examples: number of examples.
        sha256: of the data file, if known.
    """

    metric: str
    primary: str
    score: float
    scores: Mapping[str, float]
    examples: int
    sha256: str | None


@dataclass(frozen=True)
class Result:
    """One `results.json`.

    Attributes:
        origin: the file as records name it: below the folder that was searched.
        name: name of the row.
        labels: all labels but the seed.
        seed: label `seed`, else the fusion's; None if neither is there.
        settings: preset, alpha_init and mu_gate of the fusion, and the control in the place of its sources, as text;
            without what there is none of.
        datasets: by name.
        fusion_seconds: of the fusion, if it is known.
        seconds: of the evaluation, if it is known.
        device: what it ran on.
        versions: of the packages.
    """

    origin: str
    name: str
    labels: Mapping[str, str]
    seed: str | None
    settings: Mapping[str, str]
    datasets: Mapping[str, DatasetResult]
    fusion_seconds: float | None
    seconds: float | None
    device: str | None
    versions: Mapping[str, str]

    @property
    def attributes(self) -> dict[str, str]:
        """Settings of the fusion and labels; a label wins."""
        return {**self.settings, **self.labels}

    def score(self, column: str) -> float | None:
        """Score of a data set, or the mean over all of the result's data sets; None if it lacks the data set."""
        if column == MEAN:
            return statistics.fmean(dataset.score for dataset in self.datasets.values())
        return self.datasets[column].score if column in self.datasets else None


def find_results(paths: Sequence[str | Path]) -> list[Result]:
    """Read results from files and from all `results.json` in folders, in the order of the paths and of the names.

    Args:
        paths: files and folders. Of a file that comes twice the second is passed over.

    Returns:
        The results; none without paths.

    Raises:
        ValueError: a path is missing, a folder holds no results, or a file is not of the schema; names it.
    """
    results: dict[Path, Result] = {}
    for given in paths:
        path = Path(given).expanduser().absolute()
        if path.is_dir():
            found = 0
            for file in sorted(path.rglob(RESULTS_FILE), key=lambda file: file.relative_to(path).parts):
                if not file.is_file():
                    continue
                content, label = _load(file)
                if not (isinstance(content, dict) and all(key in content for key in _OURS)):
                    logger.warning("%s was not written by recipes/eval.py; it is passed over", file)
                    continue
                origin = f"{path.name}/{file.relative_to(path).as_posix()}"
                results.setdefault(file.resolve(), parse_result(content, origin, label))
                found += 1
            if not found:
                raise UserError(f"--results {path} holds no {RESULTS_FILE} of recipes/eval.py; name another folder")
        elif path.is_file():
            content, label = _load(path)
            results.setdefault(path.resolve(), parse_result(content, f"{path.parent.name}/{path.name}", label))
        else:
            raise UserError(f"--results {path} does not exist; name a folder or a {RESULTS_FILE} of recipes/eval.py")
    return list(results.values())


def _load(path: Path) -> tuple[Any, str]:
    """Content of a JSON file, and how messages name it."""
    label = f"results {path}"
    return load_json(read_text(path, label), label), label


def parse_result(content: Any, origin: str, where: str) -> Result:
    """Validate the content of a `results.json`.

    Args:
        content: what the file holds.
        origin: name of the file for records.
        where: name of the file for messages.

    Raises:
        ValueError: a field is missing or of another type; names file and field.
    """
    field = Fields(content, where)
    labels = {}
    for name, value in field.get("labels", dict).items():
        if isinstance(value, dict | list) or value is None:
            raise UserError(f"{where}: labels.{name} is {shown(value)}; text or a number was expected")
        labels[str(name)] = as_text(value)
    fusion = field.get("fusion", dict, None)
    fused = Fields(fusion or {}, where, "fusion.")
    made_by = Fields(field.get("made_by", dict, None) or {}, where, "made_by.")
    recorded = {name: fused.get(name, (str, int, float), None) for name in SETTINGS if name != CONTROL}
    recorded[CONTROL] = made_by.get(CONTROL, str, None)
    settings = {name: as_text(value) for name, value in recorded.items() if value is not None}
    seed = labels.pop(SEED, None)
    if seed is None:
        of_fusion = fused.get("seed", int, None)
        seed = None if of_fusion is None else str(of_fusion)
    datasets = {
        name: _dataset(Fields(entry, where, f"datasets.{name}."))
        for name, entry in field.get("datasets", dict).items()
    }
    if not datasets:
        raise UserError(f"{where}: datasets is empty; evaluate on at least one data set")
    if MEAN in datasets:
        raise UserError(f"{where}: a data set is called {MEAN!r}, like the mean over all; give it another label")
    return Result(
        origin=origin,
        name=field.get("name", str),
        labels=labels,
        seed=seed,
        settings=settings,
        datasets=datasets,
        fusion_seconds=fused.number("train_seconds", None),
        seconds=field.number("seconds", None),
        device=field.get("device", str, None),
        versions={str(name): str(version) for name, version in field.get("versions", dict, {}).items()},
    )


def _dataset(field: Fields) -> DatasetResult:
    scores = field.get("scores", dict)
    return DatasetResult(
        metric=field.get("metric", str),
        primary=field.get("primary", str),
        score=float(field.number("score")),
        scores={name: float(value) for name, value in scores.items() if isinstance(value, int | float)},
        examples=field.get("examples", int),
        sha256=field.get("sha256", str, None),
    )
