"""recipes/distill.py: teachers of other families, what is kept of them, the student, resuming, and errors."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from builders import WEIGHTS, lora_folder, tiny_model
from heterofusion import load_adapter
from heterofusion.experts import expert as expert_module
from heterofusion.experts.token_alignment import Aligner
from heterofusion.publish.hub import hub_files
from recipe_runner import (
    QWEN,
    TARGET,
    copy_adapter,
    error_line,
    flags,
    recipe,
    save_tokenizer,
    succeeds,
    write_replay,
)
from test_tokens import sentencepiece_like

pytestmark = pytest.mark.usefixtures("logging_restored")
distill = recipe("distill")


@pytest.fixture(scope="module")
def teachers(tmp_path_factory) -> SimpleNamespace:
    """Two experts on bases of other families: one with other words, one with pieces of words."""
    root = tmp_path_factory.mktemp("teachers")
    for family, size in (("olmo2", 128), ("mistral", 400)):
        folder = root / family
        model = tiny_model(family, vocab_size=size)
        model.save_pretrained(folder / "base")
        lora_folder(model, folder / "expert", ["q_proj", "down_proj"], base=str(folder / "base"), std=0.2)
    save_tokenizer(root / "olmo2" / "base", size=100)
    sentencepiece_like().save_pretrained(root / "mistral" / "base")
    models, adapters = ([root / family / part for family in ("olmo2", "mistral")] for part in ("base", "expert"))
    return SimpleNamespace(models=models, adapters=adapters, root=root)


@pytest.fixture(scope="module")
def values(base_dir, teachers, tmp_path_factory) -> dict:
    """Flags of a run that is in order."""
    folder = tmp_path_factory.mktemp("distill")
    return {
        "model_name_or_path": base_dir, "init_adapter": TARGET, "teacher_models": teachers.models,
        "teacher_adapters": teachers.adapters, "dataset_name": [write_replay(folder / "replay.json", count=10)],
        "output_dir": folder / "out", "logits_cache": folder / "cache", "use_cpu": True, "max_steps": 4,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 0.01,
        "logging_steps": 1, "save_strategy": "steps", "save_steps": 2, "teacher_batch_size": 3, "lora_dropout": 0.1,
    }  # fmt: skip


@pytest.fixture(scope="module")
def finished(values) -> SimpleNamespace:
    """A run whose result several tests read."""
    succeeds(distill.main, flags(values))
    return SimpleNamespace(out=values["output_dir"], cache=values["logits_cache"])


@pytest.fixture
def loaded(monkeypatch) -> list[str]:
    """Bases that teachers are run on."""
    names: list[str] = []
    load = expert_module.load_base

    def watched(model, *args):
        names.append(Path(model.model_name_or_path).parent.name)
        return load(model, *args)

    monkeypatch.setattr(expert_module, "load_base", watched)
    return names


def record(folder: Path) -> dict:
    return json.loads((folder / "distillation.json").read_text())


def test_student_is_an_ordinary_adapter_that_was_trained_on(finished):
    student, anchor = load_adapter(finished.out), load_adapter(TARGET)
    assert student.modules.keys() == anchor.modules.keys()
    for path, module in student.modules.items():
        assert module.scaling == anchor.modules[path].scaling
        for name in ("lora_A", "lora_B"):
            assert not torch.equal(getattr(module, name), getattr(anchor.modules[path], name).float()), (path, name)
    assert not list(finished.out.glob(".*"))


def test_record_says_where_all_comes_from_and_is_fit_to_publish(finished, teachers):
    found = record(finished.out)
    made_of = [found["target"]["sha256"], *(teacher["sha256"] for teacher in found["teachers"])]
    assert made_of == [load_adapter(path).sha256 for path in (TARGET, *teachers.adapters)]
    assert found["method"] == {"distill_lambda": 0.9, "top_k_logits": 10}
    assert 0 < found["soft_positions"] <= found["one_to_one_positions"] <= 1
    assert found["training"]["steps"] == 4 and found["training"]["data"]["datasets"][0]["kept"] == 10
    made = found["made_by"]
    assert (made["kind"], made["method"], made["ran_source_models"]) == ("distillation", "fusellm", True)
    assert found["weights_sha256"] == load_adapter(finished.out).sha256
    assert {"README.md", "distillation.json", "adapter_config.json", WEIGHTS} <= set(hub_files(finished.out))
    for name in ("README.md", "distillation.json"):
        text = (finished.out / name).read_text()
        assert not any(str(path) in text for path in (teachers.root, finished.out.parent, Path(TARGET).parent))


def test_what_begins_as_a_control_is_a_control(values, tmp_path, capsys):
    anchor = copy_adapter(tmp_path / "noisy", TARGET)
    told = {"weights_sha256": load_adapter(anchor).sha256, "made_by": {"source_control": "noise"}}
    (anchor / "expert.json").write_text(json.dumps(told))
    changed = {**values, "init_adapter": anchor, "output_dir": tmp_path / "out", "max_steps": 1}
    changed["logits_cache"] = tmp_path / "cache"
    error_line(capsys, distill.main, flags({**changed, "push_to_hub": True}), "--push_to_hub is true", "noise")
    succeeds(distill.main, flags(changed))
    assert record(tmp_path / "out")["made_by"]["source_control"] == "noise"
    assert "# CONTROL (noise): Distilled LoRA adapter" in (tmp_path / "out" / "README.md").read_text()


def test_soft_labels_are_those_of_plain_runs_and_mince_takes_the_lowest(finished, values, teachers, base_dir):
    """Each model by plain PEFT, one example at a time, without padding."""
    rows = json.loads(Path(values["dataset_name"][0]).read_text())
    models = zip([base_dir, *teachers.models], [TARGET, *teachers.adapters], strict=True)
    totals = []
    for folder, adapter in models:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), adapter).eval()
        entropies = []
        for row in rows:
            prompt = tokenizer(row["prompt"])["input_ids"]
            ids = torch.tensor([[*tokenizer(row["prompt"] + row["completion"])["input_ids"], tokenizer.eos_token_id]])
            assert ids[0, : len(prompt)].tolist() == prompt
            labels = ids.clone()
            labels[:, : len(prompt)] = -100
            with torch.no_grad():
                entropies.append(model(input_ids=ids, labels=labels).loss.item() * (ids.shape[1] - len(prompt)))
        totals.append(entropies)
    found = record(finished.out)
    for entry, entropies in zip((found["target"], *found["teachers"]), totals, strict=True):
        assert entry["mean_cross_entropy"] == pytest.approx(np.mean(entropies), rel=1e-5)
    picked = np.bincount(np.argmin(np.array(totals), axis=0), minlength=3).tolist()
    assert [entry["picked"] for entry in (found["target"], *found["teachers"])] == picked


def test_teachers_run_once_and_what_differs_is_run_again(finished, values, teachers, tmp_path, loaded, monkeypatch):
    cache = shutil.copytree(finished.cache, tmp_path / "cache")
    short = {**values, "logits_cache": cache, "max_steps": 1, "save_strategy": "no", "overwrite": True}
    short["output_dir"] = tmp_path / "out"
    evaluated = {"eval_dataset_name": values["dataset_name"], "eval_strategy": "steps", "eval_steps": 1}
    with monkeypatch.context() as patch:
        patch.setattr(Aligner, "distributions", lambda *args: pytest.fail("the labels were fused again"))
        succeeds(distill.main, flags({**short, **evaluated}))
    again, first = record(tmp_path / "out"), record(finished.out)
    assert loaded == [] and again["teachers"] == first["teachers"] and again["metrics"]["eval_loss"] > 0
    other = copy_adapter(tmp_path / "expert", teachers.adapters[0], tensors=lambda t: t[min(t)].mul_(1.5))
    succeeds(distill.main, flags({**short, "teacher_adapters": [other, teachers.adapters[1]]}))
    assert loaded == ["olmo2"]
    succeeds(distill.main, flags({**short, "top_k_logits": 4}))
    assert loaded[1:] == [Path(values["model_name_or_path"]).parent.name, "olmo2", "mistral"]


def test_killed_run_resumes_bit_for_bit(finished, values, tmp_path, capsys):
    part = tmp_path / "part"
    shutil.copytree(finished.out / "checkpoint-2", part / "checkpoint-2")
    again = {**values, "output_dir": part, "resume_from_checkpoint": True}
    error_line(capsys, distill.main, flags({**again, "distill_lambda": 0.5}), "another distill_lambda: 0.9", "0.5")
    succeeds(distill.main, flags(again))
    assert (part / WEIGHTS).read_bytes() == (finished.out / WEIGHTS).read_bytes()


@pytest.fixture
def fails(values, bare_base, tmp_path, capsys, monkeypatch):
    """Run with some flags changed; it must fail as a user's error does, before a model is loaded."""
    monkeypatch.setattr(expert_module, "load_base", lambda *args: pytest.fail("a model was loaded"))

    def run(*words: object, **changed: object) -> None:
        usual = {"output_dir": tmp_path / "out", "logits_cache": tmp_path / "cache", "model_name_or_path": bare_base}
        error_line(capsys, distill.main, flags({**values, **usual, **changed}), *words)
        assert not (tmp_path / "out").exists() and not (tmp_path / "cache").exists()

    return run


WRONG = {
    "numbers": ({"teacher_adapters": [QWEN] * 3}, ["--teacher_models has 2 values, but --teacher_adapters has 3"]),
    "smoothing": ({"label_smoothing_factor": 0.1}, ["--label_smoothing_factor", "leave them out"]),
    "cut answers": ({"max_length": 6}, ["10 of 10 replay examples are longer than --max_length 6", "raise it to 7"]),
    "anchor of another base": ({"init_adapter": QWEN}, ["source_qwen2"]),
    "teacher of another base": ({"teacher_adapters": [QWEN, "none"]}, ["does not fit base model", "olmo2"]),
    "answers that a teacher would cut": ({"max_length": 8}, ["teacher", "longer than --max_length 8", "raise it to"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_flag_raises_before_a_model_is_loaded(case, fails):
    changed, words = WRONG[case]
    fails(*words, **changed)
