"""Data of a comparison: what hyper-parameters are chosen by and what is reported stay apart, and are one for all."""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from heterofusion.cli import UsageError
from heterofusion.report.fields import Fields
from heterofusion.sweeps import Run, Step
from heterofusion.sweeps.runs import listed

_TRAINING = ("train", "expert", "distill")  # recipes whose data sets are trained on


def check_apart(searching: Sequence[Run], reported: Sequence[Run], where: str) -> None:
    """Refuse test data that something is chosen by or trained on, and validation data that is trained on.

    Args:
        searching: the runs that hyper-parameters are chosen by.
        reported: the runs that are reported.
        where: names the comparison file in messages.

    Raises:
        UsageError: names the data set.
    """
    # a merge scores what it searches; in what is reported, it may print other scores beside those of the table
    validation, test = _read_by(searching, ("eval", "merge")), _read_by(reported, ("eval",))
    training = _read_by(searching, _TRAINING)
    pairs = (
        (test, validation, "hyper-parameters are chosen by test data"),
        (test, training | _read_by(reported, _TRAINING), "something is trained on test data"),
        (validation, training, "hyper-parameters are chosen by data that is trained on"),
    )
    for left, right, what in pairs:
        common = sorted(left & right)
        if common:
            raise UsageError(f"{where}: {what}: {common[0]}; give it other data")


def _read_by(runs: Iterable[Run], recipes: Sequence[str]) -> set[str]:
    return {name for run in runs for step in run.steps if step.recipe in recipes for name in _data_sets(step)}


def _data_sets(step: Step) -> Iterator[str]:
    """What a step reads: files by their full paths, other data sets with configuration and split."""
    names = listed(step.flags.get("dataset_name"))
    configs = listed(step.flags.get("dataset_config")) or ["default"]
    splits = listed(step.flags.get("dataset_split")) or ["train" if step.recipe in _TRAINING else "test"]
    for index, name in enumerate(names):
        path = Path(os.path.expanduser(name))
        if path.is_file() or path.suffix.lower() in (".json", ".jsonl", ".csv", ".parquet"):
            yield os.path.realpath(path)
        else:
            yield " ".join([name, *(values[index if len(values) > 1 else 0] for values in (configs, splits))])


def check_same_data(results: Iterable[Fields]) -> None:
    """Refuse results of data sets that have the same name but not the same content.

    Args:
        results: contents of `results.json` files.

    Raises:
        ValueError: names the data set and two of the files.
    """
    first: dict[str, tuple[Any, str]] = {}
    for each in results:
        for name, entry in each.get("datasets", dict).items():
            content = (entry.get("sha256"), entry.get("examples"))
            found, where = first.setdefault(name, (content, each.where))
            if found != content:
                raise ValueError(
                    f"{each.where} and {where} are of different data sets {name} (sha256, examples: {content}, "
                    f"{found}): the file has changed between them; remove the folder of the older one, and run again"
                )
