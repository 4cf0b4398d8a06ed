"""The training data of a run from its flags: replay, source labels, or a mixture of both, with what is recorded."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainingArguments

from heterofusion.data.labels import SourceLabelArguments, SourceLabels, build_labels, labels_record, labels_summary
from heterofusion.data.replay import DataArguments, build_replay, examples_sha256
from heterofusion.runtime.errors import UserError
from heterofusion.training.checkpoints import first_difference, shorten
from heterofusion.training.mixture import Mixture

# Gives source labels their soft labels: the examples with them, plain values for the record, and a line for the log.
AddSoftLabels = Callable[
    [SourceLabels, SourceLabelArguments, PreTrainedTokenizerBase], tuple[Dataset, dict[str, Any], str]
]


@dataclass(frozen=True)
class TrainingData:
    """What a run trains on.

    Attributes:
        examples: a data set, or with source labels a mixture.
        parts: the data sets that it is made of.
        replay_record: plain values about the replay; empty without.
        labels_record: the same about the source labels; None without.
        summary: what became of each part, as lines for the log by what they are of.
    """

    examples: Dataset | Mixture
    parts: tuple[Dataset, ...]
    replay_record: dict[str, Any]
    labels_record: dict[str, Any] | None
    summary: Mapping[str, list[str]]

    @property
    def state(self) -> dict[str, Any]:
        """See `data_state`."""
        return data_state(self.replay_record, self.labels_record)


def build_training_data(
    data: DataArguments,
    labels: SourceLabelArguments,
    tokenizer: PreTrainedTokenizerBase,
    args: TrainingArguments,
    add_soft_labels: AddSoftLabels,
    kind: str = "replay",
) -> TrainingData:
    """Load, sample and tokenize replay and source labels.

    Args:
        data: flags of the replay.
        labels: flags of the source labels.
        tokenizer: of the model that is trained; not changed.
        args: of the training, for the length of an epoch.
        add_soft_labels: called with `--label_loss soft`, all ranks together: soft labels are made above this module.
        kind: what messages call the replay, as in `build_replay`.

    Raises:
        ValueError: a flag, a file or a record is not what it has to be, or there is neither; says what to do.
    """
    if not labels.source_labels:
        replay, made, lines = _replay(data, tokenizer, kind)
        return TrainingData(replay, (replay,), made, None, {kind: lines})
    parts: list[Dataset] = []
    record: dict[str, Any] = {}
    summary: dict[str, list[str]] = {}
    if data.dataset_name:
        replay, record, lines = _replay(data, tokenizer, kind)
        parts, summary = [replay], {kind: lines}
    found = build_labels(labels, data, tokenizer)
    labelled, soft_record, soft_weight, soft_lines = found.examples, None, None, []
    if labels.label_loss == "soft":
        labelled, soft_record, line = add_soft_labels(found, labels, tokenizer)
        soft_weight, soft_lines = labels.soft_weight, [line]
    mixture = Mixture(parts[0] if parts else [], labelled, labels.replay_fraction, soft_weight)
    length = len(mixture.sampler(args, args.train_batch_size))
    summary["source labels"] = [
        *labels_summary(found.reports, data.max_length),
        *soft_lines,
        f"an epoch is {length} examples, {float(mixture.share):.1%} of them replay",
    ]
    made = labels_record(found, labels, float(mixture.share), soft_record)
    return TrainingData(mixture, (*parts, labelled), record, made, summary)


def _replay(
    data: DataArguments, tokenizer: PreTrainedTokenizerBase, kind: str
) -> tuple[Dataset, dict[str, Any], list[str]]:
    """The replay, what is recorded of it, and what became of it in lines."""
    replay, report = build_replay(data, tokenizer, kind)
    return replay, {**report.to_dict(), "sha256": examples_sha256(replay)}, report.summary()


# ---- a run that goes on ------------------------------------------------------------------------------------------


def data_state(replay_record: Mapping[str, Any], labels_record: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a checkpoint tells of the training data, so that no run goes on with others.

    Args:
        replay_record: plain values about the replay; empty without.
        labels_record: the same about the source labels; None without.
    """
    labels = None if labels_record is None else dict(labels_record)
    share = labels.pop("replay_fraction", None) if labels else None
    # the share comes last: where nobody asked for one it follows from the rest, and what differs there is to be named
    state: dict[str, Any] = json.loads(
        json.dumps({"source_labels": labels, "replay": replay_record, "replay_fraction": share})
    )
    return state


def check_data_state(where: Path, found: Any, wanted: Mapping[str, Any]) -> None:
    """Refuse to go on with other training data, or another use of it.

    Args:
        where: what is gone on with.
        found: the `data_state` there; None if it was trained without the recipes, which record it.
        wanted: that of this run.

    Raises:
        ValueError: names the first thing that differs.
    """
    if isinstance(found, Mapping) and found != wanted:
        name, there, here = first_difference("", dict(found), dict(wanted))
        raise UserError(
            f"{where} was trained with another {name.removeprefix('.')}: {shorten(there)}, this run has "
            f"{shorten(here)}; resume with the same data and flags, or start in a new output_dir"
        )
