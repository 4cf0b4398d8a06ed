"""Training with adapters that the paper never met: other ranks, roles, depths, many sources, fused projections."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from builders import lora_folder, tiny_model
from conftest import TokenRows, make_args
from heterofusion import HeteroFusionModel, HeteroFusionTrainer, load_adapter

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FUSED_TARGETS = {
    "phi3": (["qkv_proj", "gate_up_proj", "o_proj", "down_proj"], {}),
    "gpt_neox": (["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"], {}),
    "gpt2": (["c_attn", "c_proj", "c_fc"], {}),
    "falcon": (["query_key_value", "dense", "dense_h_to_4h"], {"new_decoder_architecture": True, "num_kv_heads": 2}),
}


def tiny_llama(layers, hidden=48, seed=0):
    return tiny_model("llama", seed, num_hidden_layers=layers, hidden_size=hidden, intermediate_size=2 * hidden)


def sources_of(case, folder):
    if case == "fused_source":
        base = tiny_model("phi3", num_hidden_layers=3)
        base.save_pretrained(folder / "phi3_base")
        names = FUSED_TARGETS["phi3"][0]
        return [lora_folder(base, folder / "phi3", names, base=str(folder / "phi3_base"))]
    sources = {  # layers, hidden size, modules, rank
        "ranks": [(4, 48, ALL, 2), (5, 48, ALL, 16)],
        "target_modules": [(4, 48, ["q_proj"], 4), (4, 48, ["up_proj"], 4)],
        "depths": [(7, 32, ALL, 4), (2, 80, ALL, 4)],
        "nine": [(3 + i % 3, 32, ALL[i % 3 :: 2], 4) for i in range(9)],
    }[case]
    return [
        lora_folder(tiny_llama(layers, hidden), folder / str(i), names, r=r, seed=1 + i)
        for i, (layers, hidden, names, r) in enumerate(sources)
    ]


@pytest.mark.parametrize(
    ("case", "preset"),
    [
        ("ranks", "paper"),
        ("target_modules", "compact"),
        ("depths", "paper"),
        ("nine", "compact"),
        ("fused_source", "paper"),
    ],
)
def test_two_steps_export_reload(tmp_path, case, preset):
    base = tiny_llama(4, seed=9)
    base.save_pretrained(tmp_path / "base")
    anchor = lora_folder(tiny_llama(4, seed=9), tmp_path / "anchor", ALL, r=4, seed=11)
    sources = [load_adapter(folder) for folder in sources_of(case, tmp_path)]
    args = make_args(tmp_path / "out", preset=preset)
    model = HeteroFusionModel.from_adapters(base, load_adapter(anchor), sources, args)
    check_reload(model, args, AutoModelForCausalLM.from_pretrained(tmp_path / "base"), anchor)
    if case == "target_modules":
        assert {key.role for key in model.plan.groups} == {"q_proj", "up_proj"}
    if case == "fused_source":
        assert {key.role for key in model.plan.groups} == set(ALL)
    if case == "nine":
        assert any(context.ragged for context in model.updates.predictor.contexts.values())


@pytest.mark.parametrize("family", FUSED_TARGETS)
def test_target_with_fused_projections(tmp_path, family):
    names, overrides = FUSED_TARGETS[family]
    tiny_model(family, **overrides).save_pretrained(tmp_path / "base")
    anchor = lora_folder(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "anchor", names, r=4)
    source = load_adapter(lora_folder(tiny_llama(3), tmp_path / "llama", ALL, r=4, seed=5))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    args = make_args(tmp_path / "out")
    model = HeteroFusionModel.from_adapters(base, load_adapter(anchor), [source], args)
    assert {"q_proj", "k_proj", "v_proj", "up_proj"} <= {key.role for key in model.plan.groups}
    check_reload(model, args, AutoModelForCausalLM.from_pretrained(tmp_path / "base"), anchor)


def test_fused_target_takes_updates_role_by_role(tmp_path):
    """A source without k moves q and v rows only."""
    tiny_model("phi3").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    anchor = lora_folder(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "anchor", ["qkv_proj"], r=4
    )
    source = load_adapter(lora_folder(tiny_llama(3), tmp_path / "llama", ["q_proj", "v_proj"], r=4, seed=5))
    args = make_args(tmp_path / "out")
    model = HeteroFusionModel.from_adapters(base, load_adapter(anchor), [source], args)
    trainer = HeteroFusionTrainer(model, args, train_dataset=TokenRows())
    trainer.train()
    trainer.save_model()
    name = "base_model.model.model.layers.1.self_attn.qkv_proj.lora_B.weight"
    fused = load_file(tmp_path / "out/adapter_model.safetensors")[name]
    moved = (fused != load_file(anchor / "adapter_model.safetensors")[name]).any(dim=1)
    assert moved.tolist() == [True] * 32 + [False] * 16 + [True] * 16


def check_reload(model, args, base, anchor):
    trainer = HeteroFusionTrainer(model, args, train_dataset=TokenRows())
    trainer.train()
    trainer.save_model()
    rows = TokenRows(3, seed=2)
    ids = torch.stack([rows[i]["input_ids"] for i in range(3)])
    with torch.no_grad():
        live = model(input_ids=ids).logits
        reloaded = PeftModel.from_pretrained(base, args.output_dir)
        found = reloaded(input_ids=ids).logits
        reloaded.load_adapter(str(anchor), "anchor")
        reloaded.set_adapter("anchor")
        before = reloaded(input_ids=ids).logits
    torch.testing.assert_close(found, live, atol=1e-5, rtol=0)
    assert (found - before).abs().max() > 1e-4
    record = json.loads((trainer.export(args.output_dir) / "fusion.json").read_text())
    assert record["training"]["steps"] == 2
    assert [source["sha256"] for source in record["sources"]] == [s.sha256 for s in model.plan.sources]
