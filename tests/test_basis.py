"""Basis expansion: the expanded adapter computes what the anchor does; its rows, their fit to inputs, its contexts."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file

from builders import llama_modules, write_adapter
from conftest import TINY, TokenRows, fresh_base, logits, make_trainer, perturb, token_batch
from heterofusion import AdapterError, HeteroFusionModel, MethodConfig, load_adapter, plan_alignment
from heterofusion.adapters.factors import canonical_factors
from heterofusion.method.contexts import build_contexts, cut_blocks, describe_blocks, source_factors
from heterofusion.method.expansion import (
    ANCHOR_NORM,
    BASIS_FILE,
    INPUTS,
    expand_adapter,
    expand_plan,
    fit_basis,
    sample_examples,
)
from heterofusion.runtime.errors import UserError
from heterofusion.training.checkpoints import load_hypernetworks
from heterofusion.training.mixture import Mixture
from recipe_runner import TARGET, copy_adapter

K = 5


def settings(**changes) -> MethodConfig:
    return MethodConfig(**{**TINY, "extra_rank": K, **changes})


def write(adapter, folder):
    """An adapter in memory as a folder."""
    folder.mkdir()
    save_file(adapter.state_dict(), folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(adapter.config))
    return folder


def sequences(count: int = 6) -> list[torch.Tensor]:
    """Token ids of examples of different lengths."""
    ids = token_batch(count, 12, seed=3)["input_ids"]
    return [row[None, : 7 + i] for i, row in enumerate(ids)]


def module_inputs(model: PeftModel, paths) -> dict[str, torch.Tensor]:
    """(tokens, in) float64 of every module, all at once: what the streamed fit never holds."""
    seen = {path: [] for path in paths}
    base = model.get_base_model()
    hooks = [
        base.get_submodule(path).register_forward_pre_hook(lambda _, args, path=path: seen[path].append(args[0][0]))
        for path in paths
    ]
    with torch.no_grad():
        for ids in sequences():
            model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    return {path: torch.cat(parts).double() for path, parts in seen.items()}


# ---- the adapter ------------------------------------------------------------------------------------------------

VARIANTS = {
    "plain": {},
    "rslora": {"use_rslora": True, "lora_alpha": 7},
    "a fraction": {"lora_alpha": 7.3},
    "patterns": {"alpha_pattern": {"q_proj": 3}, "lora_alpha": 5},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("count", [1, K])
def test_expanded_adapter_computes_what_the_anchor_computes(variant, count, tmp_path):
    """As a user loads it: with plain PEFT, from a folder."""
    anchor = load_adapter(copy_adapter(tmp_path / "anchor", TARGET, VARIANTS[variant]))
    expanded = expand_adapter(anchor, settings(extra_rank=count), 42)
    folder = write(expanded, tmp_path / "expanded")
    wanted = logits(PeftModel.from_pretrained(fresh_base(), tmp_path / "anchor"))
    loaded = PeftModel.from_pretrained(fresh_base(), folder)
    torch.testing.assert_close(logits(loaded), wanted, atol=1e-6, rtol=0)
    # PEFT's own save keeps an alpha that is no integer
    loaded.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(fresh_base(), tmp_path / "again")
    assert torch.equal(logits(again), logits(loaded))
    for path, module in load_adapter(tmp_path / "again").modules.items():
        original = anchor.modules[path]
        assert torch.tensor(module.scaling) == torch.tensor(original.scaling)  # float32, in which PEFT applies it
        assert module.scaling == pytest.approx(original.scaling, rel=1e-15)
        assert torch.equal(module.lora_A[: original.rank], original.lora_A)
        assert torch.equal(module.lora_B[:, : original.rank], original.lora_B)
        assert module.rank == original.rank + count and not module.lora_B[:, original.rank :].any()


def test_ranks_and_alphas_that_vary_keep_every_scaling(tmp_path):
    modules = llama_modules(layers=2)
    down = [path for path in modules if path.endswith("down_proj")]
    odd = "model.layers.1.self_attn.q_proj"
    folder = write_adapter(
        tmp_path / "anchor", modules, r=4, lora_alpha=6, ranks={**dict.fromkeys(down, 2), odd: 3},
        rank_pattern={"down_proj": 2, r"layers\.1\..*q_proj": 3}, alpha_pattern={"v_proj": 10, odd: 7},
    )  # fmt: skip
    anchor = load_adapter(folder)
    expanded = load_adapter(write(expand_adapter(anchor, settings(extra_rank=7), 0), tmp_path / "expanded"))
    for path, module in anchor.modules.items():
        assert expanded.modules[path].rank == module.rank + 7
        assert expanded.modules[path].scaling == module.scaling, path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_rows_are_orthogonal_and_as_long_as_the_anchors(tmp_path, dtype):
    def convert(tensors):
        for key in tensors:
            tensors[key] = tensors[key].to(dtype)
            if "layers.0.self_attn.q_proj.lora_A" in key:
                tensors[key][1] = tensors[key][0]  # rows that depend on each other

    anchor = load_adapter(copy_adapter(tmp_path / "anchor", TARGET, tensors=convert))
    expanded = expand_adapter(anchor, settings(), 42)
    accuracy = 1e-6 if dtype is torch.float32 else 0.02
    for path, rows in expanded.extra_rows().items():
        A = anchor.modules[path].lora_A.double()
        assert rows.dtype == dtype and expanded.modules[path].lora_B.dtype == dtype
        norm = A.norm(dim=1).mean()
        rows = rows.double() / norm
        torch.testing.assert_close(rows @ rows.T, torch.eye(K).double(), atol=accuracy, rtol=0)
        assert (rows @ (A / A.norm(dim=1, keepdim=True)).T).abs().max() < accuracy
    assert expanded.sha256 == anchor.sha256 and expanded.expansion.scaled_by == ANCHOR_NORM


def test_rank_that_a_module_has_no_room_for_raises(target):
    """More rows than outputs are fine: lora_A is frozen, and every row is a direction that the update can read."""
    assert min(module.out_features for module in target.modules.values()) < 4 + 44
    expanded = expand_adapter(target, settings(extra_rank=44), 0)
    rows = torch.nn.functional.normalize(expanded.modules["model.layers.0.self_attn.k_proj"].lora_A.double())
    assert torch.linalg.matrix_rank(rows) == 48
    with pytest.raises(AdapterError, match=r"--extra_rank is 45, but model\.layers\.0\.\S+ .* 48 input .* at most 44"):
        expand_adapter(target, settings(extra_rank=45), 0)


# ---- contexts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("canonicalize", [False, True])
def test_sources_come_at_the_anchors_rank_and_are_padded_with_zeros(target, sources, canonicalize):
    plan = expand_plan(plan_alignment(target, sources), settings(), 0)
    b = TINY["block_size"]
    context = build_contexts(plan, b, canonicalize)["down_proj_r9"]
    item = context.members[-1]
    module = item.target.module
    A, B = module.lora_A, module.lora_B
    if canonicalize:
        own_A, own_B, _ = canonical_factors(A[:4], B[:, :4])
        A, B = torch.cat([own_A, A[4:]]), torch.cat([own_B, B[:, 4:]], 1)
    blocks, descriptors = describe_blocks(torch.cat([cut_blocks(A.T, b), cut_blocks(B, b)]))
    target_blocks, source_blocks = context.inputs.split(context.inputs.blocks)
    target_descriptors, source_descriptors = context.inputs.split(context.inputs.descriptors)
    torch.testing.assert_close(target_blocks[-1], blocks)
    torch.testing.assert_close(target_descriptors[-1], descriptors)
    parts = []
    for _, source in item.sources:
        A, B, _ = source_factors(source, 4, module.scaling, canonicalize)
        parts += [cut_blocks(A.T, b), cut_blocks(B, b)]
    raw = torch.cat(parts)
    blocks, descriptors = describe_blocks(torch.cat([raw, torch.zeros(*raw.shape[:2], K)], 2))
    torch.testing.assert_close(source_blocks[-1, : len(raw)], blocks)
    torch.testing.assert_close(source_descriptors[-1, : len(raw)], descriptors)
    assert not descriptors[:, 4:].abs().gt(1e-5).any()
    columns = source_blocks.unflatten(-1, (b, -1))[..., context.inputs.padded_from :]
    assert context.inputs.padded_from == 4 and columns.shape[-1] == K
    assert (columns == columns[..., :1, :1]).all()
    assert build_contexts(plan_alignment(target, sources), b)["down_proj_r4"].inputs.padded_from is None


# ---- inputs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("basis", ["random", "activations"])
def test_fitted_rows_have_the_mean_rms_of_the_anchors_on_inputs(basis, target, sources):
    model = perturb(HeteroFusionModel.from_adapters(fresh_base(), target, sources, settings(extra_basis=basis)))
    before = logits(model)
    model.fit_basis(sequences())
    assert not torch.equal(logits(model), before)  # the hypernetworks read the new rows
    anchor = PeftModel.from_pretrained(fresh_base(), TARGET)
    inputs = module_inputs(anchor, target.modules)
    for path, x in inputs.items():
        A = model.plan.target.modules[path].lora_A.double()
        rms = (x @ A.T).square().mean(0).sqrt()
        assert rms[4:] == pytest.approx([float(rms[:4].mean())] * K, rel=1e-4), path
        unit = A[4:] / A[4:].norm(dim=1, keepdim=True)
        torch.testing.assert_close(unit @ unit.T, torch.eye(K).double(), atol=1e-5, rtol=0)
        assert (unit @ A[:4].T).abs().max() < 1e-6
        live = model.get_base_model().get_submodule(path).lora_A["default"].weight
        assert torch.equal(live.double(), A)
    expansion = model.plan.target.expansion
    assert expansion.scaled_by == INPUTS and expansion.unreached == 0
    assert (expansion.examples, expansion.tokens) == (6, sum(ids.numel() for ids in sequences()))


@pytest.mark.parametrize("basis", ["random", "activations"])
def test_fit_inside_autocast_sums_in_float32(basis, target, sources):
    model = HeteroFusionModel.from_adapters(fresh_base(), target, sources, settings(extra_basis=basis))
    seen = {path: [] for path in target.modules}
    for path, inputs in seen.items():  # the very inputs that are fitted to
        hook = lambda _, args, inputs=inputs: inputs.append(args[0][0].double())  # noqa: E731
        model.get_base_model().get_submodule(path).register_forward_pre_hook(hook)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.fit_basis(sequences())
    for path, inputs in seen.items():
        A = model.plan.target.modules[path].lora_A.double()
        rms = (torch.cat(inputs) @ A.T).square().mean(0).sqrt()
        assert rms[4:] == pytest.approx([float(rms[:4].mean())] * K, rel=1e-4), path


def test_activations_are_the_principal_directions_beside_the_anchors_rows(target, sources):
    """Against the eigenvectors of the whole second moment, projected on the complement of the anchor's rows."""
    adapter = expand_adapter(target, settings(extra_basis="activations"), 42)
    model = HeteroFusionModel.from_adapters(fresh_base(), target, sources, settings(extra_basis="activations"))
    fitted = fit_basis(model, adapter, sequences())
    inputs = module_inputs(PeftModel.from_pretrained(fresh_base(), TARGET), target.modules)
    for path, x in inputs.items():
        inside = torch.linalg.qr(target.modules[path].lora_A.double().T).Q
        outside = x - (x @ inside) @ inside.T
        wanted = torch.linalg.svd(outside).Vh[:K]
        rows = fitted.extra_rows()[path].double()
        unit = rows / rows.norm(dim=1, keepdim=True)
        best, found = ((outside @ part.T).square().sum() for part in (wanted, unit))
        assert 0.98 < found / best <= 1 + 1e-9, path  # the spectra of random weights are flat
        random = expand_adapter(target, settings(), 42).extra_rows()[path].double()
        unit = random / random.norm(dim=1, keepdim=True)
        assert (outside @ unit.T).square().sum() < 0.8 * best


def test_rows_that_no_input_reaches_keep_the_anchors_norm(target, sources):
    """Three tokens have no more than three directions."""
    model = HeteroFusionModel.from_adapters(fresh_base(), target, sources, settings(extra_basis="activations"))
    model.fit_basis([torch.tensor([[5, 6, 7]])])
    expansion = model.plan.target.expansion
    assert expansion.unreached >= 2 * len(target.modules)
    for path, rows in model.plan.target.extra_rows().items():
        assert rows.isfinite().all()
        assert rows[-1].norm() == pytest.approx(float(target.modules[path].lora_A.norm(dim=1).mean()), rel=1e-4)


def test_fit_is_of_the_anchor_alone_whatever_the_hypernetworks_predict(target, sources):
    one, two = (HeteroFusionModel.from_adapters(fresh_base(), target, sources, settings()) for _ in range(2))
    perturb(two)
    logits(two)  # its updates are in place
    for model in (one, two):
        model.fit_basis(sequences())
    assert one.plan.target.expanded_sha256() == two.plan.target.expanded_sha256()


def test_sample_is_of_the_whole_mixture(tmp_path):
    """Its replay comes first: the first 64 examples would be the same with any labels, and with none."""
    replay, labels = (TokenRows(80, seed=seed).rows for seed in (0, 1))
    fitted = {}
    for data in (replay, Mixture(replay, labels[:30])):
        trainer = make_trainer(tmp_path, rows=data, extra_rank=K, extra_basis="activations", max_steps=1)
        trainer.train()
        fitted[len(data)] = trainer.fusion_model.plan.target
    assert fitted[80].expanded_sha256() != fitted[110].expanded_sha256()
    assert fitted[110].expansion.examples == 64
    device = torch.device("cpu")
    one, again, other = (sample_examples(Mixture(replay, labels), seed, device) for seed in (0, 0, 1))
    rows = {tuple(row["input_ids"].tolist()) for row in labels}
    share = sum(tuple(ids[0].tolist()) in rows for ids in one) / 64
    assert 0.3 < share < 0.7
    assert all(map(torch.equal, one, again)) and not all(map(torch.equal, one, other))


def test_infinite_inputs_raise(target, sources):
    model = HeteroFusionModel.from_adapters(fresh_base(), target, sources, settings())
    model.get_base_model().model.embed_tokens.weight.data.fill_(torch.inf)
    with pytest.raises(UserError, match=r"inputs of model\.layers\.0\.\S+ are not finite.*--dtype"):
        model.fit_basis(sequences())


# ---- training and export ----------------------------------------------------------------------------------------


def test_two_steps_move_old_and_new_columns_of_b_and_no_bit_of_a(tmp_path, target):
    trainer = make_trainer(tmp_path / "out", extra_rank=K)
    trainer.train()
    rows = trainer.fusion_model.plan.target.extra_rows()  # fitted when it began
    trainer.save_model()
    live = logits(trainer.fusion_model)
    fused = load_adapter(tmp_path / "out")
    for path, module in fused.modules.items():
        anchor = target.modules[path]
        assert torch.equal(module.lora_A, torch.cat([anchor.lora_A, rows[path]]))
        assert module.scaling == anchor.scaling
        moved = (module.lora_B - torch.cat([anchor.lora_B, torch.zeros(len(anchor.lora_B), K)], 1)).abs()
        assert moved[:, :4].max() > 0 and moved[:, 4:].max() > 0, path
    torch.testing.assert_close(logits(PeftModel.from_pretrained(fresh_base(), tmp_path / "out")), live)
    record = json.loads((tmp_path / "out" / "fusion.json").read_text())
    basis = record["basis"]
    assert basis["anchor_sha256"] == target.sha256 == record["target"]["sha256"]
    assert basis["lora_A_sha256"] == trainer.fusion_model.plan.target.expanded_sha256()
    assert (basis["extra_rank"], basis["extra_basis"], basis["seed"]) == (K, "random", 42)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"Every lora_A has {K} rows more" in card and "on real inputs" in card
    shares = [part["extra_share"] for part in json.loads((tmp_path / "out/diagnostics.json").read_text())["modules"]]
    assert len(shares) == len(target.modules) and all(0 < share < 1 for share in shares)
    torch.testing.assert_close(logits(trainer.fusion_model.fuse()), live)


# ---- checkpoints ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Of a fusion whose rows were fitted."""
    folder = tmp_path_factory.mktemp("expanded")
    trainer = make_trainer(folder, extra_rank=K, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    return folder / "checkpoint-1", trainer.fusion_model.plan.target


def test_checkpoint_brings_the_rows_back(checkpoint, tmp_path):
    folder, wanted = checkpoint
    again = make_trainer(tmp_path, extra_rank=K, max_steps=1)
    assert again.fusion_model.plan.target.expanded_sha256() != wanted.expanded_sha256()
    again.train(resume_from_checkpoint=str(folder))
    found = again.fusion_model.plan.target
    assert found.expanded_sha256() == wanted.expanded_sha256() and found.expansion == wanted.expansion


def test_checkpoint_without_its_rows_raises(checkpoint, tmp_path, target, sources):
    model = HeteroFusionModel.from_adapters(fresh_base(), target, sources, settings())
    shutil.copytree(checkpoint[0], tmp_path / "checkpoint-1")
    (tmp_path / "checkpoint-1" / BASIS_FILE).write_bytes(b"12345678")
    with pytest.raises(UserError, match=rf"{BASIS_FILE} cannot be read"):
        load_hypernetworks(model, tmp_path / "checkpoint-1")
