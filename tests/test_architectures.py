"""Roles and fused projections, checked against the transformers implementations themselves."""

import json
from unittest import mock

import pytest
import torch
import transformers.models.falcon.modeling_falcon as falcon
import transformers.models.gpt2.modeling_gpt2 as gpt2
import transformers.models.gpt_neox.modeling_gpt_neox as gpt_neox
import transformers.models.phi3.modeling_phi3 as phi3

from builders import FAMILIES, input_ids, linear_layers, lora_folder, tiny_config, tiny_model, write_adapter
from heterofusion import AdapterError, load_adapter
from heterofusion.adapters.architectures import (
    ROLES,
    module_key,
    module_keys,
    read_source_configs,
    role_rows,
)
from heterofusion.runtime.errors import UserError
from heterofusion.runtime.loading import load_base_config

QKV = ("q_proj", "k_proj", "v_proj")
SEPARATE = {
    **{f"self_attn.{role}_proj": (f"{role}_proj",) for role in "qkvo"},
    **{f"mlp.{role}_proj": (f"{role}_proj",) for role in ("gate", "up", "down")},
}
MLP = {"mlp.dense_h_to_4h": ("up_proj",), "mlp.dense_4h_to_h": ("down_proj",)}
EXPECTED = {
    "phi3": {
        "self_attn.qkv_proj": QKV, "self_attn.o_proj": ("o_proj",),
        "mlp.gate_up_proj": ("gate_proj", "up_proj"), "mlp.down_proj": ("down_proj",),
    },
    "gpt_neox": {"attention.query_key_value": QKV, "attention.dense": ("o_proj",), **MLP},
    "gpt2": {
        "attn.c_attn": QKV, "attn.c_proj": ("o_proj",), "mlp.c_fc": ("up_proj",), "mlp.c_proj": ("down_proj",),
    },
    "falcon": {"self_attention.query_key_value": QKV, "self_attention.dense": ("o_proj",), **MLP},
}  # fmt: skip
FALCON_FORMS = {
    "falcon 7B, one key-value head": {"multi_query": True, "new_decoder_architecture": False},
    "falcon 40B, grouped key-value heads": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon rw, a key-value head each": {"multi_query": False, "new_decoder_architecture": False},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_layer_of_a_family_has_its_role(family):
    model = tiny_model(family)
    keys = {path: module_key(path) for path in linear_layers(model)}
    inside = {path: key for path, key in keys.items() if key is not None}
    assert [path for path, key in keys.items() if key is None] == ["lm_head"]
    expected = EXPECTED.get(family, SEPARATE)
    for layer in range(model.config.num_hidden_layers):
        assert {key.suffix: key.roles for key in inside.values() if key.layer == layer} == expected
    assert len(inside) == 2 * len(expected)
    assert {path.partition(f".{key.layer}.")[2] for path, key in inside.items()} == set(expected)
    assert all(key.is_fused == (len(key.roles) > 1) for key in inside.values())
    assert {role for key in inside.values() for role in key.roles} <= set(ROLES)


@pytest.mark.parametrize(
    ("path", "layer", "roles", "suffix"),
    [
        ("model.layers.11.mlp.experts.3.gate_proj", 11, ("gate_proj",), "mlp.experts.3.gate_proj"),
        ("model.layers.11.mlp.shared_expert.down_proj", 11, ("down_proj",), "mlp.shared_expert.down_proj"),
        ("model.language_model.layers.5.self_attn.q_proj", 5, ("q_proj",), "self_attn.q_proj"),
    ],
)
def test_moe_experts_are_told_apart_and_a_language_model_is_found(path, layer, roles, suffix):
    key = module_key(path)
    assert (key.layer, key.roles, key.suffix) == (layer, roles, suffix)


@pytest.mark.parametrize(
    "path",
    [
        "model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj",
        "model.visual.blocks.3.attn.qkv",
        "model.audio_tower.layers.1.self_attn.v_proj",
        "model.multi_modal_projector.linear_1",
        "lm_head",
        "model.embed_tokens",
    ],
)
def test_modules_outside_the_language_layers_have_no_key(path):
    assert module_key(path) is None


@pytest.mark.parametrize(
    "suffix",
    ["mlp.gate", "self_attn.W_pack", "attn.q", "block_sparse_moe.experts.0.w1", "c_attn", "mlp.dense", "q_proj.extra"],
)
def test_unknown_role_raises(suffix, tmp_path):
    path = f"model.layers.4.{suffix}"
    with pytest.raises(AdapterError, match=rf"module {path} has no known role \('{suffix}'\); known are .*q_proj"):
        module_key(path)
    adapter = load_adapter(write_adapter(tmp_path, {path: (8, 8)}))
    with pytest.raises(AdapterError, match=rf"{adapter.weights_file}: module {path} has no known role"):
        module_keys(adapter)


# Rows of fused projections, proven on the models: what the rows select out of the projection's output is compared
# with the q, k and v that the model's own code made of the same output.


def recorded(monkeypatch, owner, name, keep) -> list:
    """Patch a function of the model's code; the list fills with `keep(arguments, result)` of each call."""
    calls, original = [], getattr(owner, name)

    def wrapper(*args, **kwargs):
        result = original(*args, **kwargs)
        calls.append(keep(args, result))
        return result

    monkeypatch.setattr(owner, name, wrapper)
    return calls


def projection_output(model, path) -> torch.Tensor:
    """Run the model once and give what the projection of layer 0 put out."""
    outputs = []
    model.get_submodule(path).register_forward_hook(lambda _, __, output: outputs.append(output))
    with torch.no_grad():
        model(input_ids=input_ids(2, 7), use_cache=False)
    return outputs[0]


def flat_heads(states):
    """(batch, heads, length, dim) to (batch, length, heads * dim)."""
    return states.transpose(1, 2).flatten(2)


def check_rows(model, path, fused, states):
    """The rows that the table calls q, k, v select exactly the model's own q, k, v out of the fused output."""
    rows = role_rows(module_key(path), fused.shape[-1], model.config)
    assert tuple(rows) == QKV
    for role, expected in zip(QKV, states, strict=True):
        assert torch.equal(fused[..., rows[role]], expected), role
    assert torch.equal(torch.cat(list(rows.values())).sort().values, torch.arange(fused.shape[-1]))
    # a wrong table would be noticed: the roles' rows hold different numbers
    assert not torch.equal(fused[..., rows["k_proj"]], fused[..., rows["v_proj"]])


def check_rotary_model(monkeypatch, model, path, code):
    """For models whose code rotates q and k, and hands v to the attention function."""
    model.set_attn_implementation("eager")
    rotated = recorded(monkeypatch, code, "apply_rotary_pos_emb", lambda args, _: args[:2])
    attended = recorded(monkeypatch, code, "eager_attention_forward", lambda args, _: args[3])
    fused = projection_output(model, path)
    check_rows(model, path, fused, [flat_heads(states) for states in (*rotated[0], attended[0])])


@pytest.mark.parametrize("kv_heads", [2, 4, 1])
def test_rows_of_phi3_are_those_of_the_model(monkeypatch, kv_heads):
    model = tiny_model("phi3", num_key_value_heads=kv_heads)
    check_rotary_model(monkeypatch, model, "model.layers.0.self_attn.qkv_proj", phi3)


def test_rows_of_phi3_mlp_are_those_of_the_model():
    model = tiny_model("phi3")
    path = "model.layers.0.mlp.gate_up_proj"
    mlp = model.get_submodule("model.layers.0.mlp")
    seen = {}
    mlp.gate_up_proj.register_forward_hook(lambda _, __, output: seen.update(fused=output))
    mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.update(product=args[0]))
    activated = []
    mlp.activation_fn.register_forward_hook(lambda _, args, __: activated.append(args[0]))
    with torch.no_grad():
        model(input_ids=input_ids(2, 7))
    fused = seen["fused"]
    rows = role_rows(module_key(path), fused.shape[-1], model.config)
    assert torch.equal(fused[..., rows["gate_proj"]], activated[0])
    up = fused[..., rows["up_proj"]]
    assert torch.equal(up * torch.nn.functional.silu(activated[0]), seen["product"])
    assert sorted(rows) == ["gate_proj", "up_proj"]


def test_rows_of_gpt_neox_are_those_of_the_model(monkeypatch):
    check_rotary_model(monkeypatch, tiny_model("gpt_neox"), "gpt_neox.layers.0.attention.query_key_value", gpt_neox)


def test_rows_of_gpt2_are_those_of_the_model(monkeypatch):
    model, path = tiny_model("gpt2"), "transformer.h.0.attn.c_attn"
    model.set_attn_implementation("eager")
    attended = recorded(monkeypatch, gpt2, "eager_attention_forward", lambda args, _: args[1:4])
    fused = projection_output(model, path)
    check_rows(model, path, fused, [flat_heads(states) for states in attended[0]])


@pytest.mark.parametrize("form", FALCON_FORMS.values(), ids=FALCON_FORMS)
def test_rows_of_falcon_are_those_of_the_model(monkeypatch, form):
    model, path = tiny_model("falcon", **form), "transformer.h.0.self_attention.query_key_value"
    split = recorded(monkeypatch, falcon.FalconAttention, "_split_heads", lambda _, result: result)
    fused = projection_output(model, path)
    q, k, v = split[0]
    # the 40B form hands k and v on once per query head of their group
    group = 2 if form["new_decoder_architecture"] else 1
    assert torch.equal(k[:, :, ::group].repeat_interleave(group, dim=2), k)
    check_rows(model, path, fused, [q.flatten(2), k[:, :, ::group].flatten(2), v[:, :, ::group].flatten(2)])


def test_rows_of_a_language_model_inside_a_multimodal_config():
    config = tiny_config("phi3")
    outer = mock.Mock(model_type="llava", get_text_config=lambda: config)
    key = module_key("model.language_model.layers.0.self_attn.qkv_proj")
    assert torch.equal(role_rows(key, 64, outer)["v_proj"], torch.arange(48, 64))


@pytest.mark.parametrize(
    ("family", "path", "out", "expected"),
    [
        ("phi3", "model.layers.0.self_attn.qkv_proj", 96, 64),
        ("phi3", "model.layers.0.mlp.gate_up_proj", 64, 96),
        ("gpt_neox", "gpt_neox.layers.0.attention.query_key_value", 48, 96),
        ("gpt2", "transformer.h.0.attn.c_attn", 97, 96),
        ("falcon", "transformer.h.0.self_attention.query_key_value", 96, 48),
    ],
)
def test_rows_that_the_config_does_not_give_raise(family, path, out, expected):
    found = rf"{module_key(path).suffix} has {out} rows in lora_B, but a {family} .* gives {expected}; "
    with pytest.raises(AdapterError, match=found):
        role_rows(module_key(path), out, tiny_config(family))


@pytest.mark.parametrize(
    ("path", "family", "known"),
    [
        ("model.layers.0.self_attn.qkv_proj", "llama", "phi3"),
        ("transformer.h.0.attn.c_attn", "gpt_bigcode", "gpt2"),
        ("transformer.h.0.self_attention.query_key_value", "bloom", "falcon"),
        ("gpt_neox.layers.0.attention.query_key_value", "falcon", "gpt_neox"),
    ],
)
def test_unknown_layout_raises(path, family, known):
    config = mock.Mock(model_type=family)
    config.get_text_config.return_value = config
    with pytest.raises(AdapterError, match=rf"known for model_type {known} only, not for '{family}'"):
        role_rows(module_key(path), 96, config)


@pytest.mark.parametrize("heads", [(4, 3), (0, 1), (4, 0)])
def test_heads_that_do_not_divide_raise(heads):
    form = {"new_decoder_architecture": True, "num_attention_heads": heads[0], "num_kv_heads": heads[1]}
    config = mock.Mock(model_type="falcon", **form)
    config.get_text_config.return_value = config
    with pytest.raises(AdapterError, match=rf"{heads[0]} heads and {heads[1]} key-value heads cannot be split"):
        role_rows(module_key("transformer.h.0.self_attention.query_key_value"), 80, config)


# Where the configs of sources come from.


@pytest.fixture
def phi3_base(tmp_path):
    """A folder with nothing but a Phi-3's config.json."""
    tiny_config("phi3").save_pretrained(tmp_path / "phi3")
    return tmp_path / "phi3"


@pytest.fixture
def fused_source(tmp_path, phi3_base):
    model = tiny_model("phi3")
    return load_adapter(lora_folder(model, tmp_path / "fused", ["qkv_proj"], base=str(phi3_base)))


@pytest.fixture
def plain_source(tmp_path):
    return load_adapter(write_adapter(tmp_path / "plain", base_model_name_or_path="nobody/nothing"))


def test_configs_of_sources_are_read_where_they_are_needed(tmp_path, fused_source, plain_source):
    """Only a source with fused projections needs a config: the unreachable base of the other is not looked for."""
    for names in (None, ["none", "None"]):
        plain, followed = read_source_configs(names, [plain_source, fused_source])
        assert plain is None and (followed.model_type, followed.num_key_value_heads) == ("phi3", 2)
    tiny_config("phi3", num_key_value_heads=1).save_pretrained(tmp_path / "named")
    for name in (tmp_path / "named", tmp_path / "named" / "config.json"):
        plain, named = read_source_configs(["none", str(name)], [plain_source, fused_source])
        assert plain is None and named.num_key_value_heads == 1  # not that of base_model_name_or_path
    baseless = load_adapter(lora_folder(tiny_model("phi3"), tmp_path / "baseless", ["qkv_proj"], base=""))
    assert read_source_configs(None, [baseless]) == [None]


@pytest.mark.filterwarnings("ignore:Could not find a config file")
def test_configs_of_sources_that_cannot_be_read_or_counted_raise(tmp_path, plain_source):
    with pytest.raises(UserError, match="--source_configs has 3 entries for 1 sources"):
        read_source_configs(["none"] * 3, [plain_source])
    model = tiny_model("phi3")
    source = load_adapter(lora_folder(model, tmp_path / "fused", ["qkv_proj"], base="nobody/nothing"))
    with pytest.raises(UserError, match=r"source .*fused: .*'nobody/nothing' cannot be read.*--source_configs"):
        read_source_configs(None, [source])


@pytest.mark.parametrize(
    "content",
    [
        "not json",
        "[1]",
        '{"model_type": "no such type"}',
        '{"model_type": "phi3", "hidden_size": "wide"}',
        '{"model_type": "phi3", "num_attention_heads": 0}',
        '{"auto_map": {"AutoConfig": "code.Config"}, "model_type": "stranger"}',
    ],
)
def test_base_config_that_makes_no_sense_raises(tmp_path, fused_source, content):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").write_text(content)
    with pytest.raises(UserError, match="adapter") as caught:
        config = load_base_config(str(tmp_path / "bad"), "source adapter x")
        key = module_key("model.layers.0.self_attn.qkv_proj")
        role_rows(key, 64, config)
    assert str(tmp_path / "bad") in str(caught.value) or "qkv_proj" in str(caught.value)


def test_code_of_a_base_is_not_run(tmp_path):
    """A config with code of its own is refused, not imported."""
    (tmp_path / "code.py").write_text("raise SystemExit('ran')")
    content = {"auto_map": {"AutoConfig": "code.Config"}, "model_type": "stranger"}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="cannot be read"):
        load_base_config(str(tmp_path), "source adapter x")
