"""What a fusion tells of itself, module by module."""

import math

import pytest

from conftest import make_args, make_model, perturb
from heterofusion.method.diagnostics import adapter_diagnostics, diagnostic_logs


@pytest.fixture
def fusion(tmp_path):
    return perturb(make_model(make_args(tmp_path)))


def test_every_aligned_module_is_told(fusion):
    report, deltas = adapter_diagnostics(fusion), fusion.module_deltas()
    assert report["target"] == {"name": "target_llama", "layers": 4}
    assert report["sources"] == [{"name": "source_qwen2", "layers": 6}, {"name": "source_mistral", "layers": 3}]
    assert len(report["modules"]) == len(fusion.plan.aligned)
    found = {(m["role"], m["layer"]): [(s["source"], s["layer"]) for s in m["sources"]] for m in report["modules"]}
    assert found["q_proj", 3] == [(0, 5), (1, 2)]  # tail alignment
    assert found["q_proj", 0] == [(0, 2)]
    assert found["gate_proj", 3] == [(0, 5)]  # the second source has q, v and down only
    for module in report["modules"]:
        assert sum(source["attention"] for source in module["sources"]) == pytest.approx(1, abs=1e-5)
        assert 0 <= module["gate_sparsity"] <= 1
        weight = fusion.plan.target.modules[module["path"]].lora_B
        assert module["delta_ratio"] == pytest.approx(float(deltas[module["path"]].norm() / weight.norm()), rel=1e-4)


def test_logs_summarize_the_modules(fusion):
    logs, modules = diagnostic_logs(fusion), adapter_diagnostics(fusion)["modules"]
    own = [module for module in modules if module["role"] == "q_proj"]
    weights = [float(fusion.plan.target.modules[module["path"]].lora_B.norm()) for module in own]
    change = math.hypot(*(m["delta_ratio"] * w for m, w in zip(own, weights, strict=True)))
    assert logs["delta_ratio/q_proj"] == pytest.approx(change / math.hypot(*weights), rel=1e-4)
    # all modules of a role have equally many B blocks here, and all roles equally many modules
    first = [sum(s["attention"] for s in module["sources"] if s["source"] == 0) for module in modules]
    assert logs["attention/1-source_qwen2"] == pytest.approx(sum(first) / len(first), rel=1e-4)
    assert logs["attention/2-source_mistral"] == pytest.approx(1 - sum(first) / len(first), rel=1e-4)
