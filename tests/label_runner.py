"""Running recipes/label.py in the tests: experts of the embedded zoo, small replays, prompts without answers.

A plugin of the tests that import its fixtures.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from heterofusion.zoo import make_examples, write_dataset, zoo_path
from recipe_runner import flags, is_killed, recipe, succeeds

label = recipe("label")
TASKS = ("ner_garden", "re_market", "ner_kitchen")  # of the two sources, and the anchor's own
COUNT = 4


@pytest.fixture(scope="session")
def label_data(tmp_path_factory) -> Path:
    """Replays, and prompts in three forms: alone, beside wrong answers, and beside right ones."""
    folder = tmp_path_factory.mktemp("label")
    for task in TASKS:
        write_dataset(folder / "replay" / f"{task}.jsonl", make_examples(task, "replay", COUNT))
        write_dataset(folder / "truth" / f"{task}.jsonl", make_examples(task, "unlabelled", COUNT))
    prompts = {task: make_examples(task, "unlabelled", COUNT) for task in TASKS}
    alone = [{"prompt": e["prompt"]} for e in prompts["ner_garden"]]
    write_dataset(folder / "prompts" / "ner_garden.jsonl", alone)
    wrong = [{**e, "completion": " nonsense"} for e in prompts["re_market"]]
    write_dataset(folder / "prompts" / "re_market.jsonl", wrong)
    write_dataset(folder / "prompts" / "ner_kitchen.jsonl", prompts["ner_kitchen"])
    return folder


def label_values(data: Path, output_dir: Path) -> dict[str, Any]:
    """Flags of a labelling by a Qwen2 and a Mistral expert."""
    return {
        "model_name_or_path": zoo_path("llama"),
        "target_adapter": zoo_path("llama", "ner_kitchen"),
        "source_models": [zoo_path("qwen2"), zoo_path("mistral")],
        "source_adapters": [zoo_path("qwen2", "ner_garden"), zoo_path("mistral", "re_market")],
        "dataset_name": [data / "replay" / f"{task}.jsonl" for task in TASKS],
        "prompts": [data / "prompts" / f"{task}.jsonl" for task in TASKS],
        "max_new_tokens": 40,
        "batch_size": COUNT,
        "output_dir": output_dir,
        "use_cpu": True,
    }


@pytest.fixture(scope="session")
def whole(label_data, tmp_path_factory) -> tuple[dict[str, Any], Path, dict[str, Any]]:
    """A labelling with soft labels: flags, folder and labels.json. Tests that change it work on a copy."""
    values = label_values(label_data, tmp_path_factory.mktemp("whole") / "out")
    return values, values["output_dir"], run_label(values, top_k_logits=4)


# Fixtures of a plugin are seen by all tests of a process: a name that another plugin has, too, would be either's.
@pytest.fixture
def labelling(label_data, tmp_path) -> dict[str, Any]:
    return label_values(label_data, tmp_path / "out")


def run_label(values: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Run a labelling that must succeed; gives its labels.json."""
    values = {**values, **changes}
    succeeds(label.main, flags(values))
    return json.loads((Path(values["output_dir"]) / "labels.json").read_text())


def label_killed(values: dict[str, Any], **changes: Any) -> None:
    """Run a labelling that dies of something that is no user's error."""
    is_killed(label.main, flags({**values, **changes}))


def read_labels(folder: Path, task: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{task}.jsonl").read_text().splitlines()]
