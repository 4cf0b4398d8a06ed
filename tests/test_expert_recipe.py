"""recipes/expert.py: what moves, what it leaves behind, resuming, and that every expert can be fused."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer

from builders import WEIGHTS
from conftest import logits
from heterofusion import load_adapter
from heterofusion.training.config import ExpertConfig
from recipe_runner import (
    QWEN,
    SIZES,
    TARGET,
    contents,
    error_line,
    flags,
    late_error,
    recipe,
    succeeds,
    train,
    write_replay,
)
from test_hub import hub  # noqa: F401  # a fixture

pytestmark = pytest.mark.usefixtures("logging_restored")
expert = recipe("expert")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def trained(record: dict) -> list[float]:
    return [entry["loss"] for entry in record["log_history"] if "loss" in entry]


@pytest.fixture(scope="module")
def values(base_dir, tmp_path_factory) -> dict:
    """Flags of a run that is in order."""
    folder = tmp_path_factory.mktemp("expert")
    return {
        "model_name_or_path": base_dir, "dataset_name": [write_replay(folder / "task.json", count=12)],
        "output_dir": folder / "out", "use_cpu": True, "max_steps": 6, "r": 4, "lora_alpha": 8,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 0.02,
        "logging_steps": 1, "save_strategy": "steps", "save_steps": 3,
    }  # fmt: skip


@pytest.fixture(scope="module")
def finished(values) -> SimpleNamespace:
    """A run whose result several tests read, with an evaluation."""
    more = {"eval_dataset_name": values["dataset_name"], "eval_strategy": "steps", "eval_steps": 3}
    log = succeeds(expert.main, flags({**values, **more, "load_best_model_at_end": True}))
    return SimpleNamespace(out=values["output_dir"], log=log)


# ---- the result -------------------------------------------------------------------------------------------------


def test_loss_falls_and_best_checkpoint_is_kept(finished):
    losses = trained(json.loads((finished.out / "trainer_state.json").read_text()))
    assert len(losses) == 6 and losses[-1] < losses[0] - 0.1
    record = json.loads((finished.out / "expert.json").read_text())
    assert record["metrics"]["eval_loss"] < losses[0]
    assert record["training"]["steps"] == 6 and record["training"]["data"]["datasets"][0]["kept"] == 12
    best = finished.out / "checkpoint-6" / WEIGHTS
    assert (finished.out / WEIGHTS).read_bytes() == best.read_bytes()


def test_all_roles_have_lora_and_plain_peft_loads_it(finished, base_dir):
    adapter = load_adapter(finished.out)
    assert not adapter.extra_tensors
    for path, module in adapter.modules.items():
        assert module.rank == 4 and module.scaling == 2 and module.lora_A.dtype == torch.float32, path
        assert module.lora_B.abs().max() > 0, path
    base = AutoModelForCausalLM.from_pretrained(base_dir).eval()
    assert len(adapter.modules) == 7 * base.config.num_hidden_layers
    before = logits(base)
    assert not torch.allclose(before, logits(PeftModel.from_pretrained(base, finished.out).eval()), atol=1e-3)


def test_push_uploads_exactly_the_adapter(hub, values, tmp_path):  # noqa: F811
    run = {"push_to_hub": True, "hub_model_id": "expert", "max_steps": 1, "output_dir": tmp_path / "out"}
    assert "pushed: " in succeeds(expert.main, flags({**values, **run}))
    (name,) = hub.repos
    received = hub.files(name)
    assert name.endswith("/expert")
    assert set(received) == {"README.md", "expert.json", "adapter_config.json", WEIGHTS, *TOKENIZER}
    for content in received.values():
        assert str(tmp_path).encode() not in content and str(values["model_name_or_path"]).encode() not in content


@pytest.mark.parametrize("place", ["source", "target"])
def test_expert_can_be_fused(place, finished, arguments, base_dir):
    adapters = {"target_adapter": TARGET, "source_adapters": [finished.out]}
    if place == "target":
        adapters = {"target_adapter": finished.out, "source_adapters": [QWEN]}
    succeeds(train.main, flags({**arguments, **adapters, **SIZES, "model_name_or_path": base_dir}))
    load_adapter(arguments["output_dir"])


# ---- training ---------------------------------------------------------------------------------------------------


def test_killed_run_resumes_bit_for_bit(values, tmp_path):
    whole = {**values, "output_dir": tmp_path / "whole", "lora_dropout": 0.2}
    succeeds(expert.main, flags(whole))
    part = tmp_path / "part"
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", part / "checkpoint-3")
    again = {**whole, "output_dir": part, "resume_from_checkpoint": True}
    succeeds(expert.main, flags(again))
    assert (part / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    losses = [
        trained(json.loads((folder / "trainer_state.json").read_text())) for folder in (tmp_path / "whole", part)
    ]
    assert losses[0] == losses[1]
    # killed after the last checkpoint: no step more
    for name in (WEIGHTS, "expert.json"):
        (part / name).unlink()
    succeeds(expert.main, flags(again))
    assert (part / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    assert json.loads((part / "expert.json").read_text())["training"]["steps"] == 6


def test_flags_reach_peft(values, tmp_path):
    changed = {
        "target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1, 2], "use_rslora": True,
        "init_lora_weights": "gaussian", "modules_to_save": ["lm_head"], "max_steps": 1, "save_strategy": "no",
        "activation_checkpointing": True, "output_dir": tmp_path / "out",
    }  # fmt: skip
    succeeds(expert.main, flags({**values, **changed}))
    adapter = load_adapter(tmp_path / "out")
    paths = ("self_attn.q_proj", "mlp.down_proj")
    assert set(adapter.modules) == {f"model.layers.{layer}.{path}" for layer in (1, 2) for path in paths}
    assert {module.scaling for module in adapter.modules.values()} == {8 / 4**0.5}
    assert all("lm_head" in key for key in adapter.extra_tensors) and adapter.extra_tensors
    assert all("lora_" in key or "lm_head" in key for key in load_file(tmp_path / "out" / WEIGHTS))


# ---- errors -----------------------------------------------------------------------------------------------------

# what is of any run is told as in test_bad_input.py
WRONG = {
    "rank": ({"r": 0}, ["--r is 0"]),
    "dropout": ({"lora_dropout": 1}, ["--lora_dropout is 1"]),
    "initialization": ({"init_lora_weights": "pissa"}, ["init_lora_weights", "pissa"]),
    "no DoRA": ({"use_dora": True}, ["use_dora"]),
    "no bias": ({"bias": "all"}, ["bias"]),
    "orthogonal": ({"init_lora_weights": "orthogonal", "r": 3}, ["--r 3"]),
    "no module": ({"target_modules": ["q_proj", "qkv"]}, ["--target_modules", "qkv"]),
    "no module at all": ({"target_modules": ["qkv"]}, ["--target_modules", "qkv"]),
    "embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, ["embed_tokens", "Embedding"]),
    "outside the layers": ({"target_modules": ["lm_head"]}, ["lm_head", "decoder layer"]),
    "layer": ({"layers_to_transform": [0, 99]}, ["--layers_to_transform", "[99]"]),
    "layers of all-linear": ({"target_modules": ["all-linear"], "layers_to_transform": [0]}, ["all-linear"]),
    "saved module": ({"modules_to_save": ["head"]}, ["--modules_to_save", "head"]),
    "name on the Hub": ({"push_to_hub": True, "hub_model_id": "a b"}, ["a b"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_flag_raises_before_the_base_is_loaded(case, values, bare_base, tmp_path, capsys):
    changed, words = WRONG[case]
    argv = flags({**values, "model_name_or_path": bare_base, "output_dir": tmp_path / "out", **changed})
    error_line(capsys, expert.main, argv, *words)
    assert not (tmp_path / "out").exists()


def test_finished_run_is_neither_written_over_nor_resumed_with_other_flags(finished, values, capsys):
    before = contents(finished.out)
    error_line(capsys, expert.main, flags(values), "not empty", "--overwrite true")
    other = {**values, "r": 8, "resume_from_checkpoint": True}
    error_line(capsys, expert.main, flags(other), "another r: 4, this run has 8")
    assert contents(finished.out) == before


def test_diverged_run_writes_no_adapter(values, tmp_path, capsys):
    argv = flags({**values, "output_dir": tmp_path / "out", "learning_rate": 1e30, "save_strategy": "no"})
    capsys.readouterr()
    assert expert.main(argv) == 2
    assert "not finite" in capsys.readouterr().err
    assert not (tmp_path / "out" / WEIGHTS).exists()


@pytest.mark.parametrize("error", [SafetensorError("no space"), RuntimeError("no space"), Exception("no space")])
def test_a_full_disk_in_a_save_is_one_line(error, values, tmp_path, capsys, monkeypatch):
    """Of safetensors, of torch, and of the tokenizers library, whose error has no type of its own."""
    failing = {"step": 2}

    def full(self, output_dir, real=Trainer._save_optimizer_and_scheduler):
        if self.state.global_step == failing["step"]:
            raise error
        real(self, output_dir)

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", full)
    changed = {**values, "output_dir": tmp_path / "out", "save_steps": 1, "eval_strategy": "no",
               "load_best_model_at_end": False, "max_steps": 3}  # fmt: skip
    words = ("checkpoint-2 could not be written (no space)", "the last good checkpoint is", "checkpoint-1")
    late_error(capsys, expert.main, flags(changed), *words)
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-1"]


def test_several_gpus_in_one_process_are_refused(values, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(ExpertConfig, "n_gpu", property(lambda self: 2))
    error_line(capsys, expert.main, flags({**values, "output_dir": tmp_path / "out"}), "2 GPUs", "accelerate launch")
