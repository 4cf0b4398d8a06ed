"""What results tell of what answered: adapters of one data set each, and what made them."""

import json
import shutil
from types import SimpleNamespace

import pytest

from eval_runner import TASKS, expert_values, predictions, run
from heterofusion.evaluation.results import made_by
from heterofusion.runtime.files import file_sha256
from heterofusion.zoo import zoo_path

pytest_plugins = ["eval_runner"]
EXPERTS = [zoo_path("llama", task) for task in TASKS]


def made(kind: str, method: str, seconds: float | None = 1.0, **more) -> dict:
    cost = {"seconds": seconds, "peak_memory_bytes": 5, "device": "cpu"}
    shared = {"kind": kind, "method": method, "seed": 0, "ran_source_models": False, "source_control": None}
    return {**shared, "cost": cost, **more}


@pytest.fixture
def both(values, test_sets) -> dict:
    """Flags of two experts, each on its own task."""
    sets = [*test_sets.values()]
    return {**values, "adapters": EXPERTS, "dataset_name": sets, "adapter_per_dataset": True, "max_examples": 4}


def test_each_adapter_answers_its_own_data_set(both, test_sets, tmp_path):
    found = run(both, names=["experts"])
    assert (found["name"], found["needs_task_id"], found["models_at_inference"]) == ("experts", True, 1)
    assert found["adapter"] is None
    assert {label: adapter["name"] for label, adapter in found["adapters"].items()} == {task: task for task in TASKS}
    for task in TASKS:
        single = expert_values(test_sets[task], tmp_path / task, task) | {"max_examples": 4}
        assert found["datasets"][task]["score"] == run(single)["datasets"][task]["score"] > 0.5
        assert predictions(both["output_dir"], task) == predictions(tmp_path / task, task)


def test_record_beside_an_adapter_is_taken_over(values, tmp_path):
    """The one that was written for its weights, such as an expert's written over a fusion."""
    adapter = tmp_path / "adapter"
    shutil.copytree(EXPERTS[0], adapter)
    quick = {**values, "adapters": [adapter], "max_examples": 1, "max_new_tokens": 2, "overwrite": True}
    found = run(quick)
    assert (found["made_by"], found["models_at_inference"], found["needs_task_id"]) == (None, 1, False)
    assert found["peak_memory_bytes"] > 10**8
    own = file_sha256(adapter / "adapter_model.safetensors")
    for name, sha256, kind in (("fusion", "0", None), ("expert", own, "expert"), ("fusion", own, "fusion")):
        content = {"made_by": made(name, "m"), "weights_sha256": sha256}
        (adapter / f"{name}.json").write_text(json.dumps(content))
        assert (run(quick)["made_by"] or {}).get("kind") == kind


def test_cost_of_several_runs_adds_up_and_that_of_one_run_does_not(tmp_path):
    """A merge writes an adapter per task in one run; experts are trained in a run each."""

    def told(*records: dict | None) -> dict | None:
        adapters = [SimpleNamespace(folder=tmp_path / str(index), sha256="0") for index, _ in enumerate(records)]
        for adapter, record in zip(adapters, records, strict=True):
            adapter.folder.mkdir(exist_ok=True)
            (adapter.folder / "expert.json").write_text(json.dumps({"made_by": record} if record else {}))
        return made_by(*adapters)

    first = made("tuning", "lora", 3.0)
    second = made("tuning", "lora", 4.0, seed=1, source_control="noise")
    second["cost"]["peak_memory_bytes"] = 9
    assert told(first, first) == first
    both = told(first, second, first)
    assert both["cost"] == {"seconds": 7.0, "peak_memory_bytes": 9, "device": "cpu"}
    assert (both["seed"], both["source_control"]) == (None, "noise")
    resumed = made("tuning", "lora", seed=2, cost={**first["cost"], "resumed_from_step": 3})
    assert told(first, resumed)["cost"]["seconds"] is None
    assert told(first, made("merge", "lora")) is told(first, made("tuning", "other")) is told(first, None) is None
