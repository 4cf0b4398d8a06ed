"""Contexts: blocks, descriptors and masks compared with plain loops, and what scaling and rank do to them."""

import math
from types import SimpleNamespace

import pytest
import torch

from builders import llama_modules, lora_folder, tiny_config, tiny_model, write_adapter
from heterofusion import AdapterError, load_adapter, plan_alignment
from heterofusion.method.contexts import (
    build_contexts,
    describe_blocks,
    sequence_lengths,
    source_factors,
)

BLOCK = 10  # divides none of the sizes 32, 16, 48 and 24


def contexts_of(plan, block=BLOCK, canonicalize=False):
    """Contexts by group, each with `target` and `source`: their blocks, descriptors and mask."""
    return {name: halves(context) for name, context in build_contexts(plan, block, canonicalize).items()}


def halves(context):
    inputs = context.inputs
    blocks, descriptors = inputs.split(inputs.blocks), inputs.split(inputs.descriptors)
    masks = context.target_mask, inputs.source_mask
    target, source = (SimpleNamespace(blocks=blocks[i], descriptors=descriptors[i], mask=masks[i]) for i in range(2))
    return SimpleNamespace(**vars(context), target=target, source=source)


@pytest.fixture
def adapter(tmp_path):
    def make(name, layers=2, modules=None, **kwargs):
        modules = llama_modules(layers) if modules is None else modules
        return load_adapter(write_adapter(tmp_path / name, modules, **{"seed": sum(map(ord, name)), **kwargs}))

    return make


@pytest.fixture
def ragged(adapter):
    """A target of three layers; the first source reaches all of them, the second, wider, only the last."""
    target = adapter("target", 3)
    wide = adapter("wide", modules=llama_modules(1, hidden=48, intermediate=72, kv=24))
    return plan_alignment(target, [adapter("source", 4), wide])


def naive_blocks(A, B, block):
    """The context of a module, row by row (METHOD 3)."""
    blocks = []
    for matrix in (A.T.tolist(), B.tolist()):
        rank = len(matrix[0])
        for start in range(0, len(matrix), block):
            rows = matrix[start : start + block]
            blocks.append(rows + [[0.0] * rank] * (block - len(rows)))
    return torch.tensor(blocks)


def naive_standardized(block):
    """LayerNorm without weight and bias over the row-major entries."""
    entries = [float(entry) for row in block for entry in row]
    mean = sum(entries) / len(entries)
    variance = sum((entry - mean) ** 2 for entry in entries) / len(entries)
    return torch.tensor([(entry - mean) / math.sqrt(variance + 1e-5) for entry in entries])


def naive_source(item, block):
    """Raw blocks and origins of an aligned slice's sources."""
    blocks, origins = [], []
    for index, source in item.sources:
        module = source.module
        blocks.append(naive_blocks(module.lora_A, source.lora_B * module.scaling / item.target.module.scaling, block))
        origins += [index] * len(blocks[-1])
    return torch.cat(blocks), origins


def check_sequences(sequences, expected):
    """Blocks, descriptors and mask of a padded batch against a list of raw (N_i, b, r) blocks."""
    longest = max(map(len, expected))
    assert sequences.blocks.shape[:2] == (len(expected), longest)
    assert (sequences.mask is None) == (len({len(blocks) for blocks in expected}) == 1)
    for row, blocks in enumerate(expected):
        for column, block in enumerate(blocks):
            actual = sequences.blocks[row, column]
            torch.testing.assert_close(actual, naive_standardized(block), atol=1e-5, rtol=0)
            singular = torch.linalg.svdvals(block.double()).float()
            descriptor = sequences.descriptors[row, column]
            torch.testing.assert_close(descriptor[: len(singular)], singular, atol=1e-6, rtol=1e-5)
            assert (descriptor[len(singular) :] == 0).all()
            assert (descriptor[:-1] >= descriptor[1:]).all()
        if sequences.mask is not None:
            assert sequences.mask[row].tolist() == [True] * len(blocks) + [False] * (longest - len(blocks))
        assert (sequences.descriptors[row, len(blocks) :] == 0).all()


@pytest.mark.parametrize("block", [3, BLOCK, 16, 100])
def test_contexts_of_all_groups_are_those_of_plain_loops(ragged, block):
    contexts = contexts_of(ragged, block)
    assert sorted(contexts) == sorted(f"{role}_proj_r4" for role in ("q", "k", "v", "o", "gate", "up", "down"))
    for name, context in contexts.items():
        assert context.members == ragged.groups[next(key for key in ragged.groups if key.name == name)]
        modules = [item.target.module for item in context.members]
        check_sequences(context.target, [naive_blocks(module.lora_A, module.lora_B, block) for module in modules])
        expected = [naive_source(item, block) for item in context.members]
        check_sequences(context.source, [blocks for blocks, _ in expected])
        longest = max(len(origins) for _, origins in expected)
        padded = [origins + [-1] * (longest - len(origins)) for _, origins in expected]
        assert context.source_of_block.tolist() == padded
        assert context.ragged
        assert context.source.mask is not None
        assert context.target.mask is None


def test_decode_index_selects_the_blocks_of_B(adapter):
    """Modules of one group with different sizes, so that the target batch is padded too."""
    modules = {
        **llama_modules(1),
        **{path.replace("layers.0", "layers.1"): size for path, size in llama_modules(1, hidden=48, kv=24).items()},
    }
    target = adapter("target", modules=modules)
    plan = plan_alignment(target, [adapter("source")])
    for context in contexts_of(plan, BLOCK).values():
        raw = [
            (naive_blocks(item.target.module.lora_A, item.target.lora_B, BLOCK), item.target.out_features)
            for item in context.members
        ]
        expected = [blocks[-math.ceil(out / BLOCK) :] for blocks, out in raw]
        assert context.b_blocks == tuple(len(blocks) for blocks in expected)
        chosen = context.target.blocks.flatten(0, 1)[context.inputs.decode_index]
        assert len(chosen) == sum(context.b_blocks)
        for actual, block in zip(chosen, torch.cat(expected), strict=True):
            torch.testing.assert_close(actual, naive_standardized(block), atol=1e-5, rtol=0)
    assert contexts_of(plan)["q_proj_r4"].target.mask is not None


@pytest.mark.parametrize("block", [3, 64])
def test_sequence_lengths_are_those_of_the_contexts(ragged, block):
    lengths = sequence_lengths(ragged, block)
    contexts = contexts_of(ragged, block)
    assert lengths == {
        name: max(context.target.blocks.shape[1], context.source.blocks.shape[1]) for name, context in contexts.items()
    }


def test_fused_source_gives_the_contexts_of_its_rows(adapter, tmp_path):
    source = load_adapter(lora_folder(tiny_model("phi3"), tmp_path / "phi3", ["qkv_proj"]))
    config = tiny_config("phi3")
    fused = contexts_of(plan_alignment(adapter("target"), [source], source_configs=[config]), BLOCK)
    module = source.modules["model.layers.1.self_attn.qkv_proj"]
    B = module.lora_B
    for role, rows in (("q_proj", B[:32]), ("k_proj", B[32:48]), ("v_proj", B[48:])):
        blocks, _ = describe_blocks(naive_blocks(module.lora_A, rows, BLOCK))
        torch.testing.assert_close(fused[f"{role}_r4"].source.blocks[1], blocks)


def test_fused_target_decodes_only_the_rows_of_the_role(adapter, tmp_path):
    target = load_adapter(lora_folder(tiny_model("phi3"), tmp_path / "phi3", ["qkv_proj"]))
    plan = plan_alignment(target, [adapter("source")], target_config=tiny_config("phi3"))
    contexts = contexts_of(plan, BLOCK)
    assert {name: context.b_blocks for name, context in contexts.items()} == {
        "q_proj_r4": (4, 4),
        "k_proj_r4": (2, 2),
        "v_proj_r4": (2, 2),
    }


# Scaling.


def source_blocks(adapter, canonicalize=False, target=None, **config):
    """Raw (A blocks, B blocks) and descriptors of a source's q_proj of layer 1, written with a config."""
    source = adapter("source", seed=5, **config)
    target = target or adapter("target")
    plan = plan_alignment(target, [source])
    (item,) = [item for item in plan.groups["q_proj", 4] if item.target.layer == 1]
    A, B, _ = source_factors(item.sources[0][1], 4, item.target.module.scaling, canonicalize)
    descriptors = contexts_of(plan, BLOCK, canonicalize)["q_proj_r4"].source.descriptors[1]
    count = math.ceil(A.shape[1] / BLOCK)
    assert len(descriptors) == count + math.ceil(B.shape[0] / BLOCK)
    return A, B, descriptors[:count], descriptors[count:]


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("r", [4, 6, 2])
def test_twice_the_alpha_is_twice_B_and_the_same_A(adapter, r, use_rslora):
    once = source_blocks(adapter, r=r, lora_alpha=8, use_rslora=use_rslora)
    twice = source_blocks(adapter, r=r, lora_alpha=16, use_rslora=use_rslora)
    for actual, expected, factor in zip(twice, once, (1, 2, 1, 2), strict=True):
        torch.testing.assert_close(actual, factor * expected)


@pytest.mark.parametrize("canonicalize", [False, True])
def test_rslora_and_lora_of_equal_scaling_give_equal_contexts(adapter, canonicalize):
    plain = source_blocks(adapter, canonicalize, lora_alpha=16)  # 16 / 4
    stabilized = source_blocks(adapter, canonicalize, lora_alpha=8, use_rslora=True)  # 8 / sqrt(4)
    pattern = source_blocks(adapter, canonicalize, lora_alpha=1, alpha_pattern={"q_proj": 16})
    for actual, other, expected in zip(stabilized, pattern, plain, strict=True):
        assert torch.equal(actual, expected)
        assert torch.equal(other, expected)


# Rank.


@pytest.mark.parametrize("canonicalize", [False, True])
@pytest.mark.parametrize("r", [1, 2, 4, 6, 16])
def test_source_of_another_rank_is_refactored(adapter, r, canonicalize):
    source = adapter("source", r=r, lora_alpha=3 * r)  # scaling 3
    plan = plan_alignment(adapter("target", lora_alpha=8), [source])  # scaling 2
    for item in plan.aligned:
        module = item.sources[0][1].module
        A, B, truncated = source_factors(item.sources[0][1], 4, 2.0, canonicalize)
        update = 1.5 * module.lora_B.double() @ module.lora_A.double()
        U, S, Vh = torch.linalg.svd(update, full_matrices=False)
        assert (A.shape, B.shape) == ((4, module.in_features), (module.out_features, 4))
        torch.testing.assert_close(B.double() @ A.double(), U[:, :4] * S[:4] @ Vh[:4], atol=1e-6, rtol=0)
        assert truncated == pytest.approx(float(S[4:].square().sum() / S.square().sum()), abs=1e-12)
        assert (truncated > 0.01) == (r > 4)


def test_canonical_contexts_do_not_depend_on_the_factors(adapter, tmp_path):
    """(A, B) and (M A, B M^-1) are one adapter: without `canonicalize` their contexts differ, with it they do not."""
    source = adapter("source")
    M = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)) + 3 * torch.eye(4)
    tensors = {}
    for path, module in source.modules.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = M @ module.lora_A
        tensors[f"base_model.model.{path}.lora_B.weight"] = module.lora_B @ torch.linalg.inv(M)
    other, target = adapter("other", tensors=tensors), adapter("target")
    plans = [plan_alignment(target, [item]) for item in (source, other)]
    for canonicalize, equal in ((True, True), (False, False)):
        first, second = (contexts_of(plan, BLOCK, canonicalize) for plan in plans)
        for name, context in first.items():
            difference = (context.source.blocks - second[name].source.blocks).abs().max()
            assert (difference < 1e-3) == equal, name
            assert (context.target.blocks == second[name].target.blocks).all()


@pytest.mark.parametrize("canonicalize", [False, True])
def test_scaling_beyond_float32_raises(adapter, canonicalize):
    plan = plan_alignment(adapter("target", lora_alpha=1e-30), [adapter("source", lora_alpha=1e30)])
    item = plan.groups["q_proj", 4][0]
    with pytest.raises(AdapterError, match=r"q_proj: its update times 1e\+60 .* beyond float32; check lora_alpha"):
        source_factors(item.sources[0][1], 4, item.target.module.scaling, canonicalize)
    with pytest.raises(AdapterError, match="check lora_alpha"):
        contexts_of(plan, BLOCK, canonicalize)
