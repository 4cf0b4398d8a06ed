"""Hypernetworks and RDM: sizes, masking, exactness of the batched forms."""

import pytest
import torch

from heterofusion.method.config import HypernetworkConfig
from heterofusion.method.hypernet import HypernetworkInput, HyperNetworks
from heterofusion.method.rdm import sliced_distance

ROLES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def parameters_at_8b(preset, rank):
    config = HypernetworkConfig.fitted(preset, 4096)
    with torch.device("meta"):
        networks = HyperNetworks({f"{role}_r{rank}": rank for role in ROLES}, config)
    return sum(p.numel() for p in networks.parameters())


def test_compact_is_small_and_hardly_grows_with_the_rank():
    assert parameters_at_8b("compact", 8) <= 60e6
    assert parameters_at_8b("compact", 64) <= 1.5 * parameters_at_8b("compact", 8)


def test_paper_has_the_published_size():
    """3 * b * r * e per role, plus what does not depend on the block: 0.7 B at r = 8, 5.6 B at r = 64."""
    for rank in (8, 64):
        blocks = 3 * 4096 * rank * 1024 * len(ROLES)
        assert blocks <= parameters_at_8b("paper", rank) <= blocks + 120e6


def small(form="paper", **changes):
    settings = {"block_size": 6, "embed_dim": 16, "num_heads": 4, "max_position_embeddings": 12,
                "row_features": 5, "column_features": 3, "form": form}  # fmt: skip
    return HypernetworkConfig(**(settings | changes))


@pytest.fixture(params=["paper", "compact"])
def network(request):
    config = small(request.param)
    torch.manual_seed(0)
    networks = HyperNetworks({"q_proj_r3": 3}, config)
    net = networks.networks["q_proj_r3"]
    torch.nn.init.normal_(net.decoder.output.weight, std=0.1)
    return net, networks.shared


def inputs(modules=3, target=4, source=7, block=6, rank=3):
    torch.manual_seed(1)
    return (
        torch.randn(modules, target, block * rank), torch.rand(modules, target, rank),
        torch.randn(modules, source, block * rank), torch.rand(modules, source, rank),
    )  # fmt: skip


def join(target, target_descriptors, source, source_descriptors, **masks) -> HypernetworkInput:
    blocks, descriptors = (
        torch.cat([first.flatten(0, 1), second.flatten(0, 1)])
        for first, second in ((target, source), (target_descriptors, source_descriptors))
    )
    return HypernetworkInput(blocks, descriptors, *target.shape[:2], **masks)


def test_padding_changes_nothing(network):
    """One padded, masked batch gives what each module gives alone."""
    net, shared = network
    target, target_s, source, source_s = inputs()
    lengths = (7, 3, 5)
    mask = torch.arange(7) < torch.tensor(lengths).unsqueeze(1)
    out = net(join(*inputs(), source_mask=mask), shared=shared, diagnostics=True)
    for row, length in enumerate(lengths):
        one = slice(row, row + 1)
        part = join(target[one], target_s[one], source[one, :length], source_s[one, :length])
        alone = net(part, shared=shared, diagnostics=True)
        torch.testing.assert_close(out.update.view(3, 4, 6, 3)[row], alone.update, atol=1e-6, rtol=0)
        torch.testing.assert_close(out.attention[row, :, :length], alone.attention[0], atol=1e-6, rtol=0)
        assert (out.attention[row, :, length:] == 0).all()


def test_first_prediction_is_zero_and_gate_is_clamped():
    for form in ("paper", "compact"):
        networks = HyperNetworks({"q_proj_r3": 3}, small(form, mu_gate=0.5))
        net = networks.networks["q_proj_r3"]
        batch = join(*inputs())
        assert not net(batch, shared=networks.shared).update.any()
        _, gate = net.encode(batch._replace(descriptors=100 * batch.descriptors), networks.shared)
        assert gate.min() == 0 and gate.max() == 1


def test_padded_columns_are_read_once_and_give_the_same():
    """Sources that were padded with zeros have equal columns from there on, which the compact form reads as one."""
    torch.manual_seed(0)
    networks = HyperNetworks({"q_proj_r7": 7}, small("compact"))
    net = networks.networks["q_proj_r7"]
    torch.nn.init.normal_(net.decoder.output.weight, std=0.1)
    target, target_s, source, source_s = inputs(rank=7)
    source.view(*source.shape[:2], 6, 7)[..., 3:] = torch.randn(*source.shape[:2], 1, 1)
    plain = join(target, target_s, source, source_s)
    rows = []
    networks.shared.rows_in.register_forward_hook(lambda module, args, out: rows.append(out.shape[0]))
    results = []
    for batch in (plain, plain._replace(padded_from=3)):
        networks.zero_grad()
        out = net(batch, shared=networks.shared)
        (out.update.square().sum() + out.source_embedding.sin().sum()).backward()
        results.append((out, {name: p.grad.clone() for name, p in networks.named_parameters() if p.grad is not None}))
    assert rows == [12 * 7 + 21 * 7, 12 * 7 + 21 * 4]
    torch.testing.assert_close(results[1][0].update, results[0][0].update)
    torch.testing.assert_close(results[1][0].source_embedding, results[0][0].source_embedding)
    torch.testing.assert_close(results[1][1], results[0][1], atol=1e-5, rtol=1e-4)


# ---- RDM --------------------------------------------------------------------------------------------------------


def test_masked_sets_equal_a_loop_over_modules():
    torch.manual_seed(0)
    z = torch.randn(3, 6, 4, requires_grad=True)
    noise, directions = torch.randn(3, 6, 4), torch.randn(4, 32)
    lengths = (6, 2, 4)
    mask = torch.arange(6) < torch.tensor(lengths).unsqueeze(1)
    loss = sliced_distance(z, noise, directions, 0.2, 0.7, mask)
    one_by_one = torch.stack(
        [sliced_distance(z[i : i + 1, :n], noise[i : i + 1, :n], directions, 0.2, 0.7) for i, n in enumerate(lengths)]
    ).mean()
    torch.testing.assert_close(loss, one_by_one)
    gradient = torch.autograd.grad(loss, z, retain_graph=True)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad(one_by_one, z)[0])
    assert not gradient[~mask].any()
