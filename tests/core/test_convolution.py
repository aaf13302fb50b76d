from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pl_prune.core.convolution import FastDoubleBackward

CONVOLUTIONS = {
    "plain": (nn.Conv2d(3, 4, 3), (2, 3, 7, 7)),
    "no bias, stride, padding": (nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False), (2, 3, 8, 7)),
    "groups, dilation": (nn.Conv2d(4, 6, (3, 2), dilation=(2, 1), groups=2), (2, 4, 7, 7)),
    "depthwise": (nn.Conv2d(4, 4, 3, padding=1, groups=4), (2, 4, 5, 5)),
    "circular": (nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (2, 3, 5, 5)),
    "same": (nn.Conv2d(3, 4, 3, padding="same"), (2, 3, 5, 5)),
    "one sample without a batch": (nn.Conv2d(3, 4, 3), (3, 5, 5)),
    "1d": (nn.Conv1d(3, 4, 3, stride=2), (2, 3, 9)),
    "3d": (nn.Conv3d(2, 3, 2), (2, 2, 4, 3, 4)),
    "transposed": (nn.ConvTranspose2d(3, 4, 3, stride=2), (2, 3, 4, 4)),
}


def derivatives(layer, x):
    """First and second derivatives of a function that is curved in the input, the weight and the bias."""
    tensors = [x, *layer.parameters()]
    value = (layer(x).tanh() * layer(x)).sum()
    first = torch.autograd.grad(value, tensors, create_graph=True)
    along = [torch.cos(torch.arange(g.numel(), dtype=g.dtype)).view_as(g) for g in first]
    return value, first, torch.autograd.grad(first, tensors, along)


@pytest.mark.parametrize(("layer", "shape"), CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_derivatives_equal_those_of_pytorch(layer, shape):
    torch.manual_seed(0)
    layer = layer.double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    expected = derivatives(layer, x)
    with FastDoubleBackward():
        found = derivatives(layer, x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_calls_by_name_and_frozen_weights():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 3, 3, 3, dtype=torch.float64)

    def second():
        (first,) = torch.autograd.grad(F.conv2d(x, weight=weight, padding=(1, 1)).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(first.sum(), x)

    expected = second()
    with FastDoubleBackward():
        torch.testing.assert_close(second(), expected, rtol=1e-12, atol=1e-12)


def test_the_weight_is_differentiated_by_the_kernel_of_the_first_derivative():
    layer, x = nn.Conv2d(3, 4, 3), torch.randn(2, 3, 5, 5, requires_grad=True)

    def nodes(value):
        seen, todo = set(), [value.grad_fn]
        while todo:
            node = todo.pop()
            if node is not None and node not in seen:
                seen.add(node)
                todo += [after for after, _ in node.next_functions]
        return {node.name() for node in seen}

    with FastDoubleBackward():
        (first,) = torch.autograd.grad(layer(x).square().sum(), layer.weight, create_graph=True)
    assert "ConvolutionBackwardBackward0" not in nodes(first)
    assert any("_Backward" in name for name in nodes(first))


@pytest.mark.parametrize("inplace", [False, True])
def test_hard_sigmoids_can_be_differentiated_twice(inplace):
    x = torch.linspace(-5, 5, 24, dtype=torch.float64, requires_grad=True)
    assert torch.equal(F.hardsigmoid(x), F.hardsigmoid(x.detach()))
    with FastDoubleBackward():
        value = nn.Hardsigmoid(inplace)(x * 1.0)
        torch.testing.assert_close(value, F.relu6(x + 3) / 6)
        (first,) = torch.autograd.grad((value**2).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x)
    inside = (x.abs() < 3).double()
    torch.testing.assert_close(first, 2 * F.hardsigmoid(x) * inside / 6)
    torch.testing.assert_close(second, 2 * inside / 36)
