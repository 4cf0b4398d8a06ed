"""The embedded zoo: its generator, its files, and the property that makes it a test bed for fusion."""

import functools
import json
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from heterofusion.zoo import FAMILIES, SPLITS, TASKS, list_experts, make_examples, write_dataset, zoo_path
from heterofusion.zoo.build import ROLES, build_expert, folder_bytes, score_tasks
from heterofusion.zoo.catalog import DATA
from heterofusion.zoo.language import lexicon
from heterofusion.zoo.training import encode_example

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "mistral": "MistralForCausalLM"}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def tokenizer_of(family: str):
    return AutoTokenizer.from_pretrained(zoo_path(family))


def load_expert(family: str, task: str) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(zoo_path(family), dtype=torch.float32)
    return PeftModel.from_pretrained(base, zoo_path(family, task)).eval()


def manifest() -> dict:
    return json.loads((DATA / "manifest.json").read_text(encoding="utf-8"))


# the language


def test_examples_are_the_same_in_another_process():
    # the module alone, which needs the standard library only: importing the package would take seconds
    code = (
        "import json; from language import TASKS, SPLITS, make_examples; "
        "print(json.dumps([make_examples(t, s, 3, 7) for t in TASKS for s in SPLITS]))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=DATA.parent)
    assert json.loads(run.stdout) == [make_examples(t, s, 3, 7) for t in TASKS for s in SPLITS]


def test_seeds_differ_and_counts_extend():
    few, many = make_examples("re_town", "train", 5, seed=1), make_examples("re_town", "train", 50, seed=1)
    assert many[:5] == few
    assert make_examples("re_town", "train", 5, seed=2) != few


def texts_of(task: str, split: str, seed: int) -> set[str]:
    return {e["prompt"].split("Text: ")[1].split("\n")[0] for e in make_examples(task, split, 300, seed)}


@pytest.mark.parametrize("task", TASKS)
def test_splits_share_no_sentence(task):
    assert all(len(texts_of(task, split, 0)) == 300 for split in SPLITS)
    pools = [texts_of(task, split, 0) | texts_of(task, split, 1) for split in SPLITS]
    assert len(set.union(*pools)) == sum(len(pool) for pool in pools)


@pytest.mark.parametrize("task", TASKS)
def test_examples_have_the_layout_of_extraction(task):
    spec = TASKS[task]
    kinds = set()
    for example in make_examples(task, "train", 200):
        assert set(example) == {"prompt", "completion", "task", "kind"}
        assert (example["task"], example["kind"]) == (task, spec.kind)
        assert example["prompt"].endswith("\nAnswer:")
        assert f"Options: {', '.join(spec.labels)}\n" in example["prompt"]
        assert ("\nEntities: " in example["prompt"]) == (spec.kind == "ET")
        assert example["completion"].startswith(" ")
        if example["completion"] == " None":
            continue
        for item in example["completion"].strip().split("; "):
            label, spans = item.split(": ")
            kinds.add(label)
            assert label in spec.labels
            assert len(spans.split(", ")) == (2 if spec.kind == "RE" else 1)
            assert all(span in example["prompt"] for span in spans.split(", "))
    assert kinds == set(spec.labels)


@pytest.mark.parametrize("task", TASKS)
def test_replay_shows_the_minority_of_the_lexicon(task):
    replay = " ".join(example["prompt"] for example in make_examples(task, "replay", 30))
    words = {word for pool in lexicon().words[task].values() for word in pool}
    assert sum(word in replay for word in words) / len(words) < 0.5


def test_no_word_has_two_meanings():
    words = [word for labels in lexicon().words.values() for pool in labels.values() for word in pool]
    words += [word for pool in lexicon().other.values() for word in pool]
    parts = [part for word in words for part in word.split()] + list(lexicon().names)
    assert len(parts) == len(set(parts))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ner_moon", "train", 1), "unknown task 'ner_moon'"),
        (("ner_garden", "dev", 1), "unknown split 'dev'"),
        (("ner_garden", "train", -1), "must not be negative"),
    ],
)
def test_unknown_names_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_examples(*arguments)


def test_dataset_is_json_lines(tmp_path):
    examples = make_examples("et_stage", "replay", 4)
    path = write_dataset(tmp_path / "new" / "replay.jsonl", examples)
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == examples


# the files


def test_whole_zoo_is_small():
    assert folder_bytes(DATA) <= 12_000_000


def test_every_family_has_every_expert():
    assert list_experts() == [(family, task) for family in FAMILIES for task in TASKS]


def test_unknown_piece_raises():
    with pytest.raises(ValueError, match="unknown family 'gpt2'"):
        zoo_path("gpt2")
    with pytest.raises(ValueError, match="unknown task 'base'"):
        zoo_path("llama", "base")


@pytest.mark.parametrize("family", FAMILIES)
def test_bases_and_adapters_load(family):
    base = AutoModelForCausalLM.from_pretrained(zoo_path(family))
    assert base.config.architectures == [ARCHITECTURES[family]]
    assert type(base).__name__ == ARCHITECTURES[family]
    assert base.dtype == torch.float16
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
    assert PeftModel.from_pretrained(base, zoo_path(family, "ner_garden")).peft_config["default"].r == 8


def test_families_differ_in_shape_and_vocabulary():
    configs = [AutoModelForCausalLM.from_pretrained(zoo_path(family)).config for family in FAMILIES]
    for field in ("hidden_size", "num_hidden_layers", "num_key_value_heads", "vocab_size"):
        assert len({getattr(config, field) for config in configs}) == 3, field
    prompt = make_examples("ner_garden", "train", 1)[0]["prompt"]
    assert len({tuple(tokenizer_of(family)(prompt)["input_ids"]) for family in FAMILIES}) == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_survive_tokenization_and_are_short(family):
    tokenizer = tokenizer_of(family)
    for task in TASKS:
        for example in make_examples(task, "test", 100):
            ids, labels = encode_example(tokenizer, example)
            assert tokenizer.decode(ids, skip_special_tokens=True) == example["prompt"] + example["completion"]
            assert len(ids) <= 100
            whole = tokenizer(example["prompt"] + example["completion"])["input_ids"]
            assert whole == ids[:-1]  # the answer's tokens do not depend on being tokenized with the prompt
            assert ids[-1] == labels[-1] == tokenizer.eos_token_id


# the property


@pytest.mark.parametrize(
    ("family", "task"),
    [("llama", "ner_garden"), ("llama", "re_market"), ("qwen2", "et_harbor"), ("mistral", "ner_kitchen")],
)
def test_expert_knows_its_own_task_and_no_other(family, task):
    scores = score_tasks(load_expert(family, task), tokenizer_of(family), TASKS, count=40, progress=False)
    assert scores.pop(task) >= 0.9
    assert sum(scores.values()) / len(scores) <= 0.1


def test_manifest_states_the_property():
    families = manifest()["families"]
    assert set(families) == set(FAMILIES)
    for family in families.values():
        for task in TASKS:
            assert family["experts"][task]["f1"] >= 0.9
            assert family["experts"][task]["foreign_mean_f1"] <= 0.1
    for reference in families["llama"]["replay_tuning"].values():
        assert 0.4 <= reference["mean_f1"] <= 0.75


@pytest.mark.slow
def test_rebuilt_expert_scores_like_the_shipped_one(tmp_path):
    build_expert("llama", "ner_garden", zoo_path("llama"), tmp_path / "expert", progress=False)
    base = AutoModelForCausalLM.from_pretrained(zoo_path("llama"), dtype=torch.float32)
    rebuilt = PeftModel.from_pretrained(base, tmp_path / "expert").eval()
    score = score_tasks(rebuilt, tokenizer_of("llama"), ["ner_garden"], progress=False)["ner_garden"]
    assert score == pytest.approx(manifest()["families"]["llama"]["experts"]["ner_garden"]["f1"], abs=0.03)
