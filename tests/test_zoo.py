"""The embedded zoo: its generator, its files, and the property that makes it a test bed for fusion."""

import hashlib
import json

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from heterofusion.zoo import CHORES, FAMILIES, SPLITS, TASKS, make_chores, make_examples, zoo_path
from heterofusion.zoo import build as building
from heterofusion.zoo.build import ROLES, build_zoo, folder_bytes, score_table, score_tasks
from replay_builders import encode

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "mistral": "MistralForCausalLM"}


# ---- the language -----------------------------------------------------------------------------------------------


def test_examples_are_the_same_in_every_process_and_version():
    examples = [make_examples(t, s, 3, 7) for t in TASKS for s in SPLITS] + [make_chores(c, 3, 7) for c in CHORES]
    digest = hashlib.sha256(json.dumps(examples).encode()).hexdigest()
    assert digest == "41e4be3e4b6cbc0b83876f3cdd3ce2611c35cb1f2b123bbaf08740a9987cbdf7"
    assert make_examples("re_town", "train", 9, 7)[:3] == make_examples("re_town", "train", 3, 7)


def texts_of(task: str, split: str, seed: int) -> set[str]:
    return {e["prompt"].split("Text: ")[1].split("\n")[0] for e in make_examples(task, split, 300, seed)}


@pytest.mark.parametrize("task", TASKS)
def test_splits_share_no_sentence(task):
    assert all(len(texts_of(task, split, 0)) == 300 for split in SPLITS)
    pools = [texts_of(task, split, 0) | texts_of(task, split, 1) for split in SPLITS]
    assert len(set.union(*pools)) == sum(len(pool) for pool in pools)


def test_unknown_names_raise():
    with pytest.raises(ValueError, match="unknown task 'ner_moon'"):
        make_examples("ner_moon", "train", 1)
    with pytest.raises(ValueError, match="unknown family 'gpt2'"):
        zoo_path("gpt2")


# ---- the files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_bases_and_adapters_load(family):
    base = AutoModelForCausalLM.from_pretrained(zoo_path(family))
    assert base.config.architectures == [ARCHITECTURES[family]] and type(base).__name__ == ARCHITECTURES[family]
    assert base.dtype == torch.float16 and folder_bytes(zoo_path(family).parent) <= 4_000_000
    for task in TASKS:
        folder = zoo_path(family, task)
        assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        assert config["base_model_name_or_path"] == f"heterofusion-zoo/{family}"
        assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (8, 16, 0.0)
        assert set(config["target_modules"]) == set(ROLES)
        with safe_open(folder / "adapter_model.safetensors", "pt") as tensors:
            assert len(list(tensors.keys())) == 2 * len(ROLES) * base.config.num_hidden_layers
            assert {tensors.get_tensor(name).dtype for name in tensors.keys()} == {torch.float16}  # noqa: SIM118


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_survive_tokenization_and_are_short(family):
    tokenizer = AutoTokenizer.from_pretrained(zoo_path(family))
    for task in TASKS:
        for example in make_examples(task, "test", 50):
            ids, labels = encode(example, tokenizer)
            prompt = tokenizer(example["prompt"])["input_ids"]
            answer = tokenizer(example["completion"], add_special_tokens=False)["input_ids"]
            # the answer's tokens do not depend on being tokenized with the prompt
            assert ids == [*prompt, *answer, tokenizer.eos_token_id] and len(ids) <= 100
            assert labels == [-100] * len(prompt) + ids[len(prompt) :]
            assert tokenizer.decode(ids, skip_special_tokens=True) == example["prompt"] + example["completion"]


# ---- the property -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "task"), [("llama", "re_market"), ("qwen2", "et_harbor"), ("mistral", "ner_kitchen")]
)
def test_expert_knows_its_own_task_and_no_other(family, task):
    base = AutoModelForCausalLM.from_pretrained(zoo_path(family), dtype=torch.float32)
    model = PeftModel.from_pretrained(base, zoo_path(family, task)).eval()
    tokenizer = AutoTokenizer.from_pretrained(zoo_path(family))
    scores = score_tasks(model, tokenizer, TASKS, count=30, progress=False)
    assert scores.pop(task) >= 0.9
    assert sum(scores.values()) / len(scores) <= 0.1


# ---- building ---------------------------------------------------------------------------------------------------


def test_build_in_small(tmp_path, monkeypatch):
    """Two steps of everything: what is there afterwards, and that a second build gives the same."""
    family = "mistral"
    monkeypatch.setattr("heterofusion.zoo.families.TOKENIZER_DOCUMENTS", 50)
    for name, examples in (("BASE", {}), ("EXPERT", {"examples": 4})):
        monkeypatch.setattr(building, name, {**getattr(building, name), "steps": 2, "batch": 2, **examples})
    monkeypatch.setattr(building, "MAX_NEW_TOKENS", 2)
    monkeypatch.setattr(building.score_tasks, "__defaults__", (2, 0, True))
    for folder in ("a", "b"):
        found = build_zoo(tmp_path / folder, [family], ["re_town"], progress=False)
        assert set(found["families"][family]["experts"]) == {"re_town"}
    assert score_table(found).splitlines()[2].startswith(f"| {family} | - | - |")
    for name in ("base/model.safetensors", "base/tokenizer.json", "re_town/adapter_model.safetensors"):
        first, second = ((tmp_path / folder / family / name).read_bytes() for folder in "ab")
        assert first == second, name
    shipped = json.loads((zoo_path(family) / "config.json").read_text())
    rebuilt = json.loads((tmp_path / "a" / family / "base" / "config.json").read_text())
    assert {**rebuilt, "vocab_size": 0} == {**shipped, "vocab_size": 0}
