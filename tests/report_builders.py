"""Results as recipes/eval.py writes them, for the tests of reports."""

import json
import statistics

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
