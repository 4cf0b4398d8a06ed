"""Data sets with the right answers: their flags, samples and metrics."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from heterofusion.data.files import Records
from heterofusion.evaluation.arguments import EvalDataArguments
from heterofusion.evaluation.metrics import choose_metric, score
from heterofusion.experts.examples import Examples, Prompts, load_examples
from heterofusion.runtime.errors import UserError


@dataclass(frozen=True)
class EvalSet(Examples):
    """Examples whose answers are scored."""

    metric: str  # one of `heterofusion.evaluation.metrics.METRICS`

    def identity(self) -> dict[str, Any]:
        """What must be the same for predictions to be of the same examples."""
        return {"sha256": self.sha256, **self.sample}


def load_eval_sets(args: EvalDataArguments) -> list[EvalSet]:
    """Load and sample the data sets, in order, and choose their metrics."""
    sets = []
    for spec, label, wanted in zip(args.specs(), args.labels(), args.metrics(), strict=True):
        examples = load_examples(spec, label, args.dataset_seed)
        metric = choose_metric(wanted, _kinds(examples.records), examples.records.label)
        sets.append(EvalSet(**vars(examples), metric=metric))
    return sets


def check_references(examples: EvalSet, prompts: Prompts) -> None:
    """Refuse references that the metric cannot score, before anything is generated."""
    try:
        score(examples.metric, prompts.references, prompts.references)
    except UserError as error:
        raise UserError(f"{examples.records.label}: {error}") from error


def _kinds(records: Records) -> Iterator[dict[str, Any]]:
    """The columns that tell the metric, of all records: a file of several kinds is refused whatever the sample."""
    if isinstance(records.rows, list):
        yield from records.rows
        return
    names = [name for name in ("kind", "task") if name in records.rows.column_names]
    for row in records.rows.select_columns(names) if names else [{}]:
        yield dict(row)
