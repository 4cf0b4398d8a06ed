"""Merging of experts: every method against dense arithmetic written down once more; searches; dense updates."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from peft.utils import merge_utils

from builders import tiny_model, write_adapter
from heterofusion import load_adapter
from heterofusion.merging.config import search_candidates
from heterofusion.merging.export import added, cut, low_rank, merged_update
from heterofusion.merging.rules import RULES, make_rule
from heterofusion.merging.rules.sparse import drop, drop_by_rank, dropped
from heterofusion.merging.tau import Matrices, Updates, magnitude_thresholds
from heterofusion.runtime.errors import UserError

MODULES = {
    "model.layers.0.self_attn.q_proj": (12, 10),
    "model.layers.1.self_attn.q_proj": (12, 10),
    "model.layers.0.mlp.down_proj": (9, 12),
}
FIRST = next(iter(MODULES))
DENSE = tuple(method for method in RULES if method not in ("average", "task_arithmetic", "knots_ties", "knots_dare"))


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """Three experts: of other ranks and scalings, one with rsLoRA and a rank of its own, one with a single module."""
    root = tmp_path_factory.mktemp("experts")
    folders = [
        write_adapter(root / "plain", MODULES, r=2, lora_alpha=6, seed=1, std=0.5),
        write_adapter(
            root / "rslora", MODULES, r=3, lora_alpha=5, seed=2, std=0.5, use_rslora=True,
            ranks={FIRST: 4}, rank_pattern={FIRST: 4}, alpha_pattern={FIRST: 7},
        ),
        write_adapter(root / "one_module", {FIRST: MODULES[FIRST]}, r=1, lora_alpha=3, seed=3, std=0.5),
    ]  # fmt: skip
    return [load_adapter(folder) for folder in folders]


@pytest.fixture(scope="module")
def taus(experts):
    """Dense updates (experts, out, in) in float64 by module, with scalings from the configs."""
    result = {path: torch.zeros(3, rows, columns, dtype=torch.float64) for path, (columns, rows) in MODULES.items()}
    for path in MODULES:
        scalings = [3.0, 7 / 4**0.5 if path == FIRST else 5 / 3**0.5, 3.0]
        for index, expert in enumerate(experts):
            if module := expert.modules.get(path):
                result[path][index] = scalings[index] * module.lora_B.double() @ module.lora_A.double()
    return result


def dense(experts, method, weights=None, **values):
    """The merged dense updates by module; of emr, a list of them."""
    rule = make_rule(method, values)
    merged = rule.merge(Updates(experts, weights))
    count = len(experts) if rule.per_task else 1
    results = [{path: merged_update(merged, rule.merge_lambda, path, i) for path in MODULES} for i in range(count)]
    return results if rule.per_task else results[0]


def factors(experts, method, rank=None, **values):
    """The merged adapters."""
    updates = Updates(experts)
    return low_rank(make_rule(method, values).merge(updates), updates, rank)


def assert_same(found, expected, tolerance=2e-6):
    assert found.keys() == expected.keys()
    for path, update in expected.items():
        torch.testing.assert_close(found[path].double(), update.double(), atol=tolerance, rtol=1e-5)


def flat(updates):
    """(experts, all entries) of stacked updates by module."""
    return torch.cat([update.flatten(1) for update in updates.values()], dim=1)


def unflat(vector, like):
    parts = vector.split([update[0].numel() for update in like.values()])
    return {path: part.view(like[path][0].shape) for path, part in zip(like, parts, strict=True)}


def reference_ties(updates, density, merge_lambda=1.0):
    """TIES on whole vectors, as its paper has it: a sort of everything."""
    vectors = flat(updates)
    k = int(density * vectors.shape[1])
    threshold = vectors.abs().sort(dim=1, descending=True).values[:, k - 1 : k]
    vectors = torch.where(vectors.abs() >= threshold, vectors, 0)
    sign = vectors.sum(0).sign()
    sign[sign == 0] = 1 if sign.sum() > 0 else -1
    agree = (vectors.sign() == sign) & (vectors != 0)
    return unflat(merge_lambda * (vectors * agree).sum(0) / agree.sum(0).clamp(min=1), updates)


def test_average_and_task_arithmetic(experts, taus):
    assert_same(dense(experts, "average"), {path: tau.mean(0) for path, tau in taus.items()})
    assert_same(dense(experts, "task_arithmetic"), {path: 0.3 * tau.sum(0) for path, tau in taus.items()})
    weights = torch.tensor([2.0, -0.5, 1.5], dtype=torch.float64).view(3, 1, 1)
    weighted = {path: (weights * tau).sum(0) for path, tau in taus.items()}
    found = dense(experts, "task_arithmetic", weights=weights.flatten().tolist(), merge_lambda=0.7)
    assert_same(found, {path: 0.7 * update for path, update in weighted.items()})
    found = dense(experts, "average", weights=weights.flatten().tolist())
    assert_same(found, {path: update / 3 for path, update in weighted.items()})
    for method in ("dare", "knots_dare"):  # that drop nothing
        found = dense(experts, method, drop_rate=0.0, merge_lambda=0.9)
        assert_same(found, {path: 0.9 * tau.sum(0) for path, tau in taus.items()})


@pytest.mark.parametrize("density", [0.05, 0.2, 1.0])
def test_ties_is_a_global_sort_and_that_of_peft(experts, taus, density):
    found = dense(experts, "ties", density=density, merge_lambda=0.6)
    assert_same(found, reference_ties(taus, density, 0.6))
    pefts = merge_utils.ties([*flat(taus).float()], torch.ones(3), density)
    assert_same(found, unflat(0.6 * pefts, taus))


def test_breadcrumbs_of_every_row(experts, taus):
    expected = {}
    for path, tau in taus.items():
        columns = tau.shape[2]
        top, kept = int(0.25 * columns), int(0.5 * columns)
        order = tau.abs().argsort(dim=2, descending=True).argsort(dim=2)  # place of each entry in its row
        expected[path] = 0.4 * torch.where((order >= top) & (order < top + kept), tau, 0).sum(0)
    assert_same(dense(experts, "breadcrumbs", density=0.5, gamma=0.25), expected)


def test_emr(experts, taus):
    sign = {path: tau.sum(0).sign() for path, tau in taus.items()}
    unified = {path: sign[path] * (tau * (tau.sign() == sign[path])).abs().amax(0) for path, tau in taus.items()}
    found = dense(experts, "emr")
    assert len(found) == 3
    for index, updates in enumerate(found):
        masked = {path: unified[path] * (tau[index] * unified[path] > 0) for path, tau in taus.items()}
        own = sum(tau[index].abs().sum() for tau in taus.values())
        scale = own / sum(update.abs().sum() for update in masked.values())
        assert_same(updates, {path: scale * update for path, update in masked.items()})


@pytest.mark.parametrize("large", [0.0, -2.0])
def test_emr_refuses_an_expert_that_it_cannot_scale(tmp_path, large):
    experts = []
    for name, sign in (("small", 1.0), ("large", large)):
        weights = {f"base_model.model.{FIRST}.lora_{part}.weight": torch.ones(shape) * (sign if part == "B" else 1)
                   for part, shape in (("A", (1, 12)), ("B", (10, 1)))}  # fmt: skip
        folder = write_adapter(tmp_path / name, {FIRST: MODULES[FIRST]}, r=1, tensors=weights)
        experts.append(load_adapter(folder))
    with pytest.raises(UserError, match="its update is 0, or outweighed everywhere"):
        factors(experts, "emr")


@pytest.mark.parametrize("density", [0.2, 1.0])
def test_knots_ties_in_the_basis_of_the_dense_svd(experts, taus, density):
    left, right = {}, {}
    for path, tau in taus.items():
        U, S, Vh = torch.linalg.svd(torch.cat([*tau], dim=1), full_matrices=False)
        k = int((S > 1e-9).sum())
        left[path], right[path] = U[:, :k] * S[:k], torch.stack(Vh[:k].split(tau.shape[2], dim=1))
    merged = reference_ties(right, density, 0.8)
    expected = {path: left[path] @ merged[path] for path in taus}
    assert_same(dense(experts, "knots_ties", density=density, merge_lambda=0.8), expected)


@pytest.mark.parametrize(("method", "density"), [("dare_ties", 0.3), ("dare_ties", 1.0), ("della", 1.0)])
def test_dropped_updates_are_merged_as_ties_merges_them(experts, taus, method, density):
    """An expert's dropped update is what a merge with weights on it alone gives, with the same seed."""
    kept = {path: torch.zeros(3, *tau.shape[1:], dtype=torch.float64) for path, tau in taus.items()}
    rule = make_rule("dare" if method == "dare_ties" else "della", {"merge_lambda": 1.0, "seed": 5})
    for index in range(3):
        updates = Updates(experts, [float(i == index) for i in range(3)])
        merged = rule.merge(updates)
        for path in updates.modules:
            kept[path][index] = merged_update(merged, 1.0, path)
    values = {"density": density} if method == "dare_ties" else {}
    assert_same(dense(experts, method, merge_lambda=1.1, seed=5, **values), reference_ties(kept, density, 1.1))


BY_RANK = [0.63, 0.77, 0.7, 0.665, 0.735]  # (1 - 0.3 - 0.07) + 0.14 * rank / 4


@pytest.mark.parametrize(
    ("change", "keep"),
    [(partial(drop, drop_rate=0.7), [0.3] * 5), (partial(drop_by_rank, drop_rate=0.3, epsilon=0.07), BY_RANK)],
)
def test_dropping_keeps_the_share_and_the_expectation(change, keep):
    values, keep = torch.tensor([0.1, -0.5, 0.3, -0.2, 0.4]), torch.tensor(keep)
    one = Matrices({FIRST: (4, 5)}, lambda _: {0: values.repeat(4, 1)})
    draws = torch.stack([dropped(one, seed, change).of(FIRST)[0] for seed in range(5000)])
    hit = draws != 0
    # of 20,000 draws, 3.5 standard errors
    torch.testing.assert_close(hit.double().mean((0, 1)), keep.double(), atol=0.012, rtol=0)
    torch.testing.assert_close(draws.double().mean((0, 1)), values.double(), atol=0.02, rtol=0)
    torch.testing.assert_close(draws[hit], (values / keep).expand_as(draws)[hit])


@pytest.mark.parametrize("method", ["dare", "dare_ties", "della", "knots_dare"])
def test_a_seed_gives_the_same_and_another_seed_another(experts, method):
    first, again, other = (dense(experts, method, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(first[path], again[path]) for path in MODULES)
    assert any(not torch.equal(first[path], other[path]) for path in MODULES)


@pytest.mark.parametrize("count", [1, 7, 300, 640, 900])
def test_thresholds_are_those_of_a_sort(count):
    generator = torch.Generator().manual_seed(count)
    blocks = {}
    for path, shape in (("a", (10, 40)), ("b", (25, 20))):
        matrix = torch.randn(shape, generator=generator) * 10 ** torch.randint(-12, 12, shape, generator=generator)
        blocks[path] = {0: matrix, 1: (matrix * 2).round()}  # many equal ones
    blocks["a"][1][:] = 0
    blocks["b"][2] = torch.full((25, 20), 1e-42)  # denormal, and this expert lacks module a
    shapes = {path: tuple(matrices[0].shape) for path, matrices in blocks.items()}
    found = magnitude_thresholds(Matrices(shapes, blocks.__getitem__), count)
    for expert in (0, 1, 2):
        entries = torch.cat([matrices[expert].flatten() for matrices in blocks.values() if expert in matrices])
        entries = torch.cat([entries.abs(), torch.zeros(900 - len(entries))])
        assert found[expert] == entries.sort(descending=True).values[count - 1].item()


@pytest.mark.parametrize("rank", [1, 4, 9])
@pytest.mark.parametrize("shape", [(9, 14), (14, 9), (9, 2, 9)])
def test_a_dense_update_is_cut_as_the_svd_cuts_it(shape, rank):
    generator = torch.Generator().manual_seed(0)
    update = torch.eye(shape[0])
    for size in pairwise(shape):
        update = update @ torch.randn(size, generator=generator)
    U, S, Vh = torch.linalg.svd(update.double(), full_matrices=False)
    (A, B), kept, energy = cut(update, rank)
    assert (A.shape, B.shape) == ((rank, update.shape[1]), (update.shape[0], rank))
    torch.testing.assert_close((B @ A).double(), (U[:, :rank] * S[:rank]) @ Vh[:rank], atol=1e-5, rtol=0)
    assert energy == pytest.approx(float(S.square().sum()))
    assert kept == pytest.approx(float(S[:rank].square().sum()))
    (A, B), kept, energy = cut(torch.zeros_like(update), rank)
    assert not A.any() and not B.any() and kept == energy == 0


@pytest.mark.parametrize("method", RULES)
def test_factors_are_the_dense_update_where_the_rank_suffices(experts, method):
    """All methods but these are of full rank, which 12 allows for."""
    exact = method not in DENSE
    expected = dense(experts, method)
    for index, result in enumerate(factors(experts, method, None if exact else 12)):
        products = {path: make_rule(method, {}).merge_lambda * (B @ A) for path, (A, B) in result.factors.items()}
        assert_same(products, expected[index] if method == "emr" else expected, 1e-5)
        assert result.lost == 0
        if exact:
            assert result.factors[FIRST][0].shape[0] <= 2 + 4 + 1


def test_ranges_include_their_stop_and_lambda_is_innermost():
    found = search_candidates(["lambda=0.1:1.0:0.1", "density=0.2,0.4"], "ties", {})
    expected = [{"merge_lambda": i / 10, "density": density} for density in (0.2, 0.4) for i in range(1, 11)]
    assert [rule.hyperparameters() for rule in found] == expected


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["rank=1,2"], r"--rank 1.0: the hyper-parameters of ties are --merge_lambda, --density"),
        (["seed=1,2"], r"seed is given too, or is a seed"),
        (["lambda=1:0.1:0.1"], r"start:stop:step, rising"),
        (["lambda=0.1", "merge_lambda=0.2"], r"merge_lambda is given too"),
        (["density=0.5,1.5"], r"--density is 1.5; it must be above 0 and at most 1"),
    ],
)
def test_a_search_that_has_no_meaning_raises(entries, message):
    with pytest.raises(UserError, match=message):
        search_candidates(entries, "ties", {})


def test_a_dense_update_leaves_the_base_as_it_was():
    model = tiny_model("llama", tie_word_embeddings=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with added(model, lambda path: torch.full((128, 32), 0.25), ["lm_head"]):
        assert torch.equal(model.lm_head.weight, before["lm_head.weight"] + 0.25)
        assert torch.equal(model.get_input_embeddings().weight, before["lm_head.weight"])
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
