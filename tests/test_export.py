"""The exported adapter: the anchor bit for bit where nothing changed, the live model where something did."""

import json
import os

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from builders import CONFIG, WEIGHTS
from conftest import GOLDEN, TINY, fresh_base, logits, perturb
from heterofusion import AdapterError, HeteroFusionModel, MethodConfig, load_adapter
from heterofusion.publish.write import ExportError, export_adapter
from recipe_runner import TARGET, contents, copy_adapter


@pytest.fixture
def fuse(sources):
    """A fusion of which an adapter in a folder is the target."""
    return lambda folder: HeteroFusionModel.from_adapters(
        fresh_base(), load_adapter(folder), sources, MethodConfig(**TINY)
    )


@pytest.mark.parametrize(
    "changes",
    [{}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 3}}, {"lora_dropout": 0.3}],
    ids=["lora", "rslora", "alpha_pattern", "dropout"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_zero_update_exports_the_target_bit_for_bit(tmp_path, fuse, changes, dtype):
    def change(weights):
        weights.update({key: tensor.to(dtype) for key, tensor in weights.items()})
        weights[next(key for key in weights if "lora_B" in key)][0, 0] = -0.0  # adding +0 would lose the sign

    folder = copy_adapter(tmp_path / "anchor", TARGET, changes, change)
    export_adapter(fuse(folder), tmp_path / "fused")
    assert_same_bits(load_file(tmp_path / "fused" / WEIGHTS), load_file(folder / WEIGHTS))
    kept, original = (json.loads((path / CONFIG).read_text()) for path in (tmp_path / "fused", folder))
    for key in ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "lora_dropout"):
        assert kept[key] == original[key]


def assert_same_bits(found, wanted):
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.equal(found[key].view(torch.uint8), tensor.view(torch.uint8)), key


def test_zero_update_keeps_rank_pattern_and_modules_to_save(tmp_path, fuse):
    lora = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 2},
        modules_to_save=["lm_head"], task_type="CAUSAL_LM",
    )  # fmt: skip
    anchor = get_peft_model(fresh_base(), lora)
    with torch.no_grad():
        for name, parameter in anchor.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    anchor.save_pretrained(tmp_path / "anchor")
    wanted = load_file(tmp_path / "anchor" / WEIGHTS)
    assert any("lm_head" in key for key in wanted)
    fusion = fuse(tmp_path / "anchor")
    assert {key.rank for key in fusion.plan.groups} == {2, 4}
    torch.testing.assert_close(logits(fusion), logits(anchor.eval()), atol=1e-5, rtol=0)
    export_adapter(fusion, tmp_path / "fused")
    assert_same_bits(load_file(tmp_path / "fused" / WEIGHTS), wanted)
    live = logits(perturb(fusion))
    export_adapter(fusion, tmp_path / "fused")
    reloaded = PeftModel.from_pretrained(fresh_base(), tmp_path / "fused")
    torch.testing.assert_close(logits(reloaded), live, atol=1e-5, rtol=0)


def test_exported_adapter_in_other_dtypes_and_merged(tmp_path, model):
    live = logits(model)
    export_adapter(model, tmp_path)
    reloaded = PeftModel.from_pretrained(fresh_base(), tmp_path)
    torch.testing.assert_close(logits(reloaded), live, atol=1e-5, rtol=0)
    torch.testing.assert_close(logits(reloaded.merge_and_unload()), live, atol=1e-4, rtol=0)
    for dtype, tolerance in ((torch.bfloat16, 0.1), (torch.float16, 0.02)):
        base = AutoModelForCausalLM.from_pretrained(GOLDEN / "base_llama", dtype=dtype)
        loaded = PeftModel.from_pretrained(base, tmp_path)
        torch.testing.assert_close(logits(loaded), live, atol=tolerance, rtol=0)


def test_non_finite_update_raises_and_keeps_the_last_export(tmp_path, model):
    export_adapter(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model.hypernetworks.alphas["q_proj_r4"].data.fill_(float("inf"))
    with pytest.raises(ExportError, match=r"q_proj\.lora_B\.weight is not finite"):
        export_adapter(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1  # safetensors writes for the owner alone


def test_update_beyond_the_anchors_dtype_raises(tmp_path, fuse):
    def to_half(weights):
        weights.update({key: tensor.half() for key, tensor in weights.items()})

    fusion = perturb(fuse(copy_adapter(tmp_path / "anchor", TARGET, tensors=to_half)))
    fusion.hypernetworks.alphas["q_proj_r4"].data.fill_(1e9)  # finite in float32, not in float16
    with pytest.raises(ExportError, match=r"out of range for torch\.float16"):
        export_adapter(fusion, tmp_path / "fused")
    assert not (tmp_path / "fused").exists()


def test_interrupted_export_leaves_no_provenance(tmp_path, model, monkeypatch):
    """fusion.json says that the adapter beside it is complete, so it must not outlive a half-replaced one."""
    export_adapter(model, tmp_path)
    first = contents(tmp_path)
    replace = os.replace

    def killed(source, target):
        if str(target).endswith("adapter_model.safetensors"):
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("heterofusion.publish.write.os.replace", killed)
        export_adapter(model, tmp_path)
    assert not (tmp_path / "fusion.json").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".export-")]
    (tmp_path / ".export-killed").mkdir()
    export_adapter(model, tmp_path)
    again = contents(tmp_path)
    costs = [json.loads(files.pop(tmp_path / "fusion.json"))["made_by"]["cost"] for files in (first, again)]
    assert again == first and all(cost["peak_memory_bytes"] > 0 for cost in costs)


def test_anchor_with_added_tokens_needs_a_resized_base(tmp_path, sources):
    added = {"base_model.model.model.embed_tokens.weight": torch.randn(66, 48)}
    anchor = load_adapter(copy_adapter(tmp_path / "anchor", TARGET, tensors=lambda weights: weights.update(added)))
    with pytest.raises(AdapterError, match=r"embed_tokens\.weight is \(64, 48\).*\(66, 48\).*tokens were added"):
        HeteroFusionModel.from_adapters(fresh_base(), anchor, sources, MethodConfig(**TINY))
    base = fresh_base()
    base.resize_token_embeddings(66, mean_resizing=False)
    fusion = HeteroFusionModel.from_adapters(base, anchor, sources, MethodConfig(**TINY))
    export_adapter(fusion, tmp_path / "fused")
    assert_same_bits(load_file(tmp_path / "fused" / WEIGHTS), load_file(anchor.folder / WEIGHTS))
