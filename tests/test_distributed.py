"""Several processes give what one gives: losses, gradients, exported adapter. CPU, gloo, two ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
CASES = {
    f"accumulation-{accumulation}{'-checkpointing' * checkpointing}": {
        "accumulation": accumulation, "checkpointing": checkpointing, "steps": 4,
    }
    for accumulation, checkpointing in ((1, False), (2, False), (4, False), (2, True))
}  # fmt: skip


def launch(folder: Path, *flags: str) -> dict:
    """Run the worker's cases in one launch."""
    folder.mkdir()
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "tests"),
    }  # fmt: skip
    command = [
        sys.executable, "-m", "accelerate.commands.launch", *flags,
        str(ROOT / "tests" / "engine_worker.py"), str(folder), json.dumps(CASES),
    ]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines")
    configs = ROOT / "accelerate_configs"
    return {
        "single": (
            folder / "single",
            launch(folder / "single", "--config_file", str(configs / "single.yaml"), "--cpu"),
        ),
        "ddp": (folder / "ddp", launch(folder / "ddp", "--config_file", str(configs / "cpu_ddp.yaml"))),
    }


pytestmark = [pytest.mark.slow, pytest.mark.distributed]


def test_ddp_really_runs_on_two_ranks(runs):
    for result in runs["ddp"][1].values():
        assert result["world"] == 2 and result["wrapped"] and result["engine"] == "MULTI_CPU"
    for result in runs["single"][1].values():
        assert result["world"] == 1 and not result["wrapped"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("engine", ["single", "ddp"])
def test_losses_and_gradients_do_not_depend_on_ranks_or_accumulation(runs, engine, case):
    """Labels per micro-batch are uneven and RDM is on; the reference is one process without accumulation."""
    reference, found = runs["single"][1]["accumulation-1"], runs[engine][1][case]
    for name in ("losses", "lm_losses", "rdm_losses"):
        assert len(found[name]) == 4
        assert found[name] == pytest.approx(reference[name], abs=1e-5), name
    assert found["grad_norms"] == pytest.approx(reference["grad_norms"], abs=1e-4)
    for name, values in reference["gradients"].items():
        torch.testing.assert_close(
            torch.tensor(found["gradients"][name]), torch.tensor(values), atol=1e-5, rtol=0, msg=name
        )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("engine", ["single", "ddp"])
def test_exported_adapters_agree(runs, engine, case):
    wanted = load_file(runs["single"][0] / "accumulation-1" / "adapter_model.safetensors")
    found = load_file(runs[engine][0] / case / "adapter_model.safetensors")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-4, rtol=0, msg=name)


@pytest.mark.parametrize("case", CASES)
def test_all_ranks_end_with_the_same_hypernetworks(runs, case):
    assert runs["ddp"][1][case]["rank_spread"] == 0


@pytest.mark.parametrize("engine", ["single", "ddp"])
def test_one_backward_per_optimizer_step_on_every_rank_count(runs, engine):
    for result in runs[engine][1].values():
        assert result["forwards_with_gradient"] == 4
