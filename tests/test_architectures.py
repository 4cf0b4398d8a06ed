"""Roles and fused projections, checked against the transformers implementations themselves."""

import sys
from unittest import mock

import pytest
import torch
from transformers import BloomConfig, FalconConfig, GPTBigCodeConfig
from transformers.models.falcon.modeling_falcon import FalconAttention

from builders import FAMILIES, input_ids, linear_layers, lora_folder, tiny_config, tiny_model, write_adapter
from heterofusion import AdapterError, load_adapter
from heterofusion.adapters.architectures import ModuleKey, module_key, module_keys, read_source_configs, role_rows
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


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("model.layers.11.mlp.experts.3.gate_proj", ModuleKey(11, ("gate_proj",), "mlp.experts.3.gate_proj")),
        ("model.layers.1.mlp.shared_expert.up_proj", ModuleKey(1, ("up_proj",), "mlp.shared_expert.up_proj")),
        ("model.language_model.layers.5.self_attn.q_proj", ModuleKey(5, ("q_proj",), "self_attn.q_proj")),
        ("model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj", None),
        ("model.visual.blocks.3.attn.qkv", None),
        ("model.audio_tower.layers.1.self_attn.v_proj", None),
        ("model.embed_tokens", None),
    ],
)
def test_experts_are_told_apart_and_other_towers_stay_out(path, key):
    assert module_key(path) == key


@pytest.mark.parametrize(
    "suffix",
    ["mlp.gate", "self_attn.W_pack", "attn.q", "block_sparse_moe.experts.0.w1", "c_attn", "mlp.dense", "q_proj.extra"],
)
def test_unknown_role_raises(suffix, tmp_path):
    path = f"model.layers.4.{suffix}"
    adapter = load_adapter(write_adapter(tmp_path, {path: (8, 8)}))
    words = rf"{adapter.weights_file}: module {path} has no known role \('{suffix}'\); known are .*q_proj"
    with pytest.raises(AdapterError, match=words):
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


@pytest.mark.parametrize(
    ("family", "path", "config"),
    [
        *(("phi3", "model.layers.0.self_attn.qkv_proj", {"num_key_value_heads": heads}) for heads in (2, 4, 1)),
        ("gpt_neox", "gpt_neox.layers.0.attention.query_key_value", {}),
        ("gpt2", "transformer.h.0.attn.c_attn", {}),
    ],
)
def test_rows_are_those_of_the_model(monkeypatch, family, path, config):
    """Their code hands v to the attention function, and q and k too, rotated in all but GPT-2."""
    model = tiny_model(family, **config)
    model.set_attn_implementation("eager")
    code = sys.modules[type(model).__module__]
    states = recorded(monkeypatch, code, "eager_attention_forward", lambda args, _: args[1:4])
    if family != "gpt2":
        rotated = recorded(monkeypatch, code, "apply_rotary_pos_emb", lambda args, _: args[:2])
    fused = projection_output(model, path)
    q, k = states[0][:2] if family == "gpt2" else rotated[0]
    check_rows(model, path, fused, [flat_heads(part) for part in (q, k, states[0][2])])


def test_rows_of_phi3_mlp_are_those_of_the_model():
    model, path = tiny_model("phi3"), "model.layers.0.mlp.gate_up_proj"
    mlp = model.get_submodule("model.layers.0.mlp")
    activated, products = [], []
    mlp.activation_fn.register_forward_hook(lambda _, args, __: activated.append(args[0]))
    mlp.down_proj.register_forward_pre_hook(lambda _, args: products.append(args[0]))
    fused = projection_output(model, path)
    rows = role_rows(module_key(path), fused.shape[-1], model.config)
    assert list(rows) == ["gate_proj", "up_proj"]
    assert torch.equal(fused[..., rows["gate_proj"]], activated[0])
    assert torch.equal(fused[..., rows["up_proj"]] * torch.nn.functional.silu(activated[0]), products[0])


@pytest.mark.parametrize("form", FALCON_FORMS.values(), ids=FALCON_FORMS)
def test_rows_of_falcon_are_those_of_the_model(monkeypatch, form):
    model, path = tiny_model("falcon", **form), "transformer.h.0.self_attention.query_key_value"
    split = recorded(monkeypatch, FalconAttention, "_split_heads", lambda _, result: result)
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


def grouped_falcon(heads, kv_heads):
    return FalconConfig(num_attention_heads=heads, num_kv_heads=kv_heads, new_decoder_architecture=True)


NEOX, FALCON = "gpt_neox.layers.0.attention.query_key_value", "transformer.h.0.self_attention.query_key_value"
OTHER_ROWS = "has {} rows in lora_B, but a {} .* gives {}; "
OTHER_TYPE = "known for model_type {} only, not for '{}'"


@pytest.mark.parametrize(
    ("path", "config", "found"),
    [
        ("model.layers.0.self_attn.qkv_proj", tiny_config("phi3"), OTHER_ROWS.format(95, "phi3", 64)),
        ("model.layers.0.mlp.gate_up_proj", tiny_config("phi3"), OTHER_ROWS.format(95, "phi3", 96)),
        (NEOX, tiny_config("gpt_neox"), OTHER_ROWS.format(95, "gpt_neox", 96)),
        ("transformer.h.0.attn.c_attn", tiny_config("gpt2"), OTHER_ROWS.format(95, "gpt2", 96)),
        (FALCON, tiny_config("falcon"), OTHER_ROWS.format(95, "falcon", 48)),
        ("model.layers.0.self_attn.qkv_proj", tiny_config("llama"), OTHER_TYPE.format("phi3", "llama")),
        ("transformer.h.0.attn.c_attn", GPTBigCodeConfig(), OTHER_TYPE.format("gpt2", "gpt_bigcode")),
        (FALCON, BloomConfig(), OTHER_TYPE.format("falcon", "bloom")),
        (NEOX, tiny_config("falcon"), OTHER_TYPE.format("gpt_neox", "falcon")),
        (FALCON, grouped_falcon(4, 3), "4 heads and 3 key-value heads cannot be split"),
        (FALCON, grouped_falcon(4, 0), "4 heads and 0 key-value heads cannot be split"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_fused_projection_that_the_config_does_not_explain_raises(path, config, found):
    with pytest.raises(AdapterError, match=rf"^{module_key(path).suffix}.*{found}"):
        role_rows(module_key(path), 95, config)


# Where the configs of sources come from.


@pytest.fixture
def fused_source(tmp_path):
    """Its base is a folder with nothing but a Phi-3's config.json."""
    tiny_config("phi3").save_pretrained(tmp_path / "phi3")
    return load_adapter(lora_folder(tiny_model("phi3"), tmp_path / "fused", ["qkv_proj"], base=str(tmp_path / "phi3")))


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
def test_base_config_that_makes_no_sense_raises_and_runs_no_code(tmp_path, content):
    (tmp_path / "code.py").write_text("raise SystemExit('ran')")
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(
        UserError, match=rf"source adapter x: .*{tmp_path}.* cannot be read|qkv_proj: .*cannot be split"
    ):
        config = load_base_config(str(tmp_path), "source adapter x")
        role_rows(module_key("model.layers.0.self_attn.qkv_proj"), 64, config)
