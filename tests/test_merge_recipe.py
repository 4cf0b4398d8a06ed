"""recipes/merge.py as a program: what it writes, scores and searches, its flags, its errors."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from builders import LLAMA_ROLES, WEIGHTS, input_ids, lora_folder, tiny_model, write_adapter
from conftest import GOLDEN, restored_logging
from eval_runner import TASKS, evaluation, results
from heterofusion import load_adapter
from heterofusion.merging.rules import RULES
from heterofusion.zoo import zoo_path
from recipe_runner import contents, copy_adapter, error_line, flags, recipe, same_weights, save_tokenizer, succeeds

pytest_plugins = ["eval_runner"]

merge = recipe("merge")
BASE, EXPERTS = zoo_path("llama"), [zoo_path("llama", task) for task in TASKS]


@pytest.fixture
def values(tmp_path):
    """Flags of a merge of two experts of the zoo."""
    return {
        "model_name_or_path": BASE, "adapters": EXPERTS, "method": "task_arithmetic", "device": "cpu",
        "output_dir": tmp_path / "out",
    }  # fmt: skip


@pytest.fixture
def scored(values, test_sets):
    """The same, scored on ten examples of each task."""
    return {**values, "dataset_name": [test_sets[task] for task in TASKS], "max_new_tokens": 40, "batch_size": 10}


@pytest.fixture
def refused(values, capsys, logging_restored, monkeypatch):
    """Run a merge with some flags changed; it must fail as a user's error does, load no base and write nothing."""
    monkeypatch.setattr("heterofusion.experts.expert.load_base", lambda *args: pytest.fail("a base was loaded"))

    def check(*words, **changed):
        output = Path({**values, **changed}["output_dir"])
        before = contents(output)
        error_line(capsys, merge.main, flags({**values, **changed}), *words)
        assert contents(output) == before

    return check


def run(values, **changes):
    """Run a merge that must succeed; gives its folder and, unless it is of emr, merge.json."""
    values = {**values, **changes}
    succeeds(merge.main, flags(values))
    folder = Path(values["output_dir"])
    return folder, None if values["method"] == "emr" else record_of(folder)


def record_of(folder):
    return json.loads((folder / "merge.json").read_text())


def logits(base, adapter, ids):
    """Logits of an adapter on a base that is left without it."""
    model = PeftModel.from_pretrained(base, str(adapter))
    with torch.no_grad():
        found = model(input_ids=ids).logits
    model.unload()
    base.__dict__.pop("peft_config", None)
    return found


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny Llama and three experts made by PEFT: of other ranks, with rsLoRA, on other modules; a tokenizer."""
    root = tmp_path_factory.mktemp("tiny")
    model = tiny_model("llama")
    model.save_pretrained(root / "base")
    save_tokenizer(root / "base", prefix="v", size=128)
    names = {"base": "owner/tiny-llama"}
    experts = [
        lora_folder(model, root / "all", list(LLAMA_ROLES), 3, lora_alpha=8, seed=1, std=0.2, **names),
        lora_folder(model, root / "rslora", ["q_proj", "v_proj"], 5, use_rslora=True, seed=2, std=0.2, **names),
        lora_folder(
            model, root / "upper", ["q_proj", "up_proj"], 2, layers_to_transform=[1], seed=3, std=0.2,
            dtype=torch.bfloat16, **names,
        ),
    ]  # fmt: skip
    save_tokenizer(experts[0], size=128)
    return {"model_name_or_path": root / "base", "adapters": experts, "device": "cpu"}


def test_a_merge_is_that_of_pefts_cat(tiny, tmp_path):
    """PEFT stacks too; of all its combinations this one is exact. It takes experts on the same modules only."""
    experts = tiny["adapters"]
    weights = [1.0, -0.5]
    values = {**tiny, "adapters": experts[:2], "weights": weights, "merge_lambda": 0.6, "output_dir": tmp_path / "out"}
    folder, record = run(values, method="task_arithmetic")
    reference = PeftModel.from_pretrained(tiny_model("llama"), str(experts[0]), adapter_name="a")
    reference.load_adapter(str(experts[1]), adapter_name="b")
    reference.add_weighted_adapter(["a", "b"], [0.6 * weight for weight in weights], "both", combination_type="cat")
    reference.set_adapter("both")
    ids = input_ids(2, 9)
    with torch.no_grad():
        expected = reference(input_ids=ids).logits
    torch.testing.assert_close(logits(tiny_model("llama"), folder, ids), expected, atol=1e-5, rtol=1e-5)
    assert record["truncation"]["lost"] == 0 and record["truncation"]["rank"] == 8
    assert record["hyperparameters"] == {"merge_lambda": 0.6}
    assert [expert["weight"] for expert in record["adapters"]] == weights


def test_experts_on_other_modules_become_one_adapter_of_exactly_these(tiny, tmp_path):
    """The merge of one expert, the others with weight 0, answers as that expert does."""
    ids = input_ids(2, 9)
    values = {**tiny, "merge_lambda": 1.0, "dtype": "float32", "output_dir": tmp_path / "out", "overwrite": True}
    for index, method in enumerate(("task_arithmetic", "ties", "knots_ties")):
        weights = [float(i == index) for i in range(3)]
        folder, _ = run(values, method=method, weights=weights, density=1.0 if index else None)
        expected = logits(tiny_model("llama"), tiny["adapters"][index], ids)
        torch.testing.assert_close(logits(tiny_model("llama"), folder, ids), expected, atol=2e-5, rtol=1e-4)


def test_files_and_record(tiny, tmp_path):
    folder, record = run(tiny, method="dare_ties", seed=7, rank=4, output_dir=tmp_path / "out")
    own = json.loads((tiny["adapters"][0] / "tokenizer.json").read_text())  # the base's has other words
    assert json.loads((folder / "tokenizer.json").read_text())["model"] == own["model"]
    merged = load_adapter(folder)
    assert all(module.scaling == 1 and module.rank <= 4 for module in merged.modules.values())
    assert {module.lora_A.dtype for module in merged.modules.values()} == {torch.float32}  # experts differ
    assert record["weights_sha256"] == merged.sha256
    assert [expert["sha256"] for expert in record["adapters"]] == [load_adapter(e).sha256 for e in tiny["adapters"]]
    assert record["hyperparameters"] == {"merge_lambda": 1.0, "drop_rate": 0.5, "density": 0.2}
    assert 0 < record["truncation"]["lost"] < 1
    made_by = record["made_by"]
    assert (made_by["kind"], made_by["method"], made_by["seed"]) == ("merge", "dare_ties", 7)
    card = (folder / "README.md").read_text()
    assert "dare_ties" in card and "seed 7" in card and f"{record['truncation']['lost']:.2%}" in card
    assert made_by["source_control"] is None and "CONTROL" not in card
    for path, content in contents(folder).items():
        for place in (tmp_path, tiny["model_name_or_path"].parent):
            assert str(place).encode() not in (content or b""), path


def test_a_merge_of_controls_is_one(tiny, tmp_path):
    """Unless the record lies beside other weights than those that it was written for."""
    adapters = [copy_adapter(tmp_path / f"expert{index}", folder) for index, folder in enumerate(tiny["adapters"])]
    controls = {0: "noise", 1: "labels:bases", 2: "noise"}
    for index, kind in controls.items():
        sha256 = load_adapter(adapters[index]).sha256 if index < 2 else "0" * 64
        record = {"weights_sha256": sha256, "made_by": {"source_control": kind}}
        (adapters[index] / "expert.json").write_text(json.dumps(record))
    folder, record = run(tiny, adapters=adapters, method="ties", output_dir=tmp_path / "out")
    assert record["made_by"]["source_control"] == "noise+labels:bases"
    assert "# CONTROL (noise+labels:bases): Merged LoRA adapter" in (folder / "README.md").read_text()


def test_one_expert_alone_scores_as_it_does(scored, tmp_path):
    _, record = run(scored, weights=[1.0, 0.0], merge_lambda=1.0, dense=True)
    own = {"adapters": [EXPERTS[0]], "output_dir": tmp_path / "eval", "use_cpu": True, "method": None, "device": None}
    succeeds(evaluation.main, flags({**scored, **own}))
    expected = {label: record["score"] for label, record in results(tmp_path / "eval")["datasets"].items()}
    for found in (record["validation"]["adapter"], record["validation"]["dense"]):
        assert {label: scores["score"] for label, scores in found.items()} == expected
    assert expected["ner_kitchen"] > 0.8 > expected["re_town"]
    assert record["metrics"] == {f"eval_{label}": score for label, score in expected.items()}


def test_a_search_keeps_the_best(scored, capsys):
    with restored_logging():
        code = merge.main(flags({**scored, "method": "ties", "search": ["lambda=0.6:1.0:0.4", "density=0.2,1"]}))
    assert code == 0
    assert "| merge_lambda | density | ner_kitchen | re_town | mean |" in capsys.readouterr().out
    folder = scored["output_dir"]
    record = record_of(folder)
    search = record["search"]
    tried = [candidate["hyperparameters"] for candidate in search["candidates"]]
    assert tried == [{"merge_lambda": a, "density": b} for b in (0.2, 1.0) for a in (0.6, 1.0)]
    means = [candidate["mean"] for candidate in search["candidates"]]
    assert search["chosen"] == means.index(max(means)) and len(set(means)) > 1
    assert record["hyperparameters"] == tried[search["chosen"]]
    again, _ = run(scored, method="ties", output_dir=folder.parent / "alone", **record["hyperparameters"])
    assert same_weights(folder / WEIGHTS, again / WEIGHTS)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"adapters": EXPERTS[:1]}, ["--adapters names 1", "two experts"]),
        ({"adapters": [EXPERTS[0], EXPERTS[0]]}, ["have the same weights", "--weights"]),
        ({"adapters": [EXPERTS[0], zoo_path("qwen2", "re_town")]}, ["heterofusion-zoo/qwen2", "recipes/train.py"]),
        ({"density": 0.2}, ["--density 0.2: the hyper-parameters of task_arithmetic are --merge_lambda"]),
        ({"method": "dare", "drop_rate": 1}, ["--drop_rate is 1.0"]),
        ({"weights": [0, 0]}, ["--weights is [0.0, 0.0]"]),
        ({"method": "emr", "names": ["a", "a"]}, ["same name 'a'", "--names"]),
        ({"search": ["lambda=0.1,0.2"]}, ["on validation data", "--dataset_name"]),
        ({"output_dir": EXPERTS[0], "overwrite": True}, ["is the folder of adapter"]),
        ({"output_dir": BASE.parent, "overwrite": True, "method": "emr"}, ["is the folder of adapter"]),
        ({"merge_lambda": 1e6, "dtype": "float16"}, ["is not finite", "torch.float16", "--dtype float32"]),
        ({"output_dir": BASE}, ["exists and is not empty", "--overwrite true"]),
    ],
)
def test_bad_flags_raise(refused, changed, words):
    refused(*words, **changed)


def test_what_depends_on_the_machine_the_data_and_the_experts_raises(refused, monkeypatch, test_sets, tmp_path):
    data = {"dataset_name": [test_sets["re_town"]]}
    refused("adapters of emr need the task", "recipes/eval.py", method="emr", **data)
    other = write_adapter(tmp_path / "other", {"model.layers.0.self_attn.q_proj": (64, 80)}, seed=9)
    refused("maps 80 to 80 features", "64 to 80", "recipes/train.py", adapters=[EXPERTS[0], other])
    head = {"base_model.model.lm_head.weight": torch.zeros(4, 80)}
    saved = {"modules_to_save": ["lm_head"]}
    other = copy_adapter(tmp_path / "head", str(EXPERTS[1]), saved, lambda weights: weights.update(head))
    refused("base_model.model.lm_head.weight besides LoRA", adapters=[EXPERTS[0], other])
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused("runs in one process")


@pytest.mark.parametrize("method", RULES)
def test_every_method_writes_what_peft_loads(method, base_dir, tmp_path):
    names = ["target_llama", "target_llama_2"]
    other = copy_adapter(tmp_path / names[1], str(GOLDEN / names[0]), tensors=shuffle)
    values = {"model_name_or_path": base_dir, "adapters": [GOLDEN / names[0], other], "output_dir": tmp_path / "out"}
    folder, _ = run(values, method=method, names=names if method == "emr" else None, device="cpu")
    parts = [folder / name for name in names] if method == "emr" else [folder]
    base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    ids = input_ids(2, 8) % 64
    with torch.no_grad():
        plain = base(input_ids=ids).logits
    for part in parts:
        assert load_adapter(part).modules.keys() == load_adapter(other).modules.keys()
        assert not torch.allclose(logits(base, part, ids), plain, atol=1e-4)
        assert record_of(part)["needs_task_id"] is (method == "emr")
        assert ("task must be known at inference" in (part / "README.md").read_text()) is (method == "emr")


def shuffle(weights):
    generator = torch.Generator().manual_seed(0)
    for key in weights:
        weights[key] = torch.randn(weights[key].shape, generator=generator) * 0.1
