"""What the README shows really runs: its Python example and the demo."""

import importlib.util
import json
import re
import sys
from dataclasses import fields, is_dataclass

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import ComputeEnvironment
from peft import PeftModel, PeftModelForCausalLM
from transformers import AutoModelForCausalLM

from heterofusion.labelling.arguments import LABEL_ARGUMENTS
from heterofusion.sweeps import RECIPES as SWEPT
from heterofusion.zoo import DEMO_ANCHOR, DEMO_SOURCES, TASKS, zoo_path
from recipe_runner import RECIPES, ROOT, error_line, recipe

pytestmark = pytest.mark.usefixtures("logging_restored")


def loaded(name, monkeypatch):
    """A recipe as a module, found as Python finds it when the file is run."""
    monkeypatch.syspath_prepend(str(RECIPES))
    return recipe(name)


def test_readme_example_runs(tmp_path, monkeypatch):
    example = max(re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL), key=len)
    assert len(example.splitlines()) <= 35
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    scope: dict = {}
    exec(compile(example.replace("max_steps=20", "max_steps=2"), "README.md", "exec"), scope)
    assert type(scope["plain"]) is PeftModelForCausalLM
    base = AutoModelForCausalLM.from_pretrained(zoo_path("llama"), dtype="float32")
    ids = torch.arange(5, 25).unsqueeze(0)
    with torch.no_grad():
        reloaded = PeftModel.from_pretrained(base, tmp_path / "fused")(input_ids=ids).logits
        in_memory = scope["plain"](input_ids=ids).logits
    torch.testing.assert_close(reloaded, in_memory, atol=1e-6, rtol=0)


def test_readme_flags_exist(monkeypatch):
    """Every --flag in the README and the recipes' README belongs to a recipe (or to accelerate launch)."""
    known = {"config", "config_file", "debug", "help", "quiet", "num_processes", "machine_rank"}
    monkeypatch.syspath_prepend(str(RECIPES))
    kinds = [*LABEL_ARGUMENTS, *(kind for kinds in SWEPT.values() for kind in kinds)]
    for path in RECIPES.rglob("*.py"):
        spec = importlib.util.spec_from_file_location(f"flags_of_{path.parent.name}_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        kinds += [value for value in vars(module).values() if isinstance(value, type) and is_dataclass(value)]
    for kind in kinds:
        known |= {item.name for item in fields(kind)}
    for page in (ROOT / "README.md", *RECIPES.rglob("*.md")):
        flags = set(re.findall(r"--([a-z]\w+)", page.read_text()))
        assert flags <= known, f"{page}: {sorted(flags - known)}"


@pytest.mark.slow
def test_demo_writes_adapter_results_report_and_pictures(tmp_path, monkeypatch, capsys):
    demo = loaded("demo", monkeypatch)
    folder = tmp_path / "demo"
    sizes = ["--max_steps=2", "--sensitivity_steps=1", "--test_examples=4", "--replay_examples=4"]
    assert demo.main([f"--output_dir={folder}", *sizes]) == 0
    scores = {}
    for row in ("target/base", "target/anchor", "target/fused", "experts"):
        results = json.loads((folder / "eval" / row / "results.json").read_text())
        assert list(results["datasets"]) == list(TASKS)
        scores[row] = {task: record["score"] for task, record in results["datasets"].items()}
    # two steps hardly move the adapter: an expert beats it on a foreign task
    foreign = DEMO_SOURCES[0][1]
    assert scores["experts"][foreign] > scores["target/fused"][foreign]
    assert scores["target/anchor"][DEMO_ANCHOR[1]] > 0.5
    text = (folder / "report" / "report.md").read_text()
    assert "| fused |" in text and "| fused |" in capsys.readouterr().out
    pictures = re.findall(r"\]\(([^)]+\.png)\)", text)
    assert len(pictures) >= 8  # scores, two curves, alignment, attention, gates, updates, training
    for name in pictures:
        assert (folder / "report" / name).read_bytes().startswith(b"\x89PNG")
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()


def test_demo_leaves_other_folders_alone(tmp_path, monkeypatch, capsys):
    (tmp_path / "adapter").mkdir()
    demo = loaded("demo", monkeypatch)
    error_line(capsys, demo.main, [f"--output_dir={tmp_path}"], tmp_path, "no demo made")
    assert list(tmp_path.iterdir()) == [tmp_path / "adapter"]


# ---- launches ---------------------------------------------------------------------------------------------------

ENGINES = {
    "single": ("NO", 1, "no"), "ddp": ("MULTI_GPU", 8, "bf16"), "cpu_ddp": ("MULTI_GPU", 2, "no"),
    "zero1": ("DEEPSPEED", 8, "bf16"), "zero2": ("DEEPSPEED", 8, "bf16"), "zero3": ("DEEPSPEED", 8, "bf16"),
    "fsdp2": ("FSDP", 8, "bf16"), "multi_node": ("MULTI_GPU", 16, "bf16"),
}  # fmt: skip


def test_every_launch_config_parses_and_is_used_in_the_docs():
    docs = (ROOT / "README.md").read_text() + (ROOT / "recipes" / "README.md").read_text()
    files = sorted((ROOT / "accelerate_configs").iterdir())
    assert {path.stem for path in files} == set(ENGINES)
    for path in files:
        config = load_config_from_file(str(path))
        assert config.compute_environment == ComputeEnvironment.LOCAL_MACHINE
        found = (config.distributed_type.value, config.num_processes, config.mixed_precision)
        assert found == ENGINES[path.stem]
        if path.stem.startswith("zero"):
            assert config.deepspeed_config["zero_stage"] == int(path.stem[-1])
        assert path.stem != "fsdp2" or config.fsdp_config["fsdp_version"] == 2
        assert config.num_machines == (2 if path.stem == "multi_node" else 1)
        assert f"--config_file accelerate_configs/{path.name}" in docs
