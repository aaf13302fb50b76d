"""Zeroing by bits must equal zeroing by value, in every precision and layout."""

from __future__ import annotations

import pytest
import torch

from pl_prune import MaskSet


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "scalar"])
def test_zeroing_equals_a_plain_loop(dtype, layout):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(6, 4, 3, 3, generator=generator).to(dtype)
    values.view(-1)[:5] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-40, -float("inf")]).to(dtype)
    keep = torch.rand(values.shape, generator=generator) > 0.5
    keep.view(-1)[:5] = torch.tensor([False, False, False, True, True])
    if layout == "channels_last":
        values = values.to(memory_format=torch.channels_last)
    elif layout == "sliced":
        values, keep = values[:, ::2], keep[:, ::2]
    elif layout == "scalar":
        values, keep = values[0, 0, 0, 0].clone(), keep[0, 0, 0, 0].clone()
    expected = [x if k else torch.zeros_like(x) for x, k in zip(values.flatten(), keep.flatten(), strict=True)]
    before = values._version
    MaskSet({"w": keep}).apply_({"w": values})
    found = values.flatten()
    assert values._version > before
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.view(1).view(torch.uint8), b.clone().view(1).view(torch.uint8))


def test_many_chunks():
    values = torch.randn((1 << 20) + 5)
    keep = torch.rand(values.shape) > 0.5
    expected = torch.where(keep, values, torch.zeros(()))
    MaskSet({"w": keep}).apply_({"w": values})
    assert torch.equal(values, expected)
