"""Running recipes/eval.py in the tests: the embedded zoo's Llama, small data sets, and what a run leaves.

A plugin of the tests that import its fixtures.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from heterofusion.zoo import make_examples, write_dataset, zoo_path
from recipe_runner import error_line, flags, is_killed, recipe, succeeds

evaluation = recipe("eval")
TASKS = ("ner_kitchen", "re_town")
COUNT = 10


@pytest.fixture(scope="session")
def test_sets(tmp_path_factory) -> dict[str, Path]:
    """Test examples of two tasks, by task."""
    folder = tmp_path_factory.mktemp("eval") / "data"
    return {task: write_dataset(folder / f"{task}.jsonl", make_examples(task, "test", COUNT)) for task in TASKS}


def expert_values(data: Path, output_dir: Path, task: str = "ner_kitchen") -> dict[str, Any]:
    """Flags of an evaluation of one expert on one task."""
    return {
        "model_name_or_path": zoo_path("llama"), "adapters": [zoo_path("llama", task)], "dataset_name": [data],
        "max_new_tokens": 40, "batch_size": 4, "output_dir": output_dir, "use_cpu": True,
    }  # fmt: skip


@pytest.fixture
def values(test_sets, tmp_path) -> dict[str, Any]:
    """Flags of an evaluation of one expert on one task."""
    return expert_values(test_sets["ner_kitchen"], tmp_path / "out")


@pytest.fixture
def refused(values, capsys, logging_restored, monkeypatch):
    """Run an evaluation with some flags changed; it must fail as a user's error does and write nothing."""
    monkeypatch.setattr("heterofusion.experts.expert.load_base", lambda *args: pytest.fail("a base was loaded"))

    def check(*words: object, **changed: object) -> None:
        before = files(values["output_dir"])
        error_line(capsys, evaluation.main, flags({**values, **changed}), *words)
        assert files(values["output_dir"]) == before

    return check


def run(values: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Run an evaluation that must succeed; gives its results.json."""
    values = {**values, **changes}
    succeeds(evaluation.main, flags(values))
    return results(values["output_dir"])


def fails_inside(values: dict[str, Any], **changes: Any) -> None:
    """Run an evaluation that dies of something that is no user's error."""
    is_killed(evaluation.main, flags({**values, **changes}))


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def predictions(folder: Path, label: str = "ner_kitchen") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "predictions" / f"{label}.jsonl").read_text().splitlines()]


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def scores(found: dict[str, Any]) -> dict[str, Any]:
    """Results without what depends on time and processes."""
    changing = ("seconds", "tokens_per_second", "processes", "peak_memory_bytes")
    kept = {key: value for key, value in found.items() if key not in changing}
    kept["datasets"] = {
        label: {key: value for key, value in record.items() if key != "seconds"}
        for label, record in found["datasets"].items()
    }
    return kept
