"""recipes/eval.py --ensemble: results, resuming, processes, and what is refused."""

import shutil

import pytest
from peft import PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, Qwen3NextConfig

from eval_runner import evaluation, files, predictions, run
from heterofusion.zoo import zoo_path
from recipe_runner import contents, error_line, flags

pytest_plugins = ["eval_runner"]
BASES = [zoo_path("llama"), zoo_path("qwen2")]
EXPERTS = [zoo_path("llama", "ner_kitchen"), zoo_path("qwen2", "ner_garden")]


@pytest.fixture(scope="module")
def settings(test_sets) -> dict:
    """Flags of an ensemble, but for the folder."""
    return {
        "model_name_or_path": BASES[0], "ensemble": "gac", "ensemble_models": BASES, "adapters": EXPERTS,
        "dataset_name": [*test_sets.values()], "max_examples": 6, "max_new_tokens": 24, "batch_size": 2,
        "use_cpu": True,
    }  # fmt: skip


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory):
    """An ensemble of two families: its folder and results."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    return folder, run({**settings, "output_dir": folder})


@pytest.fixture
def values(settings, tmp_path) -> dict:
    return {**settings, "output_dir": tmp_path / "out"}


def test_results_are_one_row_of_all_members(whole):
    folder, found = whole
    assert {"results.json", "state.json"} <= {*files(folder)}
    assert (found["name"], found["models_at_inference"], found["needs_task_id"]) == ("gac", 2, False)
    assert [member["adapter"]["name"] for member in found["members"]] == ["ner_kitchen", "ner_garden"]
    made_by = found["made_by"]
    assert (made_by["kind"], made_by["method"], made_by["ran_source_models"]) == ("ensemble", "gac", True)
    assert found["peak_memory_bytes"] > 10**8 and found["tokens_per_second"] > 0
    assert "/" not in str(found["settings"])


def test_two_copies_answer_as_one_model(values, tmp_path):
    expert = {"ensemble_models": None, "adapters": [EXPERTS[0]] * 2}
    both = run(values, **expert, ensemble="unite", unite_top_k=3, names=["twice"])
    single = {**values, "ensemble": None, "ensemble_models": None, "output_dir": tmp_path / "alone"}
    alone = run(single, adapters=[EXPERTS[0]])
    assert both["name"] == "twice"
    for label in both["datasets"]:
        assert predictions(values["output_dir"], label) == predictions(tmp_path / "alone", label)
    assert both["mean"] == alone["mean"] and both["new_tokens"] == alone["new_tokens"]


def test_the_same_ensemble_is_resumed_and_no_other(values, whole, capsys, logging_restored):
    shutil.copytree(whole[0], values["output_dir"])
    before = contents(values["output_dir"])
    for told, changes in {
        "ensemble: gac, this one has unite": {"ensemble": "unite"},
        "members: 2, this one has 3": {"adapters": [*EXPERTS, "none"], "ensemble_models": [*BASES, BASES[0]]},
        "member 2 adapter": {"adapters": [EXPERTS[0], "none"]},
        "base: None": {"ensemble": None, "ensemble_models": None, "adapters": EXPERTS[:1]},
    }.items():
        argv = flags({**values, **changes, "resume": True})
        error_line(capsys, evaluation.main, argv, "holds an evaluation with another", told)
    assert run(values, resume=True) == whole[1]
    assert contents(values["output_dir"]) == before


WRONG = {
    "one member": ({"adapters": EXPERTS[:1], "ensemble_models": BASES[:1]}, ["needs two members", "--adapters has 1"]),
    "numbers": ({"ensemble_models": BASES[:1]}, ["--ensemble_models has 1 values, but --adapters has 2"]),
    "no ensemble": ({"ensemble": None}, ["--ensemble_models is for ensembles", "give --ensemble"]),
    "other base": ({"model_name_or_path": zoo_path("mistral")}, [f"--model_name_or_path {zoo_path('mistral')} among"]),
    "names": ({"names": ["a", "b"]}, ["--names has 2 values for 1 of them"]),
    "room": ({"max_new_tokens": 600}, ["--max_new_tokens 600 leaves no room"]),
    "unfit": ({"ensemble_models": None}, [f"adapter {EXPERTS[1]} does not fit base model {BASES[0]}"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_flags_raise(case, refused):
    changed, words = WRONG[case]
    refused(*words, **changed)


def test_members_that_cannot_be(refused, base_dir, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(BASES[1])
    get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)).save_pretrained(tmp_path)
    refused("puts tokens before the prompt", "name a LoRA adapter", adapters=[EXPERTS[0], tmp_path])
    linear = tmp_path / "linear"
    config = Qwen3NextConfig(vocab_size=64, hidden_size=16, num_hidden_layers=4, intermediate_size=16, num_experts=2)
    config.save_pretrained(linear)
    for path in base_dir.glob("tokenizer*"):
        (linear / path.name).write_bytes(path.read_bytes())
    changes = {"adapters": [EXPERTS[0], "none"], "ensemble_models": [BASES[0], linear]}
    refused("keeps a running state in place of keys and values", linear, **changes)
