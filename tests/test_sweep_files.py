"""Sweep files: what runs they become, and what is wrong with those that are wrong."""

import re

import pytest
import yaml

from heterofusion.sweeps import Template, read_sweep
from recipe_runner import RECIPES

SWEEP_FILES = sorted(path for path in RECIPES.rglob("*.yaml") if re.search("^eval:", path.read_text(), re.M))


def write(folder, **content):
    path = folder / "table.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def sweep(folder, **changes):
    """A sweep of two anchors and two seeds."""
    content = {
        "output_dir": str(folder / "out"),
        "lists": {"tasks": ["a", "b", "c"]},
        "sweep": {"anchor": ["a", "b"], "seed": [0, 1]},
        "train": {
            "model_name_or_path": "BASE",
            "target_adapter": "llama/{anchor}",
            "source_adapters": [{"for_each": "tasks", "except": "{anchor}", "value": "qwen/{item}"}],
            "dataset_name": [{"for_each": "tasks", "value": "replay/{item}.jsonl"}],
            "seed": "{seed}",
        },
        "eval": {"model_name_or_path": "BASE", "dataset_name": ["a.jsonl"]},
        "references": [{"name": "anchor", "adapters": ["llama/{anchor}"]}],
    }
    return write(folder, **{key: value for key, value in (content | changes).items() if value is not None})


def test_combinations_become_runs_and_equal_references_one(tmp_path):
    runs = read_sweep(sweep(tmp_path))
    assert [run.title for run in runs if run.name == "fused"] == [
        f"table: fused anchor={anchor},seed={seed}" for anchor in "ab" for seed in (0, 1)
    ]
    # the anchor's score does not depend on the seed
    assert [run.title for run in runs if run.name == "anchor"] == ["table: anchor anchor=a", "table: anchor anchor=b"]


def test_flags_of_a_run(tmp_path):
    train, evaluation = read_sweep(sweep(tmp_path))[0].steps
    assert train.flags["source_adapters"] == ["qwen/b", "qwen/c"]
    assert train.flags["dataset_name"] == ["replay/a.jsonl", "replay/b.jsonl", "replay/c.jsonl"]
    assert train.flags["seed"] == 0  # a number stays one
    folder = tmp_path / "out" / "fused" / "anchor=a,seed=0"
    assert train.flags["output_dir"] == str(folder / "adapter")
    assert evaluation.flags["adapters"] == [str(folder / "adapter")]
    assert evaluation.flags["output_dir"] == str(folder / "eval")
    assert evaluation.flags["name"] == "fused"
    assert evaluation.flags["labels"] == ["experiment=table", "anchor=a", "seed=0"]


def test_labelling_is_a_step_of_its_own_before_the_others(tmp_path):
    labels = {
        "source_models": ["BASE"], "source_adapters": ["S/{anchor}"], "dataset_name": ["r.jsonl"],
        "prompts": ["replay"], "routing": "map.yaml",
    }  # fmt: skip
    first = read_sweep(sweep(tmp_path, label=labels))[0]
    assert [step.recipe for step in first.steps] == ["label", "train", "eval"] and first.name == "fused"
    folder = tmp_path / "out" / "fused" / "anchor=a,seed=0"
    assert first.steps[0].folder == folder / "labels" and first.steps[0].flags["source_adapters"] == ["S/a"]
    assert first.steps[2].flags["adapters"] == [str(folder / "adapter")]
    (alone, *_) = read_sweep(sweep(tmp_path, label=labels, train=None, eval=None, references=None))
    assert alone.name == "labels" and [step.recipe for step in alone.steps] == ["label"]
    wrong = sweep(tmp_path, label={**labels, "routing_margin": 2})
    with pytest.raises(ValueError, match=r"label of fused anchor=a,seed=0.*--routing_margin is 2"):
        read_sweep(wrong)


def test_reference_takes_the_flags_of_eval(tmp_path):
    reference = next(run for run in read_sweep(sweep(tmp_path)) if run.name == "anchor")
    (step,) = reference.steps
    assert step.flags["dataset_name"] == ["a.jsonl"] and step.flags["adapters"] == ["llama/a"]
    assert step.flags["labels"] == ["experiment=table", "anchor=a"]


def test_values_that_change_together_have_one_name(tmp_path):
    grid = {"target": [{"name": "x", "other": "y", "extra": ["p", "q"]}, {"name": "y", "other": "x", "extra": []}]}
    train = {
        "model_name_or_path": "{target}/base", "target_adapter": "{target}/a",
        "source_adapters": ["{other}/b", "{extra}"], "dataset_name": ["r.jsonl"],
    }  # fmt: skip
    runs = read_sweep(sweep(tmp_path, sweep=grid, train=train, references=None))
    assert [run.steps[0].flags["source_adapters"] for run in runs] == [["y/b", "p", "q"], ["x/b"]]
    assert [run.variables for run in runs] == [{"target": "x"}, {"target": "y"}]


def test_grids_one_after_the_other_share_runs(tmp_path):
    grids = [{"anchor": ["a"], "seed": [0, 1]}, {"anchor": ["a", "b"], "seed": [0]}]
    titles = [run.title for run in read_sweep(sweep(tmp_path, sweep=grids, references=None))]
    assert titles == [f"table: fused anchor={a},seed={s}" for a, s in (("a", 0), ("a", 1), ("b", 0))]


def test_config_of_a_section_lies_under_its_flags(tmp_path):
    (tmp_path / "common.yaml").write_text("max_steps: 7\nseed: 9\n")
    content = yaml.safe_load(sweep(tmp_path).read_text())
    content["train"]["config"] = "common.yaml"
    flags = read_sweep(write(tmp_path, **content))[0].steps[0].flags
    assert flags["max_steps"] == 7 and flags["seed"] == 0 and "config" not in flags


def test_environment_variables_are_expanded(tmp_path, monkeypatch):
    content = {"model_name_or_path": "${MODEL_ROOT}/x", "dataset_name": ["${NOT_SET_HERE:-data}/a.jsonl"]}
    path = sweep(tmp_path, eval=content, train=None, references=None)
    monkeypatch.setenv("MODEL_ROOT", "/models")
    flags = read_sweep(path)[0].steps[0].flags
    assert flags["model_name_or_path"] == "/models/x" and flags["dataset_name"] == ["data/a.jsonl"]
    monkeypatch.delenv("MODEL_ROOT")
    with pytest.raises(ValueError, match=r"table.yaml, eval names \$\{MODEL_ROOT\}.*MODEL_ROOT is not set"):
        read_sweep(path)


EVAL = {"model_name_or_path": "BASE", "dataset_name": ["a.jsonl"]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"swep": {}}, "unknown keys: swep"),
        ({"train": None, "eval": None, "references": None}, "runs nothing"),
        ({"train": [1]}, "train must be a mapping"),
        ({"sweep": {"anchor": "a"}}, "lists of values"),
        ({"sweep": {"anchor": []}}, "lists of values"),
        ({"sweep": {"anchor": [{"other": "x"}]}}, "has no name"),
        ({"sweep": {"anchor": [["a"]]}}, "make it a mapping with a name"),
        ({"lists": {"tasks": "a"}}, "names to lists"),
        ({"references": [{"adapters": ["x"]}]}, "each with a name"),
        ({"eval": None}, "no eval section"),
        ({"eval": {**EVAL, "batch_sise": 3}}, "eval of fused anchor=a,seed=0 has unknown keys: batch_sise"),
        ({"eval": {**EVAL, "max_new_tokens": "many"}}, "max-new-tokens: invalid int value: 'many'"),
        ({"eval": {**EVAL, "batch_size": "zero"}}, "--batch_size is 'zero'"),
        ({"eval": {**EVAL, "metric": ["nope"]}}, "nope"),
        ({"eval": {"dataset_name": ["a.jsonl"]}}, "required: --model_name_or_path"),
        ({"eval": {**EVAL, "adapters": ["{nothing}"]}}, "no variable nothing; there are: anchor, seed"),
        ({"eval": {**EVAL, "adapters": [{"for_each": "no", "value": "x"}]}}, "for_each names 'no'"),
        ({"eval": {**EVAL, "adapters": [{"for_each": "tasks"}]}}, "goes with value"),
        ({"eval": {**EVAL, "adapters": {"for_each": "tasks", "value": "x"}}}, "must stand in a list"),
        ({"eval": {**EVAL, "config": "nowhere.yaml"}}, "nowhere.yaml does not exist"),
        ({"eval": {**EVAL, "adapters": ["a", "b"]}}, "--name is for one adapter"),
        ({"eval": {**EVAL, "adapters": ["a", "b"], "names": ["a"]}}, "--names has 1 values"),
        ({"expert": {"model_name_or_path": "BASE"}}, "expert and train"),
    ],
)
def test_wrong_file_raises(tmp_path, changes, message):
    with pytest.raises(ValueError, match=r"table\.yaml") as error:
        read_sweep(sweep(tmp_path, **changes))
    assert message in str(error.value)


def test_wrong_flag_of_a_stage_raises(tmp_path):
    content = yaml.safe_load(sweep(tmp_path).read_text())
    content["train"]["stages"] = [{"name": "one", "learning_rate": 1e-3}, {"name": "two", "learning_rat": 1e-3}]
    with pytest.raises(ValueError, match="stage 2 has unknown keys: learning_rat"):
        read_sweep(write(tmp_path, **content))
    content["train"]["stages"] = [{"name": "one", "output_dir": "x"}]
    with pytest.raises(ValueError, match="stage 1 has output_dir, which belongs beside stages"):
        read_sweep(write(tmp_path, **content))


@pytest.mark.parametrize(
    ("labels", "more"), [(None, []), ("machine=x", ["machine=x"]), (["m=x", "n=y"], ["m=x", "n=y"])]
)
def test_labels_of_a_reference_are_added(tmp_path, labels, more):
    path = sweep(tmp_path)
    content = yaml.safe_load(path.read_text())
    content["references"][0]["labels"] = labels
    path.write_text(yaml.safe_dump(content))
    reference = next(run for run in read_sweep(path) if run.name == "anchor")
    assert reference.steps[0].flags["labels"] == ["experiment=table", "anchor=a", *more]


@pytest.mark.parametrize(
    "variables", [{"a": "{a}"}, {"a": ["x{b}"], "b": "{a}"}, {"a": [{"for_each": [1], "value": "{a}"}]}]
)
def test_variable_of_itself_raises(variables):
    with pytest.raises(ValueError, match=r"here: the value of \{a\} has \{a\} itself in it"):
        Template(variables, {}, "here").fill({"flag": ["{a}"]})


def test_loop_may_hide_a_variable_that_is_being_filled():
    loop = [{"for_each": [{"a": "x"}, {"a": "y"}], "value": "{a}!"}]
    assert Template({"a": loop}, {}, "here").fill(["{a}"]) == ["x!", "y!"]


def test_template_remembers_what_it_needed():
    template = Template({"anchor": "a", "seed": 0, "own": [1, 2]}, {"tasks": ["a", "b"]}, "here")
    assert template.fill([{"for_each": "tasks", "except": "{anchor}", "value": "{item}!"}, "{own}"]) == ["b!", 1, 2]
    assert template.used == {"anchor", "own"}
    assert Template({"carry": False}, {}, "here").fill(["carry-{carry}", "{carry}"]) == ["carry-false", False]


@pytest.mark.parametrize("path", SWEEP_FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_shipped_sweeps_are_in_order(path, monkeypatch):
    for name in ("MODEL_ROOT", "ADAPTER_ROOT", "DATA_ROOT"):
        monkeypatch.setenv(name, f"/{name}")
    assert read_sweep(path)


def test_the_papers_experiments_are_shipped(monkeypatch):
    """Number of fusions per experiment, and the sources of one of each that is easily got wrong."""
    for name in ("MODEL_ROOT", "ADAPTER_ROOT", "DATA_ROOT"):
        monkeypatch.setenv(name, f"/{name}")

    def fusions(name):
        return [run for run in read_sweep(RECIPES / name) if run.steps[0].recipe == "train"]

    assert [len(fusions(f"uie/{name}.yaml")) for name in ("single_source", "multi_source", "noise")] == [6, 2, 2]
    assert len(fusions("uie/sensitivity.yaml")) == 18 + 8 and len(fusions("glue/fusion.yaml")) == 10
    qwen = fusions("uie/multi_source.yaml")[1].steps[0].flags
    assert qwen["target_adapter"] == "/ADAPTER_ROOT/Qwen2.5-7B-Instruct/NER_mit-movie"
    assert [name.split("/")[2] for name in qwen["source_adapters"]] == [
        *["Llama-3.1-8B-Instruct"] * 3,
        *["Mistral-7B-Instruct-v0.3"] * 2,
    ]
    clean, noisy = (run.steps[0].flags["source_adapters"] for run in fusions("uie/noise.yaml"))
    assert noisy[: len(clean)] == clean and len(noisy) == len(clean) + 4
    made = {step.flags["output_dir"] for run in read_sweep(RECIPES / "uie/experts.yaml") for step in run.steps}
    for name in ("single_source", "multi_source", "noise", "sensitivity"):
        for run in fusions(f"uie/{name}.yaml"):
            needed = {run.steps[0].flags["target_adapter"], *run.steps[0].flags["source_adapters"]}
            assert needed <= made, needed - made
