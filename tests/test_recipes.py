"""What the README shows really runs: its Python example and the demo."""

import contextlib
import importlib.util
import io
import re
import sys

import pandas as pd
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import ComputeEnvironment
from peft import PeftModel, PeftModelForCausalLM
from transformers import AutoModelForCausalLM

from conftest import restored_logging
from heterofusion.zoo import DEMO_ANCHOR, DEMO_SOURCES, TASKS, zoo_path
from recipe_runner import RECIPES, ROOT, error_line, recipe

pytestmark = pytest.mark.usefixtures("logging_restored")
PAGES = [
    ROOT / "README.md",
    *(page for folder in ("accelerate_configs", "recipes", "src") for page in (ROOT / folder).rglob("*.md")),
]


def loaded(name, monkeypatch):
    """A recipe as a module, found as Python finds it when the file is run."""
    monkeypatch.syspath_prepend(str(RECIPES))
    return recipe(name)


def test_example_in_python_runs(tmp_path, monkeypatch):
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "src/heterofusion/README.md").read_text(), re.DOTALL)
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


def flags_of(name: str) -> set[str]:
    """The flags that a recipe shows with --help."""
    spec = importlib.util.spec_from_file_location("flags_of_" + name.replace("/", "_"), RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    with contextlib.redirect_stdout(io.StringIO()) as told:
        assert module.main(["--help"]) == 0
    return set(re.findall(r"--(\w+)", told.getvalue()))


@pytest.fixture(scope="session")
def known_flags() -> dict[str, set[str]]:
    """The flags of all recipes that are programs."""
    with pytest.MonkeyPatch.context() as patch, restored_logging():
        patch.syspath_prepend(str(RECIPES))
        names = [path.relative_to(RECIPES).with_suffix("") for path in sorted(RECIPES.rglob("*.py"))]
        return {str(name): flags_of(str(name)) for name in names if "def main" in (RECIPES / f"{name}.py").read_text()}


def test_readme_flags_exist(known_flags):
    """Every --flag in the README and the pages of the recipes belongs to a recipe (or to accelerate launch)."""
    known = {"config", "config_file", "debug", "help", "quiet", "accelerate_config"}.union(*known_flags.values())
    known |= {"num_processes", "machine_rank"}
    for page in PAGES:
        flags = set(re.findall(r"--([a-z]\w+)", page.read_text()))
        assert flags <= known, f"{page}: {sorted(flags - known)}"


def test_links_of_the_pages_lead_somewhere():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#]+)", page.read_text()):
            assert link.startswith("https://") or (page.parent / link).exists(), f"{page}: {link}"


@pytest.mark.parametrize(
    "script, config",
    [
        ("compare", "demo/compare.yaml"), ("compare", "uie/compare.yaml"),
        ("sources", "demo/sources.yaml"), ("sources", "uie/sources.yaml"),
        ("paper", "demo/paper.yaml"), ("paper", "uie/paper.yaml"), ("paper", "glue/paper.yaml"),
        ("experts", "uie/experts.yaml"), ("experts", "glue/experts.yaml"),
    ],
)  # fmt: skip
def test_experiments_use_flags_that_exist(known_flags, script, config, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for name in ("DATA_ROOT", "MODEL_ROOT", "ADAPTER_ROOT"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    arguments = [f"--config={RECIPES / config}", f"--output_dir={tmp_path}", "--dry_run=true"]
    assert loaded(script, monkeypatch).main(arguments) == 0
    runs = re.findall(r"^==== [^\n]* \((\w+)-\w+\) ====\n(.*?)\n\n", capsys.readouterr().out, re.DOTALL | re.MULTILINE)
    assert len(runs) >= 10
    for recipe_name, text in runs:
        flags = yaml.safe_load(text)
        assert flags.keys() <= known_flags[recipe_name], f"{recipe_name}: {flags.keys() - known_flags[recipe_name]}"


@pytest.mark.slow
def test_demo_writes_adapter_and_report(tmp_path, monkeypatch):
    folder = tmp_path / "demo"
    sizes = ["--max_steps=2", "--sensitivity_steps=1", "--test_examples=4", "--replay_examples=4"]
    assert loaded("demo", monkeypatch).main([f"--output_dir={folder}", *sizes]) == 0
    scores = pd.read_csv(folder / "scores.csv").pivot_table(index="name", columns="dataset", values="score")
    assert sorted(scores.columns) == sorted(TASKS)
    # two steps hardly move the adapter: an expert beats it on a foreign task
    foreign = DEMO_SOURCES[0][1]
    assert scores.loc["expert", foreign] > scores.loc["fused", foreign]
    assert scores.loc["anchor", DEMO_ANCHOR[1]] > 0.5
    text = (folder / "report.md").read_text()
    assert "| fused |" in text and "**source gain** = fused - noise sources" in text
    pictures = re.findall(r"\]\(([^)]+\.png)\)", text)
    assert len(pictures) >= 7  # methods, scores, two curves, alignment, fusion, training
    for name in pictures:
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
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
    docs = "".join(page.read_text() for page in PAGES)
    files = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
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
