"""What results tell of what answered: adapters of one data set each, what made them, results of several runs."""

import json
import shutil

import pytest

from eval_runner import (
    TASKS,
    Killed,
    evaluation,
    expert_values,
    fails_inside,
    files,
    predictions,
    results,
    run,
    scores,
)
from heterofusion.evaluation.results import common_made_by, join_results, results_table
from heterofusion.experts.generation import AnswerGenerator
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.files import file_sha256
from heterofusion.zoo import zoo_path
from recipe_runner import error_line, flags

pytest_plugins = ["eval_runner"]
EXPERTS = [zoo_path("llama", task) for task in TASKS]


def made_by(kind: str, method: str, seconds: float = 1.0) -> dict:
    return {"kind": kind, "method": method, "seed": 0, "cost": {"seconds": seconds}}


@pytest.fixture
def both(values, test_sets) -> dict:
    """Flags of two experts, each on its own task."""
    return {
        **values, "adapters": EXPERTS, "dataset_name": [*test_sets.values()], "adapter_per_dataset": True,
        "max_examples": 4,
    }  # fmt: skip


@pytest.fixture(scope="module")
def alone(test_sets, tmp_path_factory) -> dict:
    """Each of the two on its own: folder and results by task."""
    found = {}
    for task in TASKS:
        folder = tmp_path_factory.mktemp(task) / "out"
        values = expert_values(test_sets[task], folder, task) | {"max_examples": 4}
        found[task] = folder, run(values)
    return found


# ---- adapters of one data set each ------------------------------------------------------------------------------


def test_each_adapter_answers_its_own_data_set(both, alone):
    found = run(both, name="experts")
    assert (found["name"], found["needs_task_id"], found["models_at_inference"]) == ("experts", True, 1)
    assert found["adapter"] is None
    assert {label: adapter["name"] for label, adapter in found["adapters"].items()} == {task: task for task in TASKS}
    for task in TASKS:
        folder, single = alone[task]
        assert predictions(both["output_dir"], task) == predictions(folder, task)
        assert found["datasets"][task]["score"] == single["datasets"][task]["score"] > 0.5
    assert files(both["output_dir"]) == [
        "predictions/ner_kitchen.jsonl", "predictions/re_town.jsonl", "results.json", "state.json"
    ]  # fmt: skip


def test_interrupted_row_goes_on_with_the_adapter_that_is_missing(both, monkeypatch, capsys, logging_restored):
    """Of three batches, one is of the second adapter; another order of the adapters is another evaluation."""
    generate = AnswerGenerator._generate
    sizes: list[int] = []

    def killed(self, prompts, config, choice):
        if len(sizes) == 3:
            raise Killed
        sizes.append(len(prompts))
        return generate(self, prompts, config, choice)

    monkeypatch.setattr(AnswerGenerator, "_generate", killed)
    both["batch_size"] = 2
    fails_inside(both)
    argv = flags({**both, "adapters": EXPERTS[::-1], "resume": True})
    error_line(capsys, evaluation.main, argv, "another rows ner_kitchen adapter")
    monkeypatch.undo()
    resumed = run(both, resume=True)
    folder = both["output_dir"].with_name("again")
    expected = run({**both, "output_dir": folder})
    assert scores(resumed) == scores(expected)
    assert all(predictions(both["output_dir"], task) == predictions(folder, task) for task in TASKS)


def test_flags_of_a_row_with_an_adapter_per_data_set(both, capsys, logging_restored):
    for words, changes in {
        "--adapters has 1 values, but --dataset_name has 2": {"adapters": EXPERTS[:1]},
        "--names names adapters, but --adapter_per_dataset": {"names": ["a", "b"]},
        "does not exist": {"adapters": [EXPERTS[0], "no/such"]},
    }.items():
        error_line(capsys, evaluation.main, flags({**both, **changes}), words)
    assert not both["output_dir"].exists()


# ---- what made an adapter ---------------------------------------------------------------------------------------


def test_record_beside_an_adapter_is_taken_over(values, tmp_path, capsys, logging_restored):
    adapter = tmp_path / "adapter"
    shutil.copytree(EXPERTS[0], adapter)
    quick = {**values, "adapters": [adapter], "max_examples": 1, "max_new_tokens": 2, "overwrite": True}
    found = run(quick)
    assert (found["made_by"], found["models_at_inference"], found["needs_task_id"]) == (None, 1, False)
    assert found["peak_memory_bytes"] > 10**8
    for name in ("expert.json", "merge.json"):  # the first of the kinds of records counts
        (adapter / name).write_text(json.dumps({"made_by": made_by(name, "m")}))
        assert run(quick)["made_by"] == made_by(name, "m")
    (adapter / "merge.json").write_text("{")
    assert evaluation.main(flags(quick)) == 0
    assert results(values["output_dir"])["made_by"] is None
    told = capsys.readouterr().err
    assert "merge.json is not JSON" in told and "results do not tell" in told


def test_record_of_other_weights_tells_nothing(values, tmp_path):
    """A fusion's record that an expert's run wrote over the weights of."""
    adapter = tmp_path / "adapter"
    shutil.copytree(EXPERTS[0], adapter)
    fusion = {"made_by": made_by("fusion", "f"), "method": {"preset": "paper"}, "sources": []}
    quick = {**values, "adapters": [adapter], "max_examples": 1, "max_new_tokens": 2, "overwrite": True}
    own = file_sha256(adapter / "adapter_model.safetensors")
    for sha256, kind in ((own, "fusion"), ("0", None)):
        (adapter / "fusion.json").write_text(json.dumps({**fusion, "weights_sha256": sha256}))
        found = run(quick)
        assert ((found["made_by"] or {}).get("kind"), bool(found["fusion"])) == (kind, kind is not None)
    (adapter / "expert.json").write_text(json.dumps({"made_by": made_by("tuning", "lora"), "weights_sha256": own}))
    found = run(quick)
    assert found["made_by"]["kind"] == "tuning" and found["fusion"] is None


def test_adapters_of_one_method_have_its_record(both, tmp_path):
    adapters = []
    for number, expert in enumerate(EXPERTS):
        adapters.append(tmp_path / f"adapter-{number}")
        shutil.copytree(expert, adapters[-1])
        (adapters[-1] / "merge.json").write_text(json.dumps({"made_by": made_by("merge", "emr")}))
    quick = {**both, "adapters": adapters, "max_examples": 1, "max_new_tokens": 2, "overwrite": True}
    assert run(quick)["made_by"] == made_by("merge", "emr")
    (adapters[1] / "merge.json").write_text(json.dumps({"made_by": made_by("merge", "ties")}))
    assert run(quick)["made_by"] is None


def test_cost_of_several_runs_adds_up_and_that_of_one_run_does_not():
    """A merge writes an adapter per task in one run; experts are trained in a run each."""
    first = {**made_by("tuning", "lora", 3.0), "ran_source_models": False, "source_control": None}
    first["cost"] |= {"peak_memory_bytes": 5, "device": "cpu"}
    second = {**first, "seed": 1, "source_control": "noise"}
    second["cost"] = {"seconds": 4.0, "peak_memory_bytes": 9, "device": "cpu"}
    assert common_made_by([first, first]) == first
    both = common_made_by([first, second, first])
    assert both["cost"] == {"seconds": 7.0, "peak_memory_bytes": 9, "device": "cpu"}
    assert (both["seed"], both["source_control"]) == (None, "noise")
    unknown = {**first, "cost": {"seconds": None, "resumed_from_step": 3}}
    assert common_made_by([first, unknown])["cost"] == {
        "seconds": None, "peak_memory_bytes": 5, "device": None, "resumed_from_step": 3
    }  # fmt: skip
    assert common_made_by([first, None]) is None


# ---- joined results ---------------------------------------------------------------------------------------------


def test_joined_results_are_one_row(alone):
    parts = [alone[task][1] for task in TASKS]
    joined = join_results(parts)
    assert joined["datasets"] == {**parts[0]["datasets"], **parts[1]["datasets"]}
    assert joined["mean"] == pytest.approx((parts[0]["mean"] + parts[1]["mean"]) / 2)
    assert joined["seconds"] == pytest.approx(parts[0]["seconds"] + parts[1]["seconds"])
    assert joined["new_tokens"] == parts[0]["new_tokens"] + parts[1]["new_tokens"]
    assert joined["tokens_per_second"] == pytest.approx(joined["new_tokens"] / joined["seconds"], rel=0.01)
    assert joined["peak_memory_bytes"] == max(part["peak_memory_bytes"] for part in parts)
    assert (joined["name"], joined["labels"]) == (parts[0]["name"], parts[0]["labels"])
    assert (joined["needs_task_id"], joined["models_at_inference"]) == (True, 2)
    assert (joined["adapter"], joined["base_model"]) == (None, "base")
    assert [part["datasets"] for part in joined["parts"]] == [["ner_kitchen"], ["re_town"]]
    assert [part["adapter"]["name"] for part in joined["parts"]] == [*TASKS]
    assert joined.keys() == parts[0].keys() | {"parts"}
    other = {**parts[1], "base_model": "other", "made_by": made_by("merge", "emr")}
    assert join_results([parts[0], other])["base_model"] is None
    assert join_results([{**parts[0], "made_by": other["made_by"]}, other])["made_by"] == other["made_by"]


def test_results_of_the_same_data_set_cannot_be_joined(alone):
    part = alone["ner_kitchen"][1]
    with pytest.raises(UserError, match="have the data set 'ner_kitchen'; join disjoint ones only"):
        join_results([part, part])


def test_a_table_calls_a_control_what_it_is():
    result = {"datasets": {"a": {"score": 0.5}}, "mean": 0.5, "seconds": 1.0, "tokens_per_second": 2.0}
    told = results_table(
        [
            {**result, "name": "copied", "made_by": {"source_control": "noise, seed 42"}},
            {**result, "name": "fused", "made_by": None},
        ]
    )
    assert "| copied (CONTROL: noise, seed 42) |" in told and "| fused |" in told
