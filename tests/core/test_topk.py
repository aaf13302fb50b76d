from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from fingerprint import bits
from hypothesis import given, settings
from hypothesis import strategies as st

from pl_prune.core import topk
from pl_prune.core.topk import top_k

TIED = [0.0, -0.0, 1.0, -1.0, 0.5]
EXTREME = {
    torch.float16: [6e-8, -6e-8, 65504.0, -65504.0],
    torch.bfloat16: [1e-40, -1e-40, 3.3e38, -3.3e38],
    torch.float32: [1e-45, -1e-45, 1.1754942e-38, 3.4e38, -3.4e38, 1 + 2**-23],
    torch.float64: [5e-324, -5e-324, 2.2e-308, 1.7e308, -1.7e308, 1 + 2**-52],
}


def oracle(values, k, pool=None):
    """Sort exact rationals by (value descending, tensor, flat index)."""
    flat = [v.double().reshape(-1).tolist() for v in values]
    allowed = [[True] * len(f) for f in flat] if pool is None else [p.reshape(-1).tolist() for p in pool]
    order = sorted(
        (-Fraction(value), i, j) for i, layer in enumerate(flat) for j, value in enumerate(layer) if allowed[i][j]
    )
    best = {(i, j) for _, i, j in order[:k]}
    return [
        torch.tensor([(i, j) in best for j in range(v.numel())], dtype=torch.bool).view(v.shape)
        for i, v in enumerate(values)
    ]


def assert_marks(found, expected):
    assert [(m.dtype, m.shape) for m in found] == [(torch.bool, e.shape) for e in expected]
    assert [m.tolist() for m in found] == [e.tolist() for e in expected]


@st.composite
def tensors(draw):
    values, pool = [], []
    for _ in range(draw(st.integers(1, 3))):
        dtype = draw(st.sampled_from(list(EXTREME)))
        shape = draw(st.sampled_from([(), (0,), (1,), (5,), (2, 3), (2, 1, 3)]))
        size = torch.Size(shape).numel()
        entries = draw(st.lists(st.sampled_from(TIED + EXTREME[dtype]), min_size=size, max_size=size))
        values.append(torch.tensor(entries, dtype=torch.float64).to(dtype).view(shape))
        pool.append(torch.tensor(draw(st.lists(st.booleans(), min_size=size, max_size=size))).bool().view(shape))
    return values, draw(st.sampled_from([None, pool]))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(tensors(), st.data(), st.sampled_from([3, 1 << 20]))
def test_against_sorted_rationals(problem, data, chunk):
    values, pool = problem
    size = sum(int(p.sum()) for p in pool) if pool else sum(v.numel() for v in values)
    k = data.draw(st.integers(0, size))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(topk, "_CHUNK", chunk)
        assert_marks(top_k(values, k, pool), oracle(values, k, pool))


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -3e38, 1e-45])
def test_equal_values_go_by_index(value):
    values = [torch.full((2, 3), value), torch.full((4,), value)]
    for k in range(11):
        kept = torch.cat([m.view(-1) for m in top_k(values, k)])
        assert kept.tolist() == [True] * k + [False] * (10 - k)


def test_the_two_zeros_are_one():
    assert top_k([torch.tensor([-0.0, 0.0, -0.0, 0.0])], 2)[0].tolist() == [True, True, False, False]


def test_denormals_are_not_zero():
    values = [torch.tensor([0.0, 1e-45, -1e-45, 3e-45])]
    assert [top_k(values, k)[0].tolist() for k in (1, 2, 3)] == [
        [False, False, False, True],
        [False, True, False, True],
        [True, True, False, True],
    ]


def test_double_precision_is_not_rounded():
    values = [torch.tensor([1.0], dtype=torch.float64), torch.tensor([1 + 2**-52], dtype=torch.float64)]
    assert [bool(m) for m in top_k(values, 1)] == [False, True]
    assert [bool(m) for m in top_k([torch.tensor([1.0]), values[1]], 1)] == [False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_many_random_values_over_several_chunks(monkeypatch, dtype):
    monkeypatch.setattr(topk, "_CHUNK", 257)
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(n, generator=generator, dtype=dtype).mul(50).round().div(50) for n in (1000, 3, 700)]
    for k in (1, 17, 851, 1702):
        assert_marks(top_k(values, k), oracle(values, k))


def test_memory_layout_does_not_matter():
    generator = torch.Generator().manual_seed(0)
    plain = torch.randint(0, 3, (3, 4, 2, 2), generator=generator).float()
    channels_last = plain.to(memory_format=torch.channels_last)
    strided = torch.zeros(3, 4, 2, 4)[..., ::2].copy_(plain)
    assert not channels_last.is_contiguous()
    assert not strided.is_contiguous()
    pool = plain.roll(1) > 0
    for k in range(0, int(pool.sum()) + 1, 3):
        expected = oracle([plain], k, [pool])
        for layout in (channels_last, strided):
            assert_marks(top_k([layout], k, [pool]), expected)


def test_inputs_stay_as_they_are():
    values, pool = [torch.tensor([-0.0, 1.0, 0.0])], [torch.tensor([True, False, True])]
    before = [bits(t) for t in (*values, *pool)]
    for k in range(3):
        for mark in top_k(values, k, pool):
            mark.fill_(True)
    assert [bits(t) for t in (*values, *pool)] == before


def test_values_that_require_grad():
    assert top_k([torch.tensor([1.0, 2.0], requires_grad=True)], 1)[0].tolist() == [False, True]


@pytest.mark.parametrize("k", [-1, 4])
def test_k_out_of_range(k):
    with pytest.raises(ValueError, match=f"k = {k} of 3"):
        top_k([torch.zeros(5)], k, [torch.tensor([True, True, True, False, False])])
