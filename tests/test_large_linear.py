"""LargeLinear computes what nn.Linear computes, and keeps one gradient buffer."""

import pytest
import torch
from torch import nn

from heterofusion.method.large_linear import LargeLinear


@pytest.fixture
def layers():
    torch.manual_seed(0)
    layer, plain = LargeLinear(6, 4), nn.Linear(6, 4)
    plain.load_state_dict(layer.state_dict())
    return layer, plain


def backward(layer, x):
    output = layer(x)
    output.square().sum().backward()
    return output


@pytest.mark.parametrize("shape", [(5, 6), (2, 5, 6), (6,)])
@pytest.mark.parametrize("needs_gradient", [False, True])
def test_values_and_gradients_equal_those_of_a_linear_layer(layers, shape, needs_gradient):
    found = {}
    for layer in layers:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_(needs_gradient)
        found[layer] = [backward(layer, x), layer.weight.grad, layer.bias.grad, *([x.grad] if needs_gradient else [])]
    for ours, wanted in zip(*found.values(), strict=True):
        torch.testing.assert_close(ours, wanted)


def test_gradients_of_all_steps_lie_in_one_buffer(layers):
    layer, plain = layers
    places = set()
    for step in range(3):
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(step))
        for each in layers:
            each.zero_grad()
            backward(each, x)
        places.add(layer.weight.grad.data_ptr())
        torch.testing.assert_close(layer.weight.grad, plain.weight.grad)
    assert places == {layer._gradient.data_ptr()}


def test_gradients_add_up_over_backwards_and_uses(layers):
    """The buffer is in use then; a second use within one backward must not write over the first."""
    first, second = torch.randn(5, 6), torch.randn(3, 6)
    for layer in layers:
        backward(layer, first)
        backward(layer, second)
    torch.testing.assert_close(layers[0].weight.grad, layers[1].weight.grad)
    for layer in layers:
        layer.zero_grad()
        (layer(first).square().sum() + layer(second).square().sum()).backward()
    torch.testing.assert_close(layers[0].weight.grad, layers[1].weight.grad)


def test_state_and_frozen_layers_are_those_of_a_linear_layer(layers):
    layer, plain = layers
    assert layer.state_dict().keys() == plain.state_dict().keys()
    layer.requires_grad_(False)
    assert not layer(torch.randn(5, 6)).requires_grad
    with torch.no_grad():
        assert torch.equal(layer(torch.ones(2, 6)), plain(torch.ones(2, 6)))
