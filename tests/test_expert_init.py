"""recipes/expert.py --init_adapter: an adapter is trained on, all of it or its lora_B alone."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from heterofusion import load_adapter
from recipe_runner import QWEN, TARGET, copy_adapter, error_line, flags, late_error, recipe, succeeds, write_replay

pytestmark = pytest.mark.usefixtures("logging_restored")
expert = recipe("expert")


@pytest.fixture(scope="module")
def values(base_dir, tmp_path_factory) -> dict:
    """Flags of a run that is in order."""
    folder = tmp_path_factory.mktemp("tuning")
    return {
        "model_name_or_path": base_dir, "dataset_name": [write_replay(folder / "task.json", count=12)],
        "init_adapter": TARGET, "output_dir": folder / "out", "use_cpu": True, "max_steps": 4,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 0.02,
        "logging_steps": 1, "save_strategy": "steps", "save_steps": 2, "lora_dropout": 0.0,
    }  # fmt: skip


@pytest.fixture(scope="module")
def tuned_b(values):
    """lora_B alone was trained."""
    succeeds(expert.main, flags({**values, "train_only": "lora_B"}))
    return values["output_dir"]


def weights(folder) -> dict[str, torch.Tensor]:
    return load_adapter(folder).state_dict()


def test_train_only_lora_b_keeps_lora_a_bit_for_bit(tuned_b, values):
    before, after = weights(TARGET), weights(tuned_b)
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert torch.equal(tensor, after[key]) == key.endswith("lora_A.weight"), key
    assert load_adapter(tuned_b).config["lora_alpha"] == load_adapter(TARGET).config["lora_alpha"]
    assert load_adapter(tuned_b).base_model == str(values["model_name_or_path"])  # not one that may be out of reach


def test_training_begins_at_the_adapter(values, base_dir, tmp_path):
    """The first loss is that of the initial adapter, with plain PEFT, on the same batch."""
    row = write_replay(tmp_path / "one.json", count=1)
    run = {"dataset_name": [row], "output_dir": tmp_path / "out", "max_steps": 1, "gradient_accumulation_steps": 1}
    succeeds(expert.main, flags({**values, **run, "per_device_train_batch_size": 1}))
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_dir), TARGET).eval()
    tokenizer, (example,) = AutoTokenizer.from_pretrained(base_dir), json.loads(row.read_text())
    prompt = tokenizer(example["prompt"])["input_ids"]
    answer = tokenizer(example["completion"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    ids = torch.tensor([prompt + answer])
    labels = ids.clone()
    labels[:, : len(prompt)] = -100
    with torch.no_grad():
        expected = model(input_ids=ids, labels=labels).loss.item()
    assert state["log_history"][0]["loss"] == pytest.approx(expected, abs=1e-4)


def test_resumed_run_equals_the_uninterrupted_and_keeps_lora_a(tuned_b, values, tmp_path):
    shutil.copytree(tuned_b, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    run = {"output_dir": tmp_path / "out", "train_only": "lora_B", "resume_from_checkpoint": True}
    succeeds(expert.main, flags({**values, **run}))
    whole, resumed = weights(tuned_b), weights(tmp_path / "out")
    for key, tensor in whole.items():
        assert torch.equal(tensor, resumed[key]), key
    cost = json.loads((tmp_path / "out" / "expert.json").read_text())["made_by"]["cost"]
    assert cost["seconds"] > 0 and cost["resumed_from_step"] == 2
    assert "resumed_from_step" not in json.loads((tuned_b / "expert.json").read_text())["made_by"]["cost"]


@pytest.mark.parametrize(
    ("changed", "word"),
    [({"train_only": None}, "train_only"), ({"init_adapter": "other"}, "init_adapter")],
)
def test_resume_with_another_beginning_is_refused(changed, word, tuned_b, values, tmp_path, capsys):
    if "init_adapter" in changed:

        def shift(tensors):
            for key in tensors:
                tensors[key] += 0.01

        changed = {"init_adapter": copy_adapter(tmp_path / "other", TARGET, tensors=shift)}
    run = {"train_only": "lora_B", "resume_from_checkpoint": tuned_b / "checkpoint-2", **changed}
    error_line(capsys, expert.main, flags({**values, **run}), f"another {word}")


def test_record_and_card_tell_the_beginning(tuned_b):
    record = json.loads((tuned_b / "expert.json").read_text())
    assert record["init_adapter"]["name"] == "target_llama"
    assert record["init_adapter"]["sha256"] == load_adapter(TARGET).sha256
    assert record["made_by"]["kind"] == "tuning" and record["made_by"]["method"] == "lora_B"
    assert record["made_by"]["cost"]["seconds"] == pytest.approx(record["metrics"]["train_runtime"], abs=1e-3)
    assert record["made_by"]["cost"]["peak_memory_bytes"] > 50e6
    card = (tuned_b / "README.md").read_text()
    assert "begun as the adapter `target_llama`" in card and "`lora_B` alone" in card


def test_half_precision_adapter_is_trained_in_fp32(values, tmp_path):
    def halve(tensors):
        for key in tensors:
            tensors[key] = tensors[key].to(torch.bfloat16)

    half = copy_adapter(tmp_path / "half", TARGET, tensors=halve)
    run = {"init_adapter": half, "output_dir": tmp_path / "out", "train_only": "lora_B", "learning_rate": 1e-6}
    succeeds(expert.main, flags({**values, **run, "max_steps": 1, "warmup_steps": 0}))
    before, after = load_adapter(half), load_adapter(tmp_path / "out")
    for path, module in before.modules.items():  # a step of 1e-6 is lost in bfloat16
        assert not torch.equal(module.lora_B.float(), after.modules[path].lora_B)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"r": 4}, ["--r is 4", "--init_adapter brings its own"]),
        ({"target_modules": ["q_proj"]}, ["--target_modules", "--init_adapter"]),
        ({"init_adapter": QWEN}, ["maps 80 to 48 features", "source_qwen2"]),
        ({"init_adapter": "nowhere"}, ["nowhere", "does not exist"]),
        ({"init_adapter": None, "init_revision": "main"}, ["--init_revision"]),
        ({"train_only": "lora_A"}, ["--train_only", "lora_A"]),
        ({"output_dir": TARGET, "overwrite": True}, ["is the --init_adapter itself"]),
    ],
)
def test_bad_flags_are_refused_before_the_base_is_loaded(changed, words, values, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(expert, "load_base", lambda *args: pytest.fail("the base was loaded"))
    run = {**values, "output_dir": tmp_path / "out", **changed}
    error_line(capsys, expert.main, flags(run), *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("extra_rank", [0, 4])
def test_adapter_that_lacks_a_module_is_refused(extra_rank, values, tmp_path, capsys):
    """Its config names modules that the file has no weights of: they would begin at random."""

    def cut(weights):
        for key in [key for key in weights if "layers.0.self_attn.v_proj" in key]:
            del weights[key]

    changed = {"init_adapter": copy_adapter(tmp_path / "cut", TARGET, tensors=cut), "output_dir": tmp_path / "out"}
    changed |= {"extra_rank": extra_rank, "train_only": "lora_B"} if extra_rank else {}
    line = late_error(capsys, expert.main, flags({**values, **changed}), "--init_adapter", "cut", "does not fit")
    assert "v_proj" in line


def test_damaged_record_beside_the_adapter_is_told_before_the_base_is_loaded(values, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(expert, "load_base", lambda *args: pytest.fail("the base was loaded"))
    adapter = copy_adapter(tmp_path / "damaged", TARGET)
    (adapter / "fusion.json").write_text("{")
    changed = {"init_adapter": adapter, "output_dir": tmp_path / "out"}
    error_line(capsys, expert.main, flags({**values, **changed}), adapter / "fusion.json")
