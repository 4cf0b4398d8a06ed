"""Presets of flags, and the free update that `recommended` trains beside the predicted one."""

import pytest
import torch
from safetensors.torch import load_file

from conftest import TINY, TokenRows, make_args, perturb
from heterofusion import HeteroFusionConfig, HeteroFusionModel, HeteroFusionTrainer, MethodConfig
from heterofusion.method.config import PRESETS
from heterofusion.method.live import LiveLinear
from recipe_runner import HYPERNETWORKS, flags, record, succeeds, train

pytestmark = pytest.mark.usefixtures("logging_restored")
FREE = {**TINY, "residual_scale": 0.5}


@pytest.mark.parametrize("preset", list(PRESETS))
def test_flags_that_are_not_given_are_those_of_the_preset(preset, tmp_path):
    args = HeteroFusionConfig(output_dir=str(tmp_path), preset=preset)
    assert {name: getattr(args, name) for name in PRESETS[preset]} == PRESETS[preset]
    if preset == "paper":
        assert (args.learning_rate, args.weight_decay, args.max_grad_norm, args.warmup_steps) == (
            5e-5,
            0.01,
            0.0,
            0.05,
        )
        assert (args.rdm_weight, args.extra_rank, args.residual_scale) == (0.005, 0, 0.0)
    method = MethodConfig(preset=preset)
    assert method.method_dict().items() <= args.method_dict().items()


def test_flags_that_are_given_stand():
    method = MethodConfig(preset="recommended", extra_rank=0, residual_scale=0.0, rdm_weight=0.1)
    assert (method.extra_rank, method.residual_scale, method.rdm_weight) == (0, 0.0, 0.1)
    assert method.extra_basis == "random"  # there are no rows to lie along anything
    with pytest.raises(ValueError, match=r"--preset is 'huge'; choose one of paper, compact, recommended"):
        MethodConfig(preset="huge")


@pytest.fixture
def free(base, target, sources):
    return perturb(HeteroFusionModel.from_adapters(base, target, sources, MethodConfig(**FREE)))


def test_free_update_is_added_to_the_predicted_one(free):
    before = {name: delta.clone() for name, delta in free.module_deltas().items()}
    with torch.no_grad():
        for network in free.hypernetworks.networks.values():
            network.residual.weight.normal_()
    for name, delta in free.module_deltas().items():
        change = delta - before[name]
        assert 0.4 < change.std() < 0.6, name  # 0.5 times a standard normal, over all rows of B


def test_free_update_moves_by_the_scaled_learning_rate(free, tmp_path):
    """Adam's first step is its learning rate in every entry that has a gradient."""
    args = make_args(tmp_path, **FREE, max_steps=1, learning_rate=1e-2, warmup_steps=0.0, rdm_weight=0.0)
    free.method.rdm_weight = 0.0
    HeteroFusionTrainer(free, args, train_dataset=TokenRows(4)).train()
    for name, network in free.hypernetworks.networks.items():
        moved = network.residual(torch.zeros(()), network.residual_scale).detach().abs()
        assert moved.max() == pytest.approx(0.5 * 1e-2, rel=1e-3), name


def test_next_fusion_starts_without_the_free_update_of_the_last(single, watch, tmp_path):
    """The target has it already: it would be added twice."""
    first = {**single, "residual_scale": 1.0, "output_dir": tmp_path / "one", "save_steps": 1}
    succeeds(train.main, flags(first))
    left = load_file(tmp_path / "one" / "checkpoint-1" / HYPERNETWORKS)
    start = {"target_adapter": tmp_path / "one", "init_hypernetwork_from": tmp_path / "one"}
    succeeds(train.main, flags({**first, **start, "output_dir": tmp_path / "two"}))
    begun = watch.begun["two"]
    names = [name for name in left if ".residual." in name and name in begun]
    assert names and all(left[name].any() and not begun[name].any() for name in names)
    assert all(torch.equal(begun[name], left[name]) for name in left if name in begun and name not in names)
    assert record(tmp_path / "two")["method"]["residual_scale"] == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_updates_are_not_rounded_away(dtype):
    """bfloat16 has 8 bits: 1 + 2^-9 would be 1. The two examples cancel but for the update."""
    lora_B = torch.nn.Linear(1, 2, bias=False, dtype=dtype)
    torch.nn.init.zeros_(lora_B.weight)
    lora_B.weight.data[0] = 1.0
    update = torch.tensor([[2.0**-9], [2.0**-9]], requires_grad=True)
    live = {"b": update}
    lora_B = LiveLinear(lora_B, "b", live)
    out = lora_B(torch.ones(1, 1, dtype=dtype))
    out.sum().backward()
    assert out[0, 1].item() == 2.0**-9 and update.grad.tolist() == [[1.0], [1.0]]
    live.clear()
    assert lora_B(torch.ones(1, 1, dtype=dtype)).tolist() == [[1.0, 0.0]]


def test_forward_under_autocast_keeps_the_two_products_apart():
    lora_B = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(lora_B.weight)
    lora_B = LiveLinear(lora_B, "b", {"b": torch.full((1, 1), -1 + 2.0**-12)})
    assert lora_B(torch.ones(1, 1)).item() == 2.0**-12
    with torch.autocast("cpu", torch.bfloat16):
        assert lora_B(torch.ones(1, 1)).item() == 0.0
