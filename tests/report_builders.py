"""Results as recipes/eval.py writes them, for the tests of reports."""

import json
import re
import statistics

from heterofusion.report.comparison import parse_comparison
from heterofusion.report.results import parse_result

TASKS = ("ner_kitchen", "re_town")


def content(name="fused", scores=(0.5, 0.7), seed=None, fusion=None, tasks=TASKS, **labels):
    """What recipes/eval.py writes."""
    datasets = {
        task: {
            "metric": task[:2].upper(), "primary": "f1", "score": score,
            "scores": {"f1": score, "precision": score / 2, "num_examples": 100}, "examples": 100,
            "prompts_cut": 0, "new_tokens": 9, "seconds": 1.0, "sha256": "ab",
        }
        for task, score in zip(tasks, scores, strict=True)
    }  # fmt: skip
    settings = {"preset": "paper", "alpha_init": 0.3, "mu_gate": 0.1, "seed": 0, "sources": ["a"], "train_seconds": 40}
    return {
        "name": name,
        "labels": {**labels, **({} if seed is None else {"seed": str(seed)})},
        "base_model": "base",
        "adapter": None,
        "fusion": None if fusion is None else {**settings, **fusion},
        "datasets": datasets,
        "mean": statistics.fmean(scores),
        "seconds": 12.0,
        "device": "cpu",
        "versions": {"torch": "2.13"},
    }


def result(*args, **kwargs):
    made = content(*args, **kwargs)
    return parse_result(made, f"{made['name']}-{made['labels']}", "results x")


def write(folder, *contents):
    for index, made in enumerate(contents):
        (folder / f"{index:02}").mkdir(parents=True)
        (folder / f"{index:02}" / "results.json").write_text(json.dumps(made))
    return folder


def paired_results():
    """Both rows swing with the seed; their difference does not."""
    results = []
    for anchor, level in (("x", 0.3), ("y", 0.5)):
        for seed, swing in enumerate((0.0, 0.1, 0.2)):
            results.append(result("sft", (level + swing, level + swing), seed, anchor=anchor))
            scores = (level + swing + 0.02, level + swing + 0.04)
            results.append(result("fused", scores, seed, anchor=anchor))
    return results


OVER = {
    "text": "noise does little harm",
    "row": {"name": "fused", "experiment": "noise", "case": "noisy"},
    "over": {"name": "fused", "experiment": "noise", "case": "clean"},
}


# ---- comparisons ------------------------------------------------------------------------------------------------

CASES = ["N=0", "N=10", "N=30"]


def row(name, case, means, group="tuned", **more):
    """A row whose data sets are 0.1 below and above its mean."""
    runs = [
        {"seed": seed, "scores": {"a": mean - 0.1, "b": mean + 0.1}, "making_seconds": 1.0, "evaluation_seconds": 1.0}
        for seed, mean in (means if isinstance(means, dict) else dict(enumerate(means))).items()
    ]
    fixed = {"models_at_inference": 1, "needs_task_id": False, "ran_source_models": False, "source_control": None}
    return {"name": name, "case": case, "group": group, "about": f"about {name}", "runs": runs, **fixed, **more}


def comparison(**changes):
    """Two methods in all cases, one without N=0, one that nothing enters, and a control in one case."""
    rows = [
        row("experts", None, {None: 0.8}, group="bounds"),
        row("fusion", "N=0", [0.40, 0.42]),
        row("fusion", "N=10", [0.50, 0.52, 0.51]),
        row("fusion", "N=30", [0.60, 0.70, 0.62]),
        row("tuning", "N=10", [0.30, 0.32, 0.34]),
        row("tuning", "N=30", [0.50, 0.61, 0.55]),
        row("distilling", "N=0", [0.20, 0.22]),
        row("distilling", "N=10", [0.35, 0.36, 0.34]),
        row("distilling", "N=30", [0.40, 0.47, 0.42]),
        row("noise", "N=30", [0.30, 0.42, 0.33], group="controls", source_control="noise"),
    ]
    return {"cases": CASES, "rows": rows, "gains": [], "missing": [], **changes}


def parsed(**changes):
    return parse_comparison(comparison(**changes), "comparison x")


def cells(text, name):
    """Cells of the row of a method, or of the gain of a name, in the first table that has one."""
    return [
        [cell.strip() for cell in line.split("|")[2:-1]]
        for line in text.splitlines()
        if re.match(rf"\| (\*\*)?{re.escape(name)}(\*\*| \|)", line)
    ]


def gain(**keys):
    return {"name": "g", "row": "fusion", **keys}
