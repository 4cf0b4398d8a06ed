"""recipes/plan.py: what feeds what, what it costs, and its errors."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from conftest import fresh_base
from heterofusion import HeteroFusionModel, MethodConfig, load_adapter, plan_alignment
from recipe_runner import MISTRAL, QWEN, TARGET, check_error, copy_adapter, error_line, flags, plan, shell, succeeds

pytestmark = pytest.mark.usefixtures("logging_restored")


def written_plan(tmp_path: Path, **values) -> dict:
    output = tmp_path / "plan.json"
    succeeds(plan.main, flags({"target_adapter": TARGET, "source_adapters": [QWEN], "output": output, **values}))
    return json.loads(output.read_text())


def widen(weights: dict) -> None:
    """Rank 4 becomes rank 8 with a full spectrum."""
    generator = torch.Generator().manual_seed(0)
    for key, tensor in list(weights.items()):
        dim = 0 if "lora_A" in key else 1
        more = 0.01 * torch.randn(tensor.shape, generator=generator)
        weights[key] = torch.cat((tensor, more), dim).contiguous()


def test_plan_says_what_feeds_what(tmp_path):
    wide = copy_adapter(tmp_path / "wide", QWEN, {"r": 8, "lora_alpha": 16, "use_rslora": True}, widen)
    summary = written_plan(tmp_path, source_adapters=[wide, MISTRAL], transfer_ratio="2/3")
    target, source = load_adapter(TARGET), load_adapter(wide)
    assert [part["layer_offset"] for part in summary["sources"]] == [-2, 1]
    assert summary["target"]["layers"] == 4 and summary["target"]["lora_modules"] == 28
    rows = {row["module"]: row for row in summary["modules"]}
    # of 4 pairs with the first source 2 are kept, of 3 with the second 2: target layers 2 and 3
    assert {row["layer"] for row in rows.values()} == {2, 3} and len(rows) == 14
    for row in rows.values():
        role, layer = row["role"], row["layer"]
        expected = [(1, layer + 2)] + [(2, layer - 1)] * (role in ("q_proj", "v_proj", "down_proj"))
        assert [(part["source"], part["layer"]) for part in row["sources"]] == expected
        assert all(part["module"].endswith(f".{role}") for part in row["sources"])
        assert (row["rank"], row["scaling"]) == (4, 2.0)
        first = row["sources"][0]
        assert (first["rank"], first["scaling"]) == (8, pytest.approx(16 / 8**0.5))
        module = source.modules[first["module"]]
        energy = torch.linalg.svdvals((module.lora_B @ module.lora_A).double()).square()
        assert first["truncated_energy"] == pytest.approx((energy[4:].sum() / energy.sum()).item(), rel=1e-3)
    assert summary["sources"][0]["max_truncated_energy"] > 0 and summary["sources"][1]["max_truncated_energy"] == 0
    assert len(summary["untouched"]) == 14
    assert set(summary["untouched"]) == set(target.modules) - set(rows)
    assert all("no source" in reason for reason in summary["untouched"].values())
    assert len(summary["sources"][0]["unused"]) == 42 - 14 and all(summary["sources"][0]["unused"].values())


def test_plan_prices_the_hypernetworks_as_they_are_built(tmp_path):
    summary = written_plan(tmp_path)
    target, sources = load_adapter(TARGET), [load_adapter(QWEN)]
    alignment = plan_alignment(target, sources)
    for preset, cost in summary["forms"].items():
        built = HeteroFusionModel(fresh_base(), alignment, MethodConfig(preset=preset)).hypernetworks
        count = sum(parameter.numel() for parameter in built.parameters())
        assert (cost["parameters"], cost["weight_bytes"], cost["optimizer_bytes"]) == (count, 4 * count, 8 * count)
        assert cost["delta_bytes"] == 4 * sum(module.lora_B.numel() for module in target.modules.values())
        assert cost["embed_dim"] == built.config.embed_dim and cost["block_size"] == built.config.block_size
    assert set(summary["forms"]) == {"paper", "compact"}


def test_plan_on_the_terminal(capsys):
    assert plan.main(flags({"target_adapter": TARGET, "source_adapters": [QWEN, MISTRAL]})) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "layer offset -2" in out and "layer offset +1" in out
    assert re.search(
        r"3 +q_proj +model\.layers\.3\.self_attn\.q_proj +4 +2 +1: 5 q_proj r4 s2; 2: 2 q_proj r4 s2", out
    )


def test_plan_that_cannot_be_written_raises(capsys, tmp_path):
    values = {"target_adapter": TARGET, "source_adapters": [QWEN]}
    for output in (tmp_path / "no" / "plan.json", tmp_path):
        error_line(capsys, plan.main, flags({**values, "output": output}), "--output", output, "another file")


@pytest.mark.parametrize("flag", ["transfer_ratio", "layer_alignment", "preset", "block_size", "output_dir"])
def test_plan_flag_out_of_range_raises(flag, capsys):
    error_line(capsys, plan.main, flags({"target_adapter": TARGET, "source_adapters": [QWEN], flag: "-3"}), flag)


CHATTY_IMPORT = """
import sys

class Chatty:
    def find_spec(self, name, path=None, target=None):
        if name == "peft":
            import logging
            logging.getLogger("some.library").warning("a kernel is missing")
sys.meta_path.insert(0, Chatty())
"""


def test_plan_error_in_a_shell(tmp_path):
    """A library that warns while it is imported must not stand beside the error."""
    (tmp_path / "sitecustomize.py").write_text(CHATTY_IMPORT)
    done = shell(
        sys.executable, "recipes/plan.py",
        *flags({"target_adapter": tmp_path / "nowhere", "source_adapters": [QWEN]}),
        PYTHONPATH=str(tmp_path),
    )  # fmt: skip
    check_error(done.returncode, done.stdout, done.stderr, tmp_path / "nowhere", "does not exist")
