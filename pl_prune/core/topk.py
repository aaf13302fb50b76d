"""Exact top-k over many tensors at once, in linear time and constant extra memory per chunk.

A finite float, read as an integer, orders as its value does once negative numbers are flipped. The k-th largest
key is found digit by digit (16 bits each) from histograms; ties at the threshold are kept in index order, so the
result is
one and the same on every device and in every version of torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

_DIGIT = 16
_CHUNK = 1 << 20


def top_k(values: Sequence[Tensor], k: int, pool: Sequence[Tensor] | None = None) -> list[Tensor]:
    """Mark the k largest entries of all tensors together; ties go to the earlier tensor, then the lower flat index.

    Args:
        values: Finite floating-point tensors of any shapes; they compete with each other.
        k: How many entries to mark.
        pool: Boolean tensors of the same shapes; entries outside the pool do not compete. None: all compete.

    Returns:
        Boolean tensors of the shapes of `values`, with exactly k `True` in all.

    Raises:
        ValueError: If k is negative or larger than the pool.

    >>> top_k([torch.tensor([1.0, 3.0, 3.0]), torch.tensor([3.0])], 2)
    [tensor([False,  True,  True]), tensor([False])]
    """
    dtype = torch.float64 if any(v.dtype == torch.float64 for v in values) else torch.float32
    bits = torch.finfo(dtype).bits
    size = sum(v.numel() for v in values) if pool is None else sum(int(p.count_nonzero()) for p in pool)
    if not 0 <= k <= size:
        raise ValueError(f"k = {k} of {size} entries")
    if k == 0 or k == size:
        whole = [torch.ones_like(v, dtype=torch.bool) for v in values] if pool is None else [p.clone() for p in pool]
        return whole if k else [torch.zeros_like(w) for w in whole]

    signed = any(bool(v.min() < 0) for v in values if v.numel())
    # The leading digits of the threshold's key, and how many entries are wanted among those that share them.
    prefix, rest = 0, k
    for shift in range(bits - _DIGIT, -1, -_DIGIT):
        histogram = torch.zeros(1 << _DIGIT, dtype=torch.int64)
        for chunk, inside in _chunks(values, pool):
            leading = None if shift + _DIGIT == bits else prefix
            histogram += _histogram(_keys(chunk, dtype, signed), inside, shift, leading).cpu()
        from_top = histogram.flip(0).cumsum(0)
        digit = int(torch.searchsorted(from_top, rest))
        rest -= int(from_top[digit - 1]) if digit else 0
        prefix = (prefix << _DIGIT) | ((1 << _DIGIT) - 1 - digit)
    threshold = prefix - (1 << (bits - 1))  # digits are counted from the lowest key

    marked = [torch.empty(v.shape, dtype=torch.bool, device=v.device) for v in values]
    flat = [torch.split(m.view(-1), _CHUNK) for m in marked]
    for out, (chunk, inside) in zip([c for m in flat for c in m], _chunks(values, pool), strict=True):
        keys = _keys(chunk, dtype, signed)
        torch.gt(keys, threshold, out=out)
        if inside is not None:
            out &= inside
        if rest:
            tied = keys == threshold if inside is None else (keys == threshold) & inside
            count = int(tied.count_nonzero())
            if count <= rest:
                out |= tied
            else:
                out[tied.nonzero()[:rest, 0]] = True
            rest -= min(count, rest)
    return marked


def _chunks(values: Sequence[Tensor], pool: Sequence[Tensor] | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    for i, value in enumerate(values):
        chunks = torch.split(value.detach().reshape(-1), _CHUNK)
        inside = [None] * len(chunks) if pool is None else torch.split(pool[i].reshape(-1), _CHUNK)
        yield from zip(chunks, inside, strict=True)


def _keys(chunk: Tensor, dtype: torch.dtype, signed: bool) -> Tensor:
    """Signed integers in the order of the values; -0.0 is 0.0. Only negative numbers need work."""
    bits = torch.finfo(dtype).bits
    raw = (chunk.to(dtype) + 0.0).view(torch.int64 if bits == 64 else torch.int32)
    return raw.bitwise_xor_((raw >> (bits - 1)).bitwise_and_((1 << (bits - 1)) - 1)) if signed else raw


def _histogram(keys: Tensor, inside: Tensor | None, shift: int, prefix: int | None) -> Tensor:
    """Count the digit at `shift` of the keys in the pool whose leading digits are `prefix`."""
    if inside is not None:
        keys = keys[inside]
    bits = keys.element_size() * 8
    if prefix is None:
        digits = (keys >> shift).add_(1 << (_DIGIT - 1))
    else:
        leading = prefix - (1 << (bits - shift - _DIGIT - 1))
        alike = (keys >> (shift + _DIGIT)) == leading
        digits = (keys if bool(alike.all()) else keys[alike]) >> shift
        digits = digits.bitwise_and_((1 << _DIGIT) - 1)
    return torch.bincount(digits, minlength=1 << _DIGIT)
