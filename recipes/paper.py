"""The paper's experiments (arXiv 2604.01674) on data and experts of one's own, or in miniature on the embedded zoo.

    python recipes/demo/prepare.py && python recipes/paper.py --config recipes/demo/paper.yaml --jobs 2
    python recipes/paper.py --config recipes/uie/paper.yaml --gpus 0 1 2 3     # experiments 1, 2, 3, 5 and 6
    python recipes/paper.py --config recipes/glue/paper.yaml --gpus 0 1 2 3    # experiment 4

Experts are folders FAMILY/TASK in --adapters (recipes/experts.py makes them). Runs that are finished are skipped.
"""

import sys
from collections.abc import Sequence

import pandas as pd

from _paper import NAMES, Expert, Paper, PaperArguments
from heterofusion.experiments.page import Page
from heterofusion.experiments.pictures import draw_curves, draw_scores
from heterofusion.experiments.tables import SCORES_ARE, Row, difference_table, score_frame, score_table
from heterofusion.runtime.program import command, parse_arguments, set_up_logging


def fuse_each(paper: Paper, pairs: Sequence[Expert], anchors: Sequence[str], third: dict[str, str]) -> None:
    """Fusions into each anchor of the one family, the sources of the other one, or of that which a task has."""
    for family, others in pairs:
        for anchor in anchors:
            labels = {"target": family, "anchor": anchor}
            sources = [(third.get(task, others), task) for task in paper.options.tasks if task != anchor]
            paper.score("anchor", family, (family, anchor), **labels)
            for seed in paper.options.seeds:
                fused = paper.fuse((family, anchor), sources, paper.options.tasks, seed)
                paper.score("fused", family, fused, seed, **labels)


def single_source(paper: Paper, options: PaperArguments, target: str, other: str, *_: str) -> None:
    """Experiment 1 (and 4): an anchor of each task, the other family's experts of the others."""
    fuse_each(paper, [(target, other), (other, target)][: 1 + options.both_ways], options.tasks, {})


def multi_source(paper: Paper, options: PaperArguments, target: str, other: str, third: str) -> None:
    """Experiment 2: sources of two families at once, with either of two targets."""
    elsewhere = dict.fromkeys(options.third_tasks, third)
    fuse_each(paper, [(target, other), (other, target)], options.tasks[:1], elsewhere)


def noise(paper: Paper, options: PaperArguments, target: str, other: str, *_: str) -> None:
    """Experiment 3: without and with irrelevant experts of the target's own family."""
    anchor, tasks = (target, options.tasks[0]), options.noise_tasks or options.tasks
    clean = [(other, task) for task in tasks if task != options.tasks[0]]
    paper.score("anchor", target, anchor, tasks=tasks)
    for label, more in (("clean", []), ("noisy", [(target, task) for task in options.irrelevant_tasks])):
        for seed in options.seeds:
            fused = paper.fuse(anchor, [*clean, *more], tasks, seed)
            paper.score("fused", target, fused, seed, tasks, sources=label)


def sensitivity(paper: Paper, options: PaperArguments, target: str, other: str, *_: str) -> None:
    """Experiment 5: experiment 1 on one anchor with other first alphas, and with other shifts of the gate."""
    sources, seed = [(other, task) for task in options.tasks[1:]], options.seeds[0]
    for alpha, mu in [(alpha, 0.1) for alpha in options.alphas] + [(0.3, mu) for mu in options.mus if mu != 0.1]:
        flags = {"alpha_init": alpha, "mu_gate": mu}
        fused = paper.fuse((target, options.tasks[0]), sources, options.tasks, seed, **flags)
        paper.score("fused", target, fused, seed, **flags)


def sequence(paper: Paper, options: PaperArguments, target: str, other: str, third: str) -> None:
    """Experiment 6: the fused adapter is the next target; with fresh hypernetworks, or with those of the first."""
    begun, seed = [task for task in options.tasks if task not in options.third_tasks], options.seeds[0]
    keep = {"save_strategy": "steps", "save_steps": 1_000_000, "save_total_limit": 1}  # the last step alone
    first = paper.fuse((target, options.tasks[0]), [(other, task) for task in begun[1:]], begun, seed, **keep)
    paper.score("first fusion", target, first, seed)
    for start, carried in (("fresh", None), ("carried", first)):
        sources = [(third, task) for task in options.third_tasks]
        second = paper.fuse(first, sources, options.tasks, seed, init_hypernetwork_from=carried)
        paper.score("second fusion", target, second, seed, hypernetworks=start)


EXPERIMENTS = dict(zip(NAMES, (single_source, multi_source, noise, sensitivity, sequence), strict=True))


@command
def main(argv: list[str]) -> None:
    (options,) = parse_arguments((PaperArguments,), argv, __doc__)
    set_up_logging()
    paper, asked = Paper(options), {}
    for name in options.experiments:
        EXPERIMENTS[name](paper, options, *options.families[:3])
        asked[name], paper.rows = paper.rows, []
    paper.runs.wait()
    page = Page(options.output_dir, "The paper's experiments", SCORES_ARE)
    for name, rows in asked.items():
        done = [Row(row, [run.results() or {}], seed, labels) for row, run, seed, labels in rows if run.is_finished]
        if done:
            add_section(page, name, score_frame(done))
    if not options.dry_run:
        print(f"written to {page.write()}")
    paper.runs.finish()


def add_section(page: Page, name: str, frame: pd.DataFrame) -> None:
    """Tables and pictures of an experiment."""
    page.frames.append(frame.assign(experiment=name))
    labels = ("target", "anchor", "sources", "alpha_init", "mu_gate", "hypernetworks")
    by = ["name", *(label for label in labels if label in frame and frame[label].nunique() > 1)]
    page.add(f"## {name}", str(EXPERIMENTS[name].__doc__), score_table(frame, by))
    if "anchor" in set(frame["name"]):
        page.add("Difference to `anchor`, paired by seed; bold: the interval lies on one side of 0.")
        page.add(difference_table(frame, "anchor", by))
    if name != "sensitivity":
        page.add_picture(draw_scores(frame, by), name, f"Scores of {name}")
        return
    for label, other, fixed in (("alpha_init", "mu_gate", "0.1"), ("mu_gate", "alpha_init", "0.3")):
        page.add_picture(draw_curves(frame[frame[other] == fixed], label), f"{name}-{label}", f"Score over {label}")


if __name__ == "__main__":
    sys.exit(main())
