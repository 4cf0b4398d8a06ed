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
    scripts = str(Path(sys.executable).parent)  # DeepSpeed compiles with the ninja that lies there
    environment = {
        **os.environ,
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
        "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "tests"),
    }  # fmt: skip
    command = [
        sys.executable, "-m", "accelerate.commands.launch", *flags,
        str(ROOT / "tests" / "engine_worker.py"), str(folder), json.dumps(CASES),
    ]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "results.json").read_text())


ENGINES = {
    "single": ["--config_file", "single.yaml"],
    "ddp": ["--config_file", "cpu_ddp.yaml"],
    "zero2": ["--config_file", "zero2.yaml", "--num_processes", "2"],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder and results of every engine; all cases of one engine share one launch."""
    folder = tmp_path_factory.mktemp("engines")
    configs = ROOT / "accelerate_configs"
    return {
        engine: (folder / engine, launch(folder / engine, flags[0], str(configs / flags[1]), *flags[2:]))
        for engine, flags in ENGINES.items()
    }


pytestmark = [pytest.mark.slow, pytest.mark.distributed]


def test_engines_really_are_what_they_are_called(runs):
    for result in runs["ddp"][1].values():
        assert result["world"] == 2 and result["wrapped"] and result["engine"] == "MULTI_CPU"
    for result in runs["zero2"][1].values():
        assert result["world"] == 2 and result["engine"] == "DEEPSPEED" and result["zero_stage"] == 2
    for result in runs["single"][1].values():
        assert result["world"] == 1 and not result["wrapped"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("engine", ENGINES)
def test_losses_and_gradients_do_not_depend_on_ranks_or_accumulation(runs, engine, case):
    """Labels per micro-batch are uneven and RDM is on; the reference is one process without accumulation."""
    reference, found = runs["single"][1]["accumulation-1"], runs[engine][1][case]
    for name in ("losses", "lm_losses", "rdm_losses"):
        assert len(found[name]) == 4
        assert found[name] == pytest.approx(reference[name], abs=1e-5), name
    assert found["grad_norms"] == pytest.approx(reference["grad_norms"], abs=1e-4)
    if engine == "zero2":  # it keeps gradients in its own buffers; the norms above speak for them
        assert not found["gradients"]
        return
    for name, values in reference["gradients"].items():
        torch.testing.assert_close(
            torch.tensor(found["gradients"][name]), torch.tensor(values), atol=1e-5, rtol=0, msg=name
        )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("engine", ENGINES)
def test_exported_adapters_agree(runs, engine, case):
    wanted = load_file(runs["single"][0] / "accumulation-1" / "adapter_model.safetensors")
    found = load_file(runs[engine][0] / case / "adapter_model.safetensors")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-4, rtol=0, msg=name)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("engine", ["ddp", "zero2"])
def test_all_ranks_end_with_the_same_hypernetworks(runs, engine, case):
    assert runs[engine][1][case]["rank_spread"] == 0


@pytest.mark.parametrize("engine", ["single", "ddp"])
def test_one_backward_per_optimizer_step_on_every_rank_count(runs, engine):
    for result in runs[engine][1].values():
        assert result["forwards_with_gradient"] == 4


def test_deepspeed_runs_the_hypernetworks_in_every_micro_batch(runs):
    for name, result in runs["zero2"][1].items():
        assert result["forwards_with_gradient"] == 4 * CASES[name]["accumulation"]
