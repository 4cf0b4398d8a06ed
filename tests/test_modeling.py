"""The live model: what is trainable, what the update does, and that the exported adapter is the live one."""

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, PeftModelForCausalLM
from transformers import AutoModelForCausalLM

from builders import lora_folder, tiny_model
from conftest import GOLDEN, TINY, fresh_base, logits, perturb, token_batch
from heterofusion import AdapterError, HeteroFusionModel, MethodConfig, load_adapter
from heterofusion.method.config import HypernetworkConfig
from heterofusion.method.model import hypernetwork_config


def test_is_a_peft_model_and_only_hypernetworks_train_in_fp32(model):
    assert isinstance(model, PeftModelForCausalLM)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {f"hypernetworks.{name}" for name, _ in model.hypernetworks.named_parameters()}
    assert all(p.dtype == torch.float32 for p in model.hypernetworks.parameters())
    assert not [name for name in trainable if "lora_" in name]


def test_starts_as_the_target_exactly(base, target, sources):
    fusion = HeteroFusionModel.from_adapters(base, target, sources, MethodConfig(**TINY))
    plain = PeftModel.from_pretrained(fresh_base(), GOLDEN / "target_llama")
    assert torch.equal(logits(fusion), logits(plain))


def test_update_is_alpha_delta_added_to_lora_b(model, target):
    deltas = model.module_deltas()
    path = "model.layers.2.self_attn.q_proj"
    x = torch.randn(3, target.modules[path].in_features)
    layer = model.get_base_model().get_submodule(path)
    with torch.no_grad():
        model.updates.refresh()
        found = layer(x)
        module = target.modules[path]
        low = F.linear(x, module.lora_A)
        wanted = layer.base_layer(x) + module.scaling * F.linear(low, module.lora_B + deltas[path])
    assert deltas[path].abs().max() > 1e-4
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_cached_updates_follow_the_parameters(model):
    with torch.no_grad():
        before = logits(model)
        calls = count_calls(model)
        assert torch.equal(logits(model), before)
        assert calls == []
        for alpha in model.hypernetworks.alphas.values():
            alpha.mul_(2)
        after = logits(model)
    assert len(calls) == len(model.plan.groups)
    assert not torch.allclose(after, before)


def count_calls(model):
    calls: list[str] = []
    for name, network in model.hypernetworks.networks.items():
        network.register_forward_hook(lambda *_, name=name: calls.append(name))
    return calls


def test_generate_uses_current_updates(model):
    prompt = token_batch(2, 5)["input_ids"]
    mask = torch.ones_like(prompt)
    options = {"input_ids": prompt, "attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    live = model.generate(**options)
    with torch.no_grad():
        for alpha in model.hypernetworks.alphas.values():
            alpha.zero_()
    anchor = model.generate(**options)
    plain = PeftModel.from_pretrained(fresh_base(), GOLDEN / "target_llama")
    assert torch.equal(anchor, plain.generate(**options))
    assert not torch.equal(live, anchor)


def test_fuse_gives_a_plain_peft_model_with_the_same_logits(model):
    live = logits(model)
    plain = model.fuse()
    assert type(plain) is PeftModelForCausalLM
    assert not hasattr(plain, "hypernetworks")
    torch.testing.assert_close(logits(plain), live, atol=1e-5, rtol=0)
    assert not [m for m in plain.modules() if m._forward_hooks]
    assert not plain.training
    torch.testing.assert_close(logits(plain.merge_and_unload()), live, atol=1e-4, rtol=0)


def test_what_would_leave_out_the_updates_raises(model, tmp_path):
    with pytest.raises(NotImplementedError, match="export_adapter"):
        model.save_pretrained(tmp_path)
    with pytest.raises(NotImplementedError, match="fuse"):
        model.merge_adapter()
    with pytest.raises(TypeError, match="cannot be copied"):
        copy.deepcopy(model)


def test_only_a_closing_forward_takes_the_collected_gradients(model):
    """A forward with gradients between two micro-batches leaves the window's sum alone."""
    batch, alpha = token_batch(), model.hypernetworks.alphas["q_proj_r4"]

    def gradient(peek):
        model.zero_grad()
        with model.updates.collect_gradients():
            model(**batch).loss.backward()
        if peek:
            model(**batch).loss.item()
        with model.updates.close_window():
            model(**batch).loss.backward()
        return alpha.grad.clone()

    wanted = gradient(peek=False)
    torch.testing.assert_close(gradient(peek=True), wanted)
    model.zero_grad()
    model(**batch).loss.backward()
    torch.testing.assert_close(wanted, 2 * alpha.grad, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("preset", ["paper", "compact"])
def test_activation_checkpointing_gives_equal_gradients(base, target, sources, preset):
    model = perturb(HeteroFusionModel.from_adapters(base, target, sources, MethodConfig(**{**TINY, "preset": preset})))

    def gradients():
        model.train()
        model.zero_grad()
        model(**token_batch()).loss.backward()
        return [p.grad.clone() for p in model.hypernetworks.parameters() if p.grad is not None]

    plain = gradients()
    model.activation_checkpointing_enable()
    layers = model.get_base_model().model.layers
    seen = []
    hook = layers[1].self_attn.register_forward_hook(lambda *_: seen.append(1))
    checkpointed = gradients()
    hook.remove()
    assert len(seen) == 2, "the layer was not recomputed, so nothing was checkpointed"
    for a, b in zip(plain, checkpointed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_base_with_reentrant_checkpointing_raises(base, target, sources):
    base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match="reentrant"):
        HeteroFusionModel.from_adapters(base, target, sources, MethodConfig(**TINY))


def test_bfloat16_base_keeps_hypernetworks_in_fp32(target, sources):
    base = AutoModelForCausalLM.from_pretrained(GOLDEN / "base_llama", dtype=torch.bfloat16)
    model = perturb(HeteroFusionModel.from_adapters(base, target, sources, MethodConfig(**TINY)))
    seen = []
    for network in model.hypernetworks.networks.values():
        network.register_forward_hook(lambda module, args, out: seen.append((args[0].blocks.dtype, out.update.dtype)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**token_batch()).loss
    loss.backward()
    assert set(seen) == {(torch.float32, torch.float32)}
    assert all(p.grad.dtype == torch.float32 for p in model.hypernetworks.alphas.values())


DROPOUT = {
    "llama": (["q_proj", "v_proj"], {"attention_dropout": 0.5}),
    "gpt2": (["c_fc"], {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}),
    "falcon": (["dense_h_to_4h"], {"hidden_dropout": 0.5, "attention_dropout": 0.5}),
}


@pytest.mark.parametrize("kind", DROPOUT)
def test_dropout_of_the_base_is_off_in_training(tmp_path, sources, kind):
    names, rates = DROPOUT[kind]
    anchor = load_adapter(lora_folder(tiny_model(kind), tmp_path / "anchor", names))
    base = tiny_model(kind, **rates)
    fusion = HeteroFusionModel.from_adapters(base, anchor, sources, MethodConfig(**TINY))
    fusion.train()
    assert fusion.training and fusion.hypernetworks.training
    first, second = logits(fusion), logits(fusion)
    assert torch.equal(first, second)
    assert torch.equal(first, logits(fusion.eval()))
    fusion.fuse()
    assert all(getattr(base.config, name) == rate for name, rate in rates.items())


def test_base_of_another_shape_raises(target, sources):
    with pytest.raises(AdapterError, match=r"maps \d+ to \d+ features, but .* has \d+ to \d+"):
        HeteroFusionModel.from_adapters(tiny_model("llama"), target, sources, MethodConfig(**TINY))


def test_sequence_longer_than_position_table_raises(base, target, sources):
    with pytest.raises(ValueError, match="max_position_embeddings"):
        HeteroFusionModel.from_adapters(
            base, target, sources, MethodConfig(**{**TINY, "block_size": 4, "max_position_embeddings": 8})
        )


@pytest.mark.parametrize(
    ("field", "value"),
    [("block_size", 0), ("embed_dim", 30), ("num_heads", 0), ("rdm_weight", -1.0), ("alpha_init", 0.0),
     ("rdm_sigma", float("nan")), ("preset", "huge"), ("rdm_projections", 0)],
)  # fmt: skip
def test_settings_out_of_range_raise(base, target, sources, field, value):
    with pytest.raises(ValueError, match=field):
        HeteroFusionModel.from_adapters(base, target, sources, MethodConfig(**{**TINY, field: value}))


def test_tiny_models_get_tiny_hypernetworks_and_8b_the_paper_sizes(model):
    config = hypernetwork_config(model.plan, MethodConfig(preset="paper"))
    assert (config.block_size, config.embed_dim, config.num_heads) == (64, 128, 8)
    large = HypernetworkConfig.fitted("paper", 4096)
    assert (large.block_size, large.embed_dim, large.num_heads, large.max_position_embeddings) == (4096, 1024, 8, 4096)
    sizes = [HypernetworkConfig.fitted("paper", width).block_size for width in (16, 80, 2048, 3584, 8192)]
    assert sizes == [64, 64, 2048, 4096, 4096]


def test_initialization_is_seeded_and_leaves_the_generators_of_all_devices(base, target, sources, monkeypatch):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("GPUs were reseeded"))
    a = HeteroFusionModel.from_adapters(base, target, sources, MethodConfig(**TINY), seed=1)
    assert torch.equal(torch.rand(3), expected)
    b = HeteroFusionModel.from_adapters(fresh_base(), target, sources, MethodConfig(**TINY), seed=1)
    c = HeteroFusionModel.from_adapters(fresh_base(), target, sources, MethodConfig(**TINY), seed=2)
    state = torch.get_rng_state()
    a.fuse()
    assert torch.equal(torch.get_rng_state(), state)
    name = "networks.q_proj_r4.features.views.weight"
    assert torch.equal(a.hypernetworks.state_dict()[name], b.hypernetworks.state_dict()[name])
    assert not torch.equal(a.hypernetworks.state_dict()[name], c.hypernetworks.state_dict()[name])
