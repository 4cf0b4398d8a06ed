"""recipes/train.py when nothing is wrong with its input: the run, what it leaves behind, and resuming."""

import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from conftest import GOLDEN
from heterofusion import HeteroFusionModel, MethodConfig, load_adapter
from heterofusion.training.checkpoints import load_hypernetworks
from recipe_runner import (
    HYPERNETWORKS,
    MISTRAL,
    QWEN,
    SIZES,
    TARGET,
    check_error,
    error_line,
    flags,
    shell,
    succeeds,
    train,
    write_replay,
)

pytestmark = pytest.mark.usefixtures("logging_restored")


# ---- a run ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def finished(base_dir, tmp_path_factory) -> SimpleNamespace:
    """A run of one step over two data sets, whose log and result several tests read."""
    folder = tmp_path_factory.mktemp("finished")
    first = write_replay(folder / "first.json", count=6)
    second = folder / "second.jsonl"
    rows = [
        {"prompt": "w4 w5", "completion": " w6 w7"},
        {"prompt": "w4 w5", "completion": " w6 w7 w8 w9 w10 w11"},  # cut
        {"prompt": "w4 w5 w6 w7 w8 w9 w10 w11", "completion": " w12"},  # dropped
    ]
    second.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "model_name_or_path": base_dir, "target_adapter": TARGET, "source_adapters": [QWEN, MISTRAL],
        "dataset_name": [first, second], "max_examples": [4, 3], "max_length": 7, "output_dir": folder / "out",
        "use_cpu": True, "max_steps": 1, "gradient_accumulation_steps": 2, "learning_rate": 0.01,
        "preset": "compact", "num_heads": 2, "rdm_projections": 16, "transfer_ratio": "1/2", "alpha_init": 0.7,
        "eval_dataset_name": [first], "eval_strategy": "steps", "eval_steps": 1,
    }  # fmt: skip
    log = succeeds(train.main, flags(values))
    return SimpleNamespace(folder=folder, out=folder / "out", log=log, values=values, base=base_dir)


@pytest.fixture(scope="session")
def record(finished) -> dict:
    return json.loads((finished.out / "fusion.json").read_text())


def test_replay_report_is_logged_and_recorded(finished, record):
    assert f"{finished.folder / 'first.json'} (prompt_completion): 6 read, 4 sampled, 0 cut" in finished.log
    assert "3 read, 3 sampled, 2 cut to 7 tokens" in finished.log and "1 dropped without label tokens" in finished.log
    first, second = record["training"]["replay"]["datasets"]
    assert (first["name"], first["sampled"], first["kept"]) == ("first.json", 4, 4)
    assert (second["name"], second["cut"], second["dropped"], second["kept"]) == ("second.jsonl", 2, 1, 2)


def test_flags_override_the_preset(record):
    sizes = record["hypernetwork"]
    assert (sizes["form"], sizes["num_heads"]) == ("compact", 2)
    assert (sizes["block_size"], sizes["embed_dim"]) == (64, 128)  # the preset's, fitted to a width of 48
    assert record["method"]["alpha_init"] == 0.7
    assert record["plan"]["transfer_ratio"] == "1/2"
    assert all(abs(alpha - 0.7) < 0.05 for alpha in record["alpha"].values())
    assert record["training"]["learning_rate"] == 0.01 and record["training"]["steps"] == 1
    assert "eval_loss" in record["metrics"]


def test_model_card_and_provenance_are_fit_to_publish(finished, record):
    text = (finished.out / "README.md").read_text()
    header = yaml.safe_load(text.split("---\n")[1])
    assert header["library_name"] == "peft" and header["base_model"] == "llama"
    assert "license" not in header
    for name in ("README.md", "fusion.json"):
        content = (finished.out / name).read_text()
        for path in (finished.folder, finished.base, GOLDEN, Path.home(), Path.cwd()):
            assert str(path) not in content, (name, path)
        assert not re.search(r"""["'`| ]/\w+/""", content), name
    names = {path.name for path in finished.out.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "README.md", "fusion.json"} <= names
    assert not [name for name in names if name.startswith(".")]
    assert [source["name"] for source in record["sources"]] == ["source_qwen2", "source_mistral"]
    assert record["sources"][0]["sha256"] == load_adapter(QWEN).sha256


def test_resume_and_overwrite_use_the_folder_again(finished, tmp_path, capsys):
    error_line(capsys, train.main, flags(finished.values), finished.out, "not empty", "--overwrite true")
    shutil.copytree(finished.out, tmp_path / "out")
    again = {**finished.values, "output_dir": tmp_path / "out"}
    succeeds(train.main, flags({**again, "resume_from_checkpoint": True, "max_steps": 2}))
    assert json.loads((tmp_path / "out" / "fusion.json").read_text())["training"]["steps"] == 2
    succeeds(train.main, flags({**again, "overwrite": True}))
    assert json.loads((tmp_path / "out" / "fusion.json").read_text())["training"]["steps"] == 1


def test_two_fusions_in_a_row(two):
    """The result of one is the target of the next, which goes on with its hypernetworks."""
    one, last = (json.loads((folder / "fusion.json").read_text()) for folder in (two.out / "one", two.out))
    assert last["target"]["sha256"] == one["weights_sha256"] == load_adapter(two.out / "one").sha256
    saved, begun = load_file(two.out / "one" / "checkpoint-2" / HYPERNETWORKS), two.watch.begun["out"]
    assert set(begun) < set(saved) and all(torch.equal(tensor, saved[name]) for name, tensor in begun.items())
    carried = last["training"]["initialization"]
    assert carried["groups"] == ["down_proj_r4", "q_proj_r4", "v_proj_r4"] and carried["fresh_groups"] == []
    assert "hypernetworks of one" in two.log and "initialization" not in one["training"]
    assert (two.out / "tokenizer.json").is_file()


# ---- a real shell -----------------------------------------------------------------------------------------------


def test_train_error_in_a_shell(arguments, tmp_path):
    """The error comes from the last check, after every library is imported and used."""
    path = tmp_path / "r.json"
    path.write_text('[{"prompt": "w4", "completion": null}]')
    done = shell(sys.executable, "recipes/train.py", *flags({**arguments, "dataset_name": [path]}))
    check_error(done.returncode, done.stdout, done.stderr, path, "record 1", "null")
    assert not arguments["output_dir"].exists()


WITHOUT_PACKAGE = """
import sys
sys.modules["heterofusion"] = None
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
base, adapter, output = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
save_file({"logits": model(torch.arange(4, 24).view(2, 10)).logits.detach()}, output)
"""


def test_launched_run_gives_an_adapter_that_plain_peft_loads(arguments, base_dir, tmp_path):
    output = arguments["output_dir"]
    values = {**arguments, "model_name_or_path": base_dir, "max_steps": 2}
    config = ("--config_file", "accelerate_configs/single.yaml")
    done = shell("accelerate", "launch", *config, "recipes/train.py", *flags(values))
    assert done.returncode == 0, done.stderr
    plain = shell(sys.executable, "-c", WITHOUT_PACKAGE, base_dir, output, tmp_path / "logits.safetensors")
    assert plain.returncode == 0, plain.stderr
    found = load_file(tmp_path / "logits.safetensors")["logits"]

    # the reference: the live model with the hypernetworks of the last checkpoint
    target = load_adapter(TARGET)
    live = HeteroFusionModel.from_adapters(
        AutoModelForCausalLM.from_pretrained(base_dir), target, [load_adapter(QWEN)], MethodConfig(**SIZES)
    ).eval()
    tokens = torch.arange(4, 24).view(2, 10)
    with torch.no_grad():
        start = live(tokens).logits
        load_hypernetworks(live, output / "checkpoint-2")
        expected = live(tokens).logits
    assert not torch.allclose(start, expected, atol=1e-4)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    fused = load_adapter(output)
    for path, module in target.modules.items():
        assert torch.equal(fused.modules[path].lora_A, module.lora_A)
        assert not torch.equal(fused.modules[path].lora_B, module.lora_B)
