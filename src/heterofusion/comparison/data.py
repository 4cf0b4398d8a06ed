"""Data of a comparison: what hyper-parameters are chosen by and what is reported stay apart, and are one for all."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from heterofusion.comparison.gains import Gain
from heterofusion.data.files import SUFFIXES
from heterofusion.evaluation.datasets import EvalDataArguments
from heterofusion.labelling.tasks import REPLAY
from heterofusion.report.fields import Fields
from heterofusion.runtime.errors import UserError
from heterofusion.sweeps import Run, Step
from heterofusion.sweeps.runs import listed

_TRAINING = ("train", "expert", "distill", "label")  # recipes whose data sets are trained on, or answered for that


def check_apart(searching: Sequence[Run], reported: Sequence[Run], where: str, made: Sequence[Run] = ()) -> None:
    """Refuse test data that something is chosen by or trained on, and validation data that is trained on.

    Prompts that source experts answer count as trained on, and so do their answers.

    Args:
        searching: the runs that hyper-parameters are chosen by.
        reported: the runs that are reported.
        where: names the comparison file in messages.
        made: the runs that make what methods share.

    Raises:
        UserError: names the data set.
    """
    # a merge scores what it searches; in what is reported, it may print other scores beside those of the table
    searched_by_itself = [run for run in (*made, *reported) if any(step.flags.get("search") for step in run.steps)]
    validation = _read_by(searching, ("eval", "merge")) | _read_by(searched_by_itself, ("merge",))
    stopping = {name for run in (*searching, *made, *reported) for step in run.steps for name in _evaluated(step)}
    test = _read_by(reported, ("eval",))
    training = _read_by((*searching, *made), _TRAINING)
    pairs = (
        (test, validation, "hyper-parameters are chosen by test data"),
        (test, stopping, "a training is evaluated, and may be stopped or its best step chosen, by test data"),
        (test, training | _read_by(reported, _TRAINING), "something is trained on test data"),
        (validation, training, "hyper-parameters are chosen by data that is trained on"),
    )
    for left, right, what in pairs:
        common = sorted(left & right)
        if common:
            raise UserError(f"{where}: {what}: {common[0]}; give it other data")


def check_datasets(gains: Iterable[Gain], reported: Iterable[Run], where: str) -> None:
    """Check that all rows are scored on the same data sets, and that the one of a gain is among them.

    Args:
        gains: the gains.
        reported: the runs that are reported.
        where: names the comparison file in messages.

    Raises:
        UserError: names the method or the gain, and the data sets.
    """
    scored: dict[str, dict[tuple[str, ...], list[str]]] = {}  # by method and place of the row
    for run in reported:
        for step in [step for step in run.steps if step.recipe == "eval"]:
            given = listed(step.flags.get("dataset_label")) or None
            data = EvalDataArguments(dataset_name=listed(step.flags.get("dataset_name")), dataset_label=given)
            row = tuple(f"{key}={value}" for key, value in run.variables.items() if key != "part")
            scored.setdefault(run.name, {}).setdefault(row, []).extend(data.labels())
    known: dict[str, set[str]] = {}
    for name, rows in scored.items():
        for labels in rows.values():
            twice = [label for label, count in Counter(labels).items() if count > 1]
            if twice:
                raise UserError(f"{where}, method {name!r}: it is scored on {twice[0]} twice; correct its parts")
            known.setdefault(name, set(labels))
            first = next(iter(known))
            if set(labels) != known[first]:
                raise UserError(
                    f"{where}, method {name!r}: it is scored on {', '.join(labels)}, but {first!r} on "
                    f"{', '.join(sorted(known[first]))}; all rows must be scored on the same data sets"
                )
    for gain in gains:
        there = known.get(gain.row, set())
        if gain.dataset is not None and gain.dataset not in there:
            raise UserError(
                f"{where}, gain {gain.name!r}: dataset is {gain.dataset!r}, which {gain.row!r} is not scored on; "
                f"there is {', '.join(sorted(there))}"
            )


def _read_by(runs: Iterable[Run], recipes: Sequence[str]) -> set[str]:
    return {name for run in runs for step in run.steps if step.recipe in recipes for name in _data_sets(step)}


def _data_sets(step: Step) -> Iterator[str]:
    """What a step reads: files by their full paths, other data sets with configuration and split."""
    default = "train" if step.recipe in _TRAINING else "test"
    stages = [{**step.flags, **stage} for stage in step.flags.get("stages") or []]
    for flags in stages or [step.flags]:  # those of a sequence have data of their own
        names = listed(flags.get("dataset_name"))
        configs = listed(flags.get("dataset_config")) or ["default"]
        splits = listed(flags.get("dataset_split")) or [default]
        for index, name in enumerate(names):
            config, split = (values[index if len(values) > 1 else 0] for values in (configs, splits))
            yield _data_set(name, config, split)
        for name in listed(flags.get("source_labels")):
            folder = Path(name).expanduser()
            yield from (os.path.realpath(path) for path in folder.glob("*") if path.suffix.lower() in SUFFIXES)
            yield _data_set(name, "default", default)
    if step.recipe == "label":
        prompts = listed(step.flags.get("prompts"))
        yield from (_data_set(name, "default", default) for name in prompts if prompts != [REPLAY])


def _evaluated(step: Step) -> Iterator[str]:
    """The data sets that a training is evaluated on while it goes on."""
    stages = [{**step.flags, **stage} for stage in step.flags.get("stages") or []]
    for flags in (stages or [step.flags]) if step.recipe in _TRAINING else []:
        splits = listed(flags.get("eval_split")) or ["test"]
        configs = listed(flags.get("eval_config")) or ["default"]
        for index, name in enumerate(listed(flags.get("eval_dataset_name"))):
            config, split = (values[index if len(values) > 1 else 0] for values in (configs, splits))
            yield _data_set(name, config, split)


def _data_set(name: str, config: str, split: str) -> str:
    path = Path(name).expanduser()
    if path.is_file() or path.suffix.lower() in SUFFIXES:
        return os.path.realpath(path)
    return f"{name} {config} {split}"


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
                raise UserError(
                    f"{each.where} and {where} are of different data sets {name} (sha256, examples: {content}, "
                    f"{found}): the file has changed between them; remove the folder of the older one, and run again"
                )
