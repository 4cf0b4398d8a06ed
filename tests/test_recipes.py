"""What the README shows really runs: its Python example and the demo."""

import json
import re

import pytest
import torch
from peft import PeftModel, PeftModelForCausalLM
from transformers import AutoModelForCausalLM

from heterofusion.arguments import AdapterArguments, DataArguments, ModelArguments, RunArguments
from heterofusion.config import HeteroFusionConfig
from heterofusion.expert import ExpertModelArguments, LoraArguments
from heterofusion.push import PushArguments
from heterofusion.zoo import DEMO_ANCHOR, DEMO_SOURCES, TASKS, zoo_path
from recipe_runner import RECIPES, ROOT, recipe

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


def test_readme_flags_exist():
    """Every --flag in the README and the recipes' README belongs to a recipe (or to accelerate launch)."""
    known = set()
    for path in RECIPES.rglob("*.py"):
        known |= set(re.findall(r"^    (\w+): ", path.read_text(), re.MULTILINE))
    shared = (AdapterArguments, HeteroFusionConfig, ModelArguments, RunArguments, DataArguments, PushArguments)
    for kind in (*shared, LoraArguments, ExpertModelArguments):
        known |= set(kind.__dataclass_fields__)
    known |= {"config", "config_file", "debug", "help", "quiet", "num_processes", "machine_rank"}
    for page in (ROOT / "README.md", *RECIPES.rglob("README.md")):
        flags = set(re.findall(r"--([a-z]\w+)", page.read_text()))
        assert flags <= known, f"{page}: {sorted(flags - known)}"


@pytest.mark.slow
def test_demo_writes_adapter_results_report_and_pictures(tmp_path, monkeypatch, capsys):
    demo = loaded("demo", monkeypatch)
    folder = tmp_path / "demo"
    assert demo.main([f"--output_dir={folder}", "--max_steps=2", "--test_examples=4", "--replay_examples=4"]) == 0
    results = json.loads((folder / "results.json").read_text())
    for row in ("base model", f"anchor ({DEMO_ANCHOR[1]})", "fused adapter", "expert of the task"):
        assert list(results["scores"][row]) == list(TASKS)
        assert all(0 <= value <= 1 for value in results["scores"][row].values())
    # two steps hardly move the adapter: an expert beats it on a foreign task
    foreign = DEMO_SOURCES[0][1]
    assert results["scores"]["expert of the task"][foreign] > results["scores"]["fused adapter"][foreign]
    assert results["scores"][f"anchor ({DEMO_ANCHOR[1]})"][DEMO_ANCHOR[1]] > 0.5
    out = capsys.readouterr().out
    assert "| fused adapter |" in out and "| fused adapter |" in (folder / "report.md").read_text()
    for name in ("scores.png", "training.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
        assert f"({name})" in (folder / "report.md").read_text()
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
