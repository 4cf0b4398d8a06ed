"""Controls of labels: the same tasks and prompts, answered by somebody who was not chosen for what it knows.

Who would label what is found out as ever; then a control takes the place of the sources that were chosen. Tasks that
the anchor labels stay its own in any control: they are not what the sources contribute.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from scipy.optimize import linear_sum_assignment

from heterofusion.data.labels import ANCHOR
from heterofusion.experts.expert import Expert
from heterofusion.labelling.routing import Routing
from heterofusion.runtime.errors import UserError


def check_bases(sources: Sequence[Expert]) -> None:
    """Check that sources have something that `--control bases` can take from them.

    Raises:
        ValueError: One has not; names it.
    """
    for source in sources:
        if source.adapter is None:
            raise UserError(
                f"--control bases: {source.name} is a base without an adapter, so its base would give the same "
                "labels; give its adapter, or leave the source out"
            )


def with_control(routing: Routing, kind: str, seed: int) -> Routing:
    """A routing with a control in the place of the sources that were chosen.

    - `bases`: the same sources, of which `labellers` then takes the bases alone.
    - `shuffle`: every task gets the sources that were chosen for another one, see `exchange`.
    - `anchor`: the anchor.

    Args:
        routing: The true one.
        kind: One of `heterofusion.data.labels.LABEL_CONTROLS`.
        seed: Of `shuffle`.

    Raises:
        ValueError: No source was chosen for anything, or the sources cannot be exchanged.
    """
    sources = {task: [name for name in names if name != ANCHOR] for task, names in routing.chosen.items()}
    served = {task: names for task, names in sources.items() if names}
    if not served:
        raise UserError(
            f"--control {kind} takes the place of sources, but no source labels any task; leave it out, or lower "
            "--routing_margin"
        )
    if kind == "shuffle":
        others = exchange(served, seed)
    else:
        others = {task: [ANCHOR] if kind == "anchor" else names for task, names in served.items()}
    labelled_by = {
        task: [*others.get(task, []), *(name for name in names if name == ANCHOR and kind != "anchor")]
        if task in served
        else [*names]
        for task, names in routing.chosen.items()
    }
    return replace(routing, control=kind, replaced=labelled_by)


def exchange(served: Mapping[str, Sequence[str]], seed: int) -> dict[str, list[str]]:
    """Give every task the sources of another one, of which none is its own.

    Args:
        served: The sources that were chosen, by task; at least one each.
        seed: Of the choice among all exchanges that are possible.

    Returns:
        The sources by task: those of `served`, permuted.

    Raises:
        ValueError: There is no such permutation; says why.
    """
    tasks = [*served]
    costs = np.random.default_rng(seed).random((len(tasks), len(tasks)))  # (task, task whose sources it gets)
    own = [[bool(set(served[task]) & set(served[other])) for other in tasks] for task in tasks]
    costs[np.array(own, dtype=bool).reshape(costs.shape)] = np.inf
    try:
        _, others = linear_sum_assignment(costs)
    except ValueError as error:  # no assignment is finite
        name, count = Counter(name for names in served.values() for name in names).most_common(1)[0]
        why = "there is no other task" if len(tasks) == 1 else f"source {name} labels {count} of them"
        raise UserError(
            f"--control shuffle: the sources of the {len(tasks)} tasks that have some ({', '.join(tasks)}) cannot be "
            f"exchanged so that every task gets only sources that were not chosen for it: {why}; choose --control "
            "bases or anchor, or give more tasks and sources"
        ) from error
    return {task: [*served[tasks[other]]] for task, other in zip(tasks, others, strict=True)}


def labellers(experts: Mapping[str, Expert], control: str | None) -> dict[str, Expert]:
    """Who answers in the name of anchor and sources when prompts are labelled.

    Args:
        experts: Anchor and sources by name.
        control: `bases` takes the adapters of sources away, and says so in their names.
    """
    if control != "bases":
        return dict(experts)
    return {
        name: expert if name == ANCHOR else replace(expert.without_adapter(), name=f"{name}-base")
        for name, expert in experts.items()
    }
