"""What methods share is made first: what becomes of those that use it, and what it took."""

from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path

from heterofusion.comparison.cases import LABEL
from heterofusion.comparison.plan import Comparison
from heterofusion.comparison.runs import ComparisonRun, making_seconds, read_record
from heterofusion.data.labels import ANCHOR, LABELS_FILE
from heterofusion.publish.record import DISTILLATION_FILE, EXPERT_FILE, MERGE_FILE, PROVENANCE_FILE
from heterofusion.report.fields import Fields
from heterofusion.sweeps import Pool, is_finished, run_all
from heterofusion.sweeps.pool import NOT_RUN, Outcome

_RECORDS = {
    LABEL: LABELS_FILE,
    "expert": EXPERT_FILE,
    "train": PROVENANCE_FILE,
    "merge": MERGE_FILE,
    "distill": DISTILLATION_FILE,
}


def make(runs: Sequence[ComparisonRun], pool: Pool) -> list[Outcome]:
    """Make what methods share: what is made of other things after these, and not at all if one of them is missing.

    Args:
        runs: of `made_runs`.
        pool: where they go.

    Returns:
        What became of each, in the order in which they were started.
    """
    outcomes: list[Outcome] = []
    left = list(runs)
    while left:
        open_folders = {run.folder for run in left}
        wave = [run for run in left if open_folders.isdisjoint(run.needs)]
        outcomes += run_unblocked(wave, runs, pool)
        left = [run for run in left if run not in wave]
    return outcomes


def finished_folders(made: Iterable[ComparisonRun]) -> set[Path]:
    """Folders of what is made, with the flags that it has now, of things that are.

    Args:
        made: of `made_runs`, in its order.
    """
    folders: set[Path] = set()
    for run in made:
        if folders.issuperset(run.needs) and is_finished(run):
            folders.add(run.folder)
    return folders


def run_unblocked(
    runs: Sequence[ComparisonRun], made: Sequence[ComparisonRun], pool: Pool, blocked: Mapping[str, str] | None = None
) -> list[Outcome]:
    """Run those runs whose shared things are there, afresh where one has been made again since.

    Args:
        runs: the runs.
        made: the runs that make what they may need, in the order of `made_runs`.
        pool: where they go.
        blocked: why the runs of a method are not to be run, by its name.

    Returns:
        What became of each, in order.
    """
    there = finished_folders(made)
    reasons = {run.folder: reason for run in runs if (reason := (blocked or {}).get(run.name))}
    for run in runs:
        lacking = [each.title for each in made if each.folder in run.needs and each.folder not in there]
        if lacking:
            reasons.setdefault(run.folder, f"it needs what is not there: {lacking[0]}")
    able = [run for run in runs if run.folder not in reasons]
    for run in able:
        if is_outdated(run, made):  # the mark that a pool leaves of what must not be resumed or skipped
            (run.folder / f"{run.steps[0].recipe}.stale").touch()
    found = {outcome.run.folder: outcome for outcome in run_all(able, pool)} if able else {}
    return [found.get(run.folder) or Outcome(run, NOT_RUN, reason=reasons[run.folder]) for run in runs]


def is_outdated(run: ComparisonRun, made: Iterable[ComparisonRun]) -> bool:
    """Whether a run was begun before something that it uses was made again.

    The times are those of files that a pool leaves beside every step.
    """
    begun = _time(run.folder / f"{run.steps[0].recipe}.yaml")
    ended = [_time(each.folder / f"{each.steps[0].recipe}.done") for each in made if each.folder in run.needs]
    return begun is not None and any(begun < each for each in ended if each is not None)


def _time(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.is_file() else None


def lost_methods(comparison: Comparison, lost: Container[str], why: str) -> dict[str, str]:
    """Methods that have no hyper-parameters, by their names, with the reason.

    Args:
        comparison: the comparison.
        lost: names of methods whose search has not come to an end.
        why: of these.
    """
    searched = {method.name: method.settings_of or method.name for method in comparison.methods}
    return {
        name: f"the hyper-parameters of {of!r} were not searched, {why}" for name, of in searched.items() if of in lost
    }


def runs_sources(run: ComparisonRun) -> bool:
    """Whether making something that methods share ran models of the sources; labels without a record may have."""
    (step,) = run.steps
    if step.recipe != LABEL:
        return step.recipe == "distill"
    path = step.folder / _RECORDS[LABEL]
    tasks = read_record(path).get("tasks", dict) if path.is_file() else None
    return tasks is None or any(source != ANCHOR for task in tasks.values() for source in task["sources"])


def seconds_to_make(run: ComparisonRun) -> float | None:
    """What it took to make something that methods share; None if no record tells of it."""
    (step,) = run.steps
    path = step.folder / _RECORDS[step.recipe]
    if not path.is_file():
        return None
    record = read_record(path)
    if step.recipe != LABEL:
        return making_seconds(record)
    seconds = Fields(record.get("cost", dict, {}), record.where, "cost.").number("seconds", None)
    return None if seconds is None else float(seconds)
