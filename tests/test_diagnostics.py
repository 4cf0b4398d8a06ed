"""What a fusion tells of itself, module by module."""

import math

import pytest

from conftest import make_args, make_model, perturb
from heterofusion.method.diagnostics import adapter_diagnostics, fusion_diagnostics


@pytest.fixture
def fusion(tmp_path):
    return perturb(make_model(make_args(tmp_path)))


def test_every_aligned_module_is_told_with_its_layers(fusion):
    report = adapter_diagnostics(fusion)
    assert report["target"] == {"name": "target_llama", "layers": 4}
    assert report["sources"] == [{"name": "source_qwen2", "layers": 6}, {"name": "source_mistral", "layers": 3}]
    assert len(report["modules"]) == len(fusion.plan.aligned)
    found = {(m["role"], m["layer"]): [(s["source"], s["layer"]) for s in m["sources"]] for m in report["modules"]}
    assert found["q_proj", 3] == [(0, 5), (1, 2)]  # tail alignment
    assert found["q_proj", 0] == [(0, 2)]
    assert found["gate_proj", 3] == [(0, 5)]  # the second source has q, v and down only


def test_shares_of_attention_sum_to_one_per_module(fusion):
    for module in adapter_diagnostics(fusion)["modules"]:
        assert sum(source["attention"] for source in module["sources"]) == pytest.approx(1, abs=1e-5)
        assert 0 <= module["gate_sparsity"] <= 1


def test_delta_ratio_is_that_of_the_module(fusion):
    deltas = fusion.module_deltas()
    for module in adapter_diagnostics(fusion)["modules"]:
        weight = fusion.plan.target.modules[module["path"]].lora_B
        assert module["delta_ratio"] == pytest.approx(float(deltas[module["path"]].norm() / weight.norm()), rel=1e-4)


def test_groups_summarize_their_modules(fusion):
    groups = fusion_diagnostics(fusion)
    modules = [module for module in adapter_diagnostics(fusion)["modules"] if module["role"] == "q_proj"]
    weights = [float(fusion.plan.target.modules[module["path"]].lora_B.norm()) for module in modules]
    change = math.hypot(*(m["delta_ratio"] * w for m, w in zip(modules, weights, strict=True)))
    assert groups["q_proj_r4"]["delta_ratio"] == pytest.approx(change / math.hypot(*weights), rel=1e-4)
    # all modules of a role have equally many B blocks here
    first = [sum(s["attention"] for s in module["sources"] if s["source"] == 0) for module in modules]
    assert groups["q_proj_r4"]["attention/0"] == pytest.approx(sum(first) / len(first), rel=1e-4)
