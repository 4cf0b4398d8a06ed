"""Which module feeds which: layer maps, transfer ratio, roles, and the reasons for what stays out."""

from fractions import Fraction

import pytest
import torch

from builders import LLAMA_ROLES, llama_modules, lora_folder, tiny_config, tiny_model, write_adapter
from heterofusion import AdapterError, load_adapter, plan_alignment
from heterofusion.adapters.alignment import GroupKey, map_layers, parse_transfer_ratio

ONE = Fraction(1)


@pytest.fixture
def adapter(tmp_path):
    """Factory of adapters: of a Llama-like model with some layers and roles, or of given modules."""

    def make(name, layers=2, roles=LLAMA_ROLES, modules=None, **kwargs):
        modules = modules or llama_modules(layers, roles=roles)
        return load_adapter(write_adapter(tmp_path / name, modules, **{"seed": sum(map(ord, name)), **kwargs}))

    return make


def links(plan) -> dict[str, list[tuple[int, str]]]:
    """Target slice -> (source, source slice) in order."""
    return {item.target.label: [(index, source.label) for index, source in item.sources] for item in plan.aligned}


# Layer maps.


@pytest.mark.parametrize(
    ("target", "source", "expected"),
    [
        (4, 4, {0: 0, 1: 1, 2: 2, 3: 3}),
        (4, 6, {0: 2, 1: 3, 2: 4, 3: 5}),
        (4, 3, {1: 0, 2: 1, 3: 2}),
        (1, 5, {0: 4}),
        (5, 1, {4: 0}),
    ],
)
def test_tail_map_joins_the_last_layers(target, source, expected):
    assert map_layers(target, source, "tail", ONE) == expected


@pytest.mark.parametrize(("target", "source"), [(4, 4), (4, 6), (4, 3), (32, 28), (28, 32), (5, 1), (2, 100), (1, 7)])
def test_proportional_map_is_monotone_and_its_ends_meet(target, source):
    pairs = map_layers(target, source, "proportional", ONE)
    assert list(pairs) == list(range(target))
    assert list(pairs.values()) == sorted(pairs.values())
    assert pairs[target - 1] == source - 1
    assert target == 1 or pairs[0] == 0
    for i, layer in pairs.items():
        assert target == 1 or abs(layer - i * (source - 1) / (target - 1)) <= 0.5


@pytest.mark.parametrize(
    ("ratio", "kept"), [(1, 10), (0.5, 5), ("1/2", 5), ("0.35", 3), (0.3, 3), (0.1, 1), (1e-9, 1), ("1/1000", 1)]
)
def test_transfer_ratio_keeps_the_last_pairs(ratio, kept):
    pairs = map_layers(12, 10, "tail", parse_transfer_ratio(ratio))
    assert pairs == {i: i - 2 for i in range(12 - kept, 12)}


def test_transfer_ratio_applies_to_each_source_on_its_own(adapter):
    target = adapter("target", 6)
    sources = [adapter("deep", 8), adapter("even", 6), adapter("flat", 3), adapter("single", 1)]
    plan = plan_alignment(target, sources, transfer_ratio="1/2")
    assert plan.layer_maps == ({3: 5, 4: 6, 5: 7}, {3: 3, 4: 4, 5: 5}, {5: 2}, {5: 0})
    assert plan.transfer_ratio == Fraction(1, 2)
    assert {item.target.layer for item in plan.aligned} == {3, 4, 5}


def test_depth_is_that_of_the_adapter_and_not_of_the_base(adapter):
    """L is 1 + the highest layer that the adapter itself holds (METHOD 2)."""
    held = {path: size for path, size in llama_modules(6).items() if ".1." in path or ".3." in path}
    plan = plan_alignment(adapter("target", 4), [adapter("source", modules=held)])
    assert plan.layer_maps == ({0: 0, 1: 1, 2: 2, 3: 3},)
    assert {item.target.layer for item in plan.aligned} == {1, 3}


# Modules.


def test_sources_are_joined_in_the_order_of_the_user(adapter):
    target, first, second = adapter("target", 2), adapter("b", 3), adapter("a", 2)
    ours = "model.layers.1.self_attn.q_proj", "model.layers.0.self_attn.q_proj"
    for sources, wanted in (([first, second], ours), ([second, first], ours[::-1])):
        plan = plan_alignment(target, sources)
        assert links(plan)["model.layers.0.self_attn.q_proj"] == [(0, wanted[0]), (1, wanted[1])]
        assert plan.aligned[0].sources[0][1].module in sources[0].modules.values()


def test_partial_overlap_aligns_what_both_have_and_says_why_not_the_rest(adapter):
    target = adapter("target", 3, roles=("q_proj", "v_proj", "down_proj"))
    sources = [adapter("first", 2, roles=("q_proj", "k_proj", "up_proj")), adapter("second", 5, roles=("v_proj",))]
    plan = plan_alignment(target, sources, transfer_ratio="2/3")
    q, v, down = "self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"
    assert links(plan) == {
        f"model.layers.2.{q}": [(0, f"model.layers.1.{q}")],
        f"model.layers.1.{v}": [(1, f"model.layers.3.{v}")],
        f"model.layers.2.{v}": [(1, f"model.layers.4.{v}")],
    }
    assert plan.untouched == {
        **{f"model.layers.{i}.{down}": "no source has down_proj" for i in range(3)},
        f"model.layers.0.{q}": "no source layer is mapped to layer 0",
        f"model.layers.1.{q}": "no source has q_proj at the layer mapped to layer 1",
        f"model.layers.0.{v}": "no source layer is mapped to layer 0",
    }
    assert plan.unused[0] == {
        **{f"model.layers.{i}.mlp.up_proj": "the target has no up_proj" for i in range(2)},
        **{f"model.layers.{i}.self_attn.k_proj": "the target has no k_proj" for i in range(2)},
        f"model.layers.0.{q}": "layer 0 is mapped to no target layer",
    }
    assert plan.unused[1] == {f"model.layers.{i}.{v}": f"layer {i} is mapped to no target layer" for i in range(3)}


def test_modules_outside_the_layers_stay_out_with_a_reason(adapter):
    modules = {**llama_modules(1, roles=("q_proj",)), "lm_head": (32, 128), "model.visual.blocks.3.attn.qkv": (32, 96)}
    plan = plan_alignment(adapter("target", modules=modules), [adapter("source", modules=modules)])
    outside = dict.fromkeys(("lm_head", "model.visual.blocks.3.attn.qkv"), "outside the decoder layers")
    assert plan.untouched == outside and plan.unused == (outside,)
    assert plan.layer_maps == ({0: 0},)  # the tower's layer 3 does not count


def test_rank_pattern_gives_groups_of_their_own(adapter):
    ranks = {"model.layers.1.self_attn.q_proj": 8}
    target = adapter("target", 3, roles=("q_proj", "v_proj"), ranks=ranks, rank_pattern=ranks)
    plan = plan_alignment(target, [adapter("source", 3, r=2)])
    layers = {key: [item.target.layer for item in members] for key, members in plan.groups.items()}
    assert layers == {GroupKey("q_proj", 4): [0, 2], GroupKey("q_proj", 8): [1], GroupKey("v_proj", 4): [0, 1, 2]}
    assert [key.name for key in plan.groups] == ["q_proj_r4", "v_proj_r4", "q_proj_r8"]


# Other names and fused projections.


@pytest.fixture(scope="module")
def fused_phi3(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phi3")
    names = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    return load_adapter(lora_folder(tiny_model("phi3"), folder, names)), tiny_config("phi3")


def test_fused_source_feeds_separate_modules_by_its_rows(adapter, fused_phi3):
    source, config = fused_phi3
    plan = plan_alignment(adapter("target"), [source], source_configs=[config])
    assert not plan.untouched and plan.unused == ({},)
    slices = {item.target.module.path: item.sources[0][1] for item in plan.aligned}
    assert slices["model.layers.0.mlp.up_proj"].label == "model.layers.0.mlp.gate_up_proj [up_proj]"
    layer = "model.layers.1."
    B = source.modules[f"{layer}self_attn.qkv_proj"].lora_B  # 32 rows of q, 16 of k, 16 of v
    for role, rows in (("q_proj", B[:32]), ("k_proj", B[32:48]), ("v_proj", B[48:])):
        assert torch.equal(slices[f"{layer}self_attn.{role}"].lora_B, rows)
    assert slices[f"{layer}self_attn.v_proj"].out_features == 16
    gate_up = source.modules[f"{layer}mlp.gate_up_proj"].lora_B
    assert torch.equal(slices[f"{layer}mlp.gate_proj"].lora_B, gate_up[:48])


def test_separate_source_feeds_the_roles_of_a_fused_target(adapter, fused_phi3):
    target, config = fused_phi3
    plan = plan_alignment(target, [adapter("source", roles=("q_proj", "v_proj", "up_proj"))], target_config=config)
    rows = {(item.target.layer, item.target.role): item.target.rows.tolist() for item in plan.aligned}
    wanted = {"q_proj": range(32), "v_proj": range(48, 64), "up_proj": range(48, 96)}
    assert rows == {(layer, role): list(numbers) for layer in (0, 1) for role, numbers in wanted.items()}
    assert plan.untouched["model.layers.0.self_attn.qkv_proj [k_proj]"] == "no source has k_proj"
    assert plan.untouched["model.layers.0.mlp.gate_up_proj [gate_proj]"] == "no source has gate_proj"
    assert len(plan.untouched) == 2 * 4  # k, gate, o and down


EXPERT = "model.layers.0.mlp.experts.{}.gate_proj"


@pytest.mark.parametrize(
    ("ours", "theirs", "aligned"),
    [
        ([EXPERT.format(i) for i in range(3)], [EXPERT.format(i) for i in range(2)], 2),
        ([EXPERT.format(i) for i in range(2)], ["model.layers.0.mlp.gate_proj"], 0),
        (["model.layers.0.mlp.gate_proj"], [EXPERT.format(i) for i in range(2)], 0),
    ],
)
def test_experts_are_matched_by_name_only(adapter, ours, theirs, aligned):
    """A dense MLP is not guessed among them."""
    both = llama_modules(1, roles=("q_proj",))
    target = adapter("target", modules={**both, **dict.fromkeys(ours, (32, 48))})
    plan = plan_alignment(target, [adapter("source", modules={**both, **dict.fromkeys(theirs, (32, 48))})])
    same = ["model.layers.0.self_attn.q_proj", *ours[:aligned]]
    assert links(plan) == {path: [(0, path)] for path in same}
    several = "several modules do gate_proj at layer 0 and "
    assert plan.untouched == dict.fromkeys(ours[aligned:], several + "no source has this one's name")
    assert plan.unused == (dict.fromkeys(theirs[aligned:], several + "the target has none of this name"),)


# Refusals and warnings.


def test_fused_projections_without_their_own_config_raise(adapter, fused_phi3):
    fused, plain, other = fused_phi3[0], adapter("plain"), tiny_config("phi3", num_key_value_heads=4)
    for words, target, source, configs in (
        (r"gate_up_proj is a fused projection \(gate_proj, up_proj\).*--source_configs", plain, fused, None),
        (r"target adapter \(.*gate_up_proj is a fused .*--model_name_or_path", fused, plain, None),
        (r"source adapter .*qkv_proj has 64 rows .* gives 96", plain, fused, [other]),
    ):
        with pytest.raises(AdapterError, match=words) as caught:
            plan_alignment(target, [source], source_configs=configs)
        assert str(fused.weights_file) in str(caught.value)


def test_no_source_raises(adapter):
    with pytest.raises(AdapterError, match="no source adapter given; --source_adapters needs at least one"):
        plan_alignment(adapter("target"), [])


def test_task_of_the_target_matters_and_that_of_a_source_does_not(adapter):
    source = adapter("source", task_type="SEQ_CLS")
    assert len(plan_alignment(adapter("target", task_type=None), [source]).aligned) == 14
    with pytest.raises(AdapterError, match="task_type is 'SEQ_CLS'; the target must be a CAUSAL_LM adapter"):
        plan_alignment(source, [adapter("other")])


@pytest.mark.parametrize(
    ("paths", "words"),
    [
        (["model.layers.0.mlp.experts.0.w1"], r"adapter_model.*: module model.layers.0.mlp.experts.0.w1 has no known"),
        # an encoder and a decoder: the layer index alone does not say which is meant
        (
            ["model.encoder.layers.0.self_attn.q_proj", "model.decoder.layers.0.self_attn.q_proj"],
            r"model.decoder.*same place of two stacks of layers",
        ),
        (["model.vision_tower.layers.0.self_attn.q_proj"], "no LoRA module inside the language model's layers"),
    ],
)
def test_modules_that_have_no_place_raise(adapter, paths, words):
    with pytest.raises(AdapterError, match=words):
        plan_alignment(adapter("target"), [adapter("source", modules=dict.fromkeys(paths, (8, 8)))])


def test_ignored_idle_and_equal_sources_are_warnings(adapter, caplog):
    full = adapter("full", tensors={"base_model.model.lm_head.weight": torch.ones(4, 4)})
    target, idle = adapter("target", roles=("q_proj",)), adapter("idle", roles=("o_proj",))
    again, copy = adapter("again", roles=("o_proj",), seed=1), adapter("copy", roles=("o_proj",), seed=1)
    plan_alignment(target, [full, idle, again, copy])
    assert f"source {full.name}: 1 tensors outside LoRA (modules_to_save, embeddings) are ignored" in caplog.text
    assert f"source {idle.name} (number 2) feeds no target module" in caplog.text
    assert f"source {copy.name} has the same weights as source 3" in caplog.text
    plan_alignment(again, [copy])
    assert f"source {copy.name} has the same weights as the target" in caplog.text
