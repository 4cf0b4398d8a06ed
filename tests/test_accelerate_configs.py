"""Every file in accelerate_configs is read by accelerate and named by a command in the docs."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import ComputeEnvironment

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "accelerate_configs").iterdir())
EXPECTED = {
    "single": ("NO", 1, "no"),
    "ddp": ("MULTI_GPU", 8, "bf16"),
    "cpu_ddp": ("MULTI_GPU", 2, "no"),
    "zero1": ("DEEPSPEED", 8, "bf16"),
    "zero2": ("DEEPSPEED", 8, "bf16"),
    "zero3": ("DEEPSPEED", 8, "bf16"),
    "fsdp2": ("FSDP", 8, "bf16"),
    "multi_node": ("MULTI_GPU", 16, "bf16"),
}


def test_all_configs_are_known():
    assert {path.stem for path in CONFIGS} == set(EXPECTED)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_parses_and_is_used_in_the_docs(path):
    config = load_config_from_file(str(path))
    assert config.compute_environment == ComputeEnvironment.LOCAL_MACHINE
    engine, processes, precision = EXPECTED[path.stem]
    assert config.distributed_type.value == engine
    assert config.num_processes == processes
    assert config.mixed_precision == precision
    if engine == "DEEPSPEED":
        assert config.deepspeed_config["zero_stage"] == int(path.stem[-1])
    if engine == "FSDP":
        assert config.fsdp_config["fsdp_version"] == 2
    assert config.num_machines == (2 if path.stem == "multi_node" else 1)
    docs = (ROOT / "README.md").read_text() + (ROOT / "recipes" / "README.md").read_text()
    assert f"--config_file accelerate_configs/{path.name}" in docs
