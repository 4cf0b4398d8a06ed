"""Comparisons for the tests: recipes that only pretend, and a file of four methods."""

from heterofusion.comparison import plan_comparison

# Stands for a recipe that makes an adapter: what it was asked for lies in the adapter, where a later stub reads it.
MAKER = """
import json, pathlib, sys, yaml
flags = yaml.safe_load(open(sys.argv[2]))
folder = pathlib.Path(flags["output_dir"])
folder.mkdir(parents=True, exist_ok=True)
(folder / "flags.json").write_text(json.dumps(flags))
grid = dict(entry.split("=") for entry in flags.get("search", []))
points = [float(value) for value in grid.get("merge_lambda", "").split(",") if value]
candidates = [{"hyperparameters": {"merge_lambda": p, "density": 0.2}, "mean": 0.5 - abs(p - 0.4)} for p in points]
record = {"search": {"candidates": candidates}, "made_by": {"cost": {"seconds": 7.0}}}
(folder / "merge.json").write_text(json.dumps(record))
if (pathlib.Path(__file__).parent / "broken").exists() and flags.get("seed") == 1:
    sys.exit("error: no memory")
"""
# Stands for recipes/eval.py: best at a learning rate of 0.003, a little better with each seed, worse for controls.
EVAL = """
import json, pathlib, sys, yaml
flags = yaml.safe_load(open(sys.argv[2]))
folder = pathlib.Path(flags["output_dir"])
folder.mkdir(parents=True, exist_ok=True)
made = pathlib.Path(flags["adapters"][0]) / "flags.json"
made = json.loads(made.read_text()) if made.exists() else {}
level = {0.001: 0.5, 0.003: 0.7, 0.01: 0.6}.get(made.get("learning_rate"), 0.2)
level += 0.01 * (made.get("seed") or 0) - (0.1 if made.get("source_control") else 0)
datasets = {
    pathlib.Path(name).stem: {"score": level + 0.1 * place, "examples": 5, "sha256": "ab", "metric": "NER",
                              "primary": "f1", "scores": {"f1": level}, "seconds": 1.0, "new_tokens": 3}
    for place, name in enumerate(flags["dataset_name"])
}
made_by = {"kind": "x", "method": "y", "seed": made.get("seed"), "ran_source_models": False,
           "source_control": made.get("source_control"), "cost": {"seconds": 5.0, "peak_memory_bytes": 3 * 2**30}}
json.dump({
    "name": flags["name"], "labels": {}, "datasets": datasets,
    "mean": sum(d["score"] for d in datasets.values()) / len(datasets), "seconds": 2.0, "new_tokens": 6,
    "tokens_per_second": 3.0, "models_at_inference": 2 if flags.get("ensemble") else 1, "needs_task_id": False,
    "peak_memory_bytes": 2**30, "device": "cpu", "made_by": made_by if made else None,
}, open(folder / "results.json", "w"))
"""
FUSION = {
    "model_name_or_path": "BASE", "target_adapter": "T", "source_adapters": ["S"], "dataset_name": ["r.jsonl"],
    "seed": "{seed}",
}  # fmt: skip


def sections(**changes) -> dict:
    """A comparison of four methods."""
    content = {
        "lists": {"tasks": ["a", "b"]},
        "validation": {"model_name_or_path": "BASE", "dataset_name": ["valid.jsonl"], "dtype": "float32"},
        "test": {
            "model_name_or_path": "BASE",
            "dataset_name": [{"for_each": "tasks", "value": "{item}.jsonl"}],
        },
        "normalize_by": "anchor",
        "gains": [{"name": "source_gain", "row": "fusion", "over": "noise"}],
        "methods": [
            {"name": "anchor", "group": "References", "eval": {"adapters": ["T"]}},
            {
                "name": "arithmetic", "group": "Merging", "recipe": "merge",
                "flags": {"model_name_or_path": "BASE", "adapters": ["T", "S"]},
                "search": {"merge_lambda": [0.2, 0.4, 1.0]},
            },
            {
                "name": "fusion", "group": "Fusion", "about": "the method", "recipe": "train", "flags": FUSION,
                "search": {"learning_rate": [0.001, 0.003, 0.01]},
            },
            {"name": "noise", "group": "Controls", "like": "fusion", "flags": {"source_control": "noise"}},
        ],
    }  # fmt: skip
    return {**content, **changes}


def plan(tmp_path, content=None, seeds=(0, 1, 2), budget=3, only=()):
    return plan_comparison(content or sections(), tmp_path / "x.yaml", tmp_path / "out", seeds, 100, budget, only)


def flags_of(runs, name) -> list[dict]:
    return [run.steps[0].flags for run in runs if run.name == name]


# Stands for recipes/label.py; the file `broken` beside it makes it fail where a routing is given.
LABEL = """
import json, pathlib, sys, yaml
flags = yaml.safe_load(open(sys.argv[2]))
folder = pathlib.Path(flags["output_dir"])
folder.mkdir(parents=True, exist_ok=True)
if (pathlib.Path(__file__).parent / "broken_label").exists() and flags.get("routing"):
    sys.exit("error: no source is good enough")
tasks = {"p": {"sources": {"anchor" if flags.get("anchor_labels") else "qwen": 3}}}
(folder / "labels.json").write_text(json.dumps({"cost": {"seconds": 11.0}, "tasks": tasks}))
"""
LABELS = {
    "recipe": "label",
    "flags": {
        "model_name_or_path": "BASE", "target_adapter": "T", "source_models": ["Q"], "source_adapters": ["S"],
        "dataset_name": "{replay}", "dataset_label": ["p"], "prompts": ["p.jsonl"], "routing": "{routing}",
    },
}  # fmt: skip
EXTRA = {
    "recipe": "expert",
    "flags": {"model_name_or_path": "BASE", "source_labels": ["{labels}/p.jsonl"], "seed": "{seed}"},
}
CASES = [
    {"name": "N=0", "seeds": [0, 1], "replay": [], "routing": "map.yaml"},
    {"name": "N=30", "replay": [{"for_each": ["r"], "value": "{item}.jsonl"}], "routing": None},
]


def sections_with_cases(**changes) -> dict:
    """Two amounts of replay, labels and an expert that are shared, and five methods."""
    content = {
        "lists": {"tasks": ["a", "b"]},
        "validation": {"model_name_or_path": "BASE", "dataset_name": ["valid.jsonl"]},
        "test": {"model_name_or_path": "BASE", "dataset_name": [{"for_each": "tasks", "value": "{item}.jsonl"}]},
        "cases": CASES,
        "search_case": "N=30",
        "made": {"labels": LABELS, "extra": EXTRA},
        "gains": [{"name": "gain", "row": "fusion", "over": "merged"}],
        "methods": [
            {"name": "anchor", "eval": {"adapters": ["T"]}},
            {
                "name": "tuned", "recipe": "expert", "cases": ["N=30"],
                "flags": {"model_name_or_path": "BASE", "dataset_name": "{replay}", "seed": "{seed}"},
            },
            {
                "name": "fusion", "recipe": "train",
                "flags": {**FUSION, "dataset_name": "{replay}", "source_labels": ["{labels}/p.jsonl"]},
                "search": {"learning_rate": [0.001, 0.003, 0.01]},
            },
            {"name": "noise", "like": "fusion", "flags": {"source_control": "noise"}, "cases": ["N=30"]},
            {
                "name": "merged", "recipe": "merge",
                "flags": {"model_name_or_path": "BASE", "adapters": ["T", "{extra}"]},
            },
        ],
    }  # fmt: skip
    return {**content, **changes}


def with_method(name, **changes) -> dict:
    """The methods, with some keys of one replaced."""
    methods = sections_with_cases()["methods"]
    return {"methods": [{**each, **changes} if each["name"] == name else each for each in methods]}
