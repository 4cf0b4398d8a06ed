"""Training with adapters that the paper never met: other ranks, roles, depths, many sources, fused projections."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from builders import LLAMA_ROLES, WEIGHTS, lora_folder, tiny_model
from conftest import TokenRows, make_args, token_batch
from heterofusion import HeteroFusionModel, HeteroFusionTrainer, load_adapter

ALL = list(LLAMA_ROLES)
FUSED_TARGETS = {
    "phi3": (["qkv_proj", "gate_up_proj", "o_proj", "down_proj"], {}),
    "gpt_neox": (["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"], {}),
    "gpt2": (["c_attn", "c_proj", "c_fc"], {}),
    "falcon": (["query_key_value", "dense", "dense_h_to_4h"], {"new_decoder_architecture": True, "num_kv_heads": 2}),
}


def tiny_llama(layers, hidden=48, seed=0):
    return tiny_model("llama", seed, num_hidden_layers=layers, hidden_size=hidden, intermediate_size=2 * hidden)


SOURCES = {  # layers, hidden size, modules, rank
    "ranks": [(4, 48, ALL, 2), (5, 48, ALL, 16)],
    "target_modules": [(4, 48, ["q_proj"], 4), (4, 48, ["up_proj"], 4)],
    "depths": [(7, 32, ALL, 4), (2, 80, ALL, 4)],
    "nine": [(3 + i % 3, 32, ALL[i % 3 :: 2], 4) for i in range(9)],
}


@pytest.mark.parametrize("case", [*SOURCES, "fused_source"])
def test_two_steps_export_reload(tmp_path, case):
    base = tiny_llama(4, seed=9)
    base.save_pretrained(tmp_path / "base")
    anchor = lora_folder(base, tmp_path / "anchor", ALL, r=4, seed=11)
    folders = [
        lora_folder(tiny_llama(layers, hidden), tmp_path / str(i), names, r=r, seed=1 + i)
        for i, (layers, hidden, names, r) in enumerate(SOURCES.get(case, ()))
    ]
    if case == "fused_source":
        phi3 = tiny_model("phi3", num_hidden_layers=3)
        phi3.save_pretrained(tmp_path / "phi3_base")
        names = FUSED_TARGETS["phi3"][0]
        folders = [lora_folder(phi3, tmp_path / "phi3", names, base=str(tmp_path / "phi3_base"))]
    args = make_args(tmp_path / "out", preset="compact" if case in ("target_modules", "nine") else "paper")
    sources = [load_adapter(folder) for folder in folders]
    model = HeteroFusionModel.from_adapters(base, load_adapter(anchor), sources, args)
    check_reload(model, args, tmp_path / "base", anchor)
    assert {key.role for key in model.plan.groups} == set(["q_proj", "up_proj"] if case == "target_modules" else ALL)
    if case == "nine":
        assert any(context.ragged for context in model.updates.predictor.contexts.values())


@pytest.mark.parametrize("family", FUSED_TARGETS)
def test_target_with_fused_projections(tmp_path, family):
    names, overrides = FUSED_TARGETS[family]
    base = tiny_model(family, **overrides)
    base.save_pretrained(tmp_path / "base")
    anchor = lora_folder(base, tmp_path / "anchor", names, r=4)
    roles = ["q_proj", "v_proj", "up_proj"] if family == "phi3" else ALL
    source = load_adapter(lora_folder(tiny_llama(3), tmp_path / "llama", roles, r=4, seed=5))
    args = make_args(tmp_path / "out")
    model = HeteroFusionModel.from_adapters(base, load_adapter(anchor), [source], args)
    assert {"q_proj", "v_proj", "up_proj"} <= {key.role for key in model.plan.groups} <= set(roles)
    check_reload(model, args, tmp_path / "base", anchor)
    if family == "phi3":  # a source without k moves the rows of q and v only
        name = "base_model.model.model.layers.1.self_attn.qkv_proj.lora_B.weight"
        fused, before = (load_file(folder / WEIGHTS)[name] for folder in (tmp_path / "out", anchor))
        assert (fused != before).any(dim=1).tolist() == [True] * 32 + [False] * 16 + [True] * 16


def check_reload(model, args, base, anchor):
    trainer = HeteroFusionTrainer(model, args, train_dataset=TokenRows())
    trainer.train()
    trainer.save_model()
    ids = token_batch(3, seed=2)["input_ids"]
    with torch.no_grad():
        live = model(input_ids=ids).logits
        reloaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), args.output_dir)
        found = reloaded(input_ids=ids).logits
        reloaded.load_adapter(str(anchor), "anchor")
        reloaded.set_adapter("anchor")
        before = reloaded(input_ids=ids).logits
    torch.testing.assert_close(found, live, atol=1e-5, rtol=0)
    assert (found - before).abs().max() > 1e-4
    record = json.loads((trainer.export(args.output_dir) / "fusion.json").read_text())
    assert record["training"]["steps"] == 2
    assert [source["sha256"] for source in record["sources"]] == [s.sha256 for s in model.plan.sources]
