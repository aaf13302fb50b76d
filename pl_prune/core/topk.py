"""Exact top-k over many tensors at once, in linear time and constant extra memory per chunk.

A finite float, read as an integer, orders as its value does once negative numbers are flipped. The k-th largest
key is found digit by digit (16 bits each) from histograms; ties at the threshold are kept in index order, so the
result is one and the same on every device and in every version of torch. Several k share the passes over the values.
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
    return top_ks(values, [k], pool)[0]


def top_ks(values: Sequence[Tensor], ks: Sequence[int], pool: Sequence[Tensor] | None = None) -> list[list[Tensor]]:
    """Do what `top_k` does, for several k in hardly more time than for one.

    Args:
        values: Finite floating-point tensors of any shapes; they compete with each other.
        ks: How many entries to mark, each time.
        pool: Boolean tensors of the same shapes; entries outside the pool do not compete. None: all compete.

    Returns:
        For each k, what `top_k` returns.

    Raises:
        ValueError: If a k is negative or larger than the pool.
    """
    dtype = torch.float64 if any(v.dtype == torch.float64 for v in values) else torch.float32
    bits = torch.finfo(dtype).bits
    size = sum(v.numel() for v in values) if pool is None else sum(int(p.count_nonzero()) for p in pool)
    if odd := [k for k in ks if not 0 <= k <= size]:
        raise ValueError(f"k = {odd[0]} of {size} entries")
    signed = any(bool(v.min() < 0) for v in values if v.numel())
    # The leading digits of each threshold's key, how many entries are wanted among those that share them, and how many do.
    found = {k: (0, k, size) for k in ks if 0 < k < size}
    for shift in range(bits - _DIGIT, -1, -_DIGIT) if found else ():
        histograms = {prefix: torch.zeros(1 << _DIGIT, dtype=torch.int64) for prefix, _, _ in found.values()}
        for chunk, inside in _chunks(values, pool):
            _count(_keys(chunk, dtype, signed), inside, shift, histograms)
        for k, (prefix, rest, _) in found.items():
            from_top = histograms[prefix].flip(0).cumsum(0)
            digit = int(torch.searchsorted(from_top, rest))
            above = int(from_top[digit - 1]) if digit else 0
            prefix = (prefix << _DIGIT) | ((1 << _DIGIT) - 1 - digit)
            found[k] = prefix, rest - above, int(from_top[digit]) - above
    return _mark(values, ks, pool, found, dtype, signed)


def _mark(
    values: Sequence[Tensor],
    ks: Sequence[int],
    pool: Sequence[Tensor] | None,
    found: dict[int, tuple[int, int, int]],
    dtype: torch.dtype,
    signed: bool,
) -> list[list[Tensor]]:
    """Mark the entries above each threshold, and as many of those at it as are wanted."""
    marked = []
    for k in ks:
        if k in found:
            marked.append([torch.empty(v.shape, dtype=torch.bool, device=v.device) for v in values])
        elif k and pool is not None:
            marked.append([p.clone() for p in pool])
        else:
            marked.append([torch.full(v.shape, k > 0, dtype=torch.bool, device=v.device) for v in values])
    searched = [i for i, k in enumerate(ks) if k in found]
    flat = {i: iter([part for m in marked[i] for part in torch.split(m.view(-1), _CHUNK)]) for i in searched}
    rests = {i: found[ks[i]][1] for i in searched}
    for chunk, inside in _chunks(values, pool) if searched else ():
        keys = _keys(chunk, dtype, signed)
        for i, parts in flat.items():
            prefix, wanted, tied = found[ks[i]]
            threshold = prefix - (1 << (torch.finfo(dtype).bits - 1))  # digits are counted from the lowest key
            out = next(parts)
            torch.ge(keys, threshold, out=out) if wanted == tied else torch.gt(keys, threshold, out=out)
            if inside is not None:
                out &= inside
            if wanted < tied and rests[i]:
                at = keys == threshold if inside is None else (keys == threshold) & inside
                first = at.nonzero()[: rests[i], 0]
                out[first] = True
                rests[i] -= first.numel()
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


def _count(keys: Tensor, inside: Tensor | None, shift: int, histograms: dict[int, Tensor]) -> None:
    """Add to each prefix's histogram the digits at `shift` of the keys in the pool whose leading digits it is."""
    if inside is not None:
        keys = keys[inside]
    bits = keys.element_size() * 8
    if shift + _DIGIT == bits:
        histograms[0] += torch.bincount((keys >> shift).add_(1 << (_DIGIT - 1)), minlength=1 << _DIGIT).cpu()
        return
    if len(histograms) > 1:  # few keys share the first digit of any threshold
        near = torch.zeros(1 << _DIGIT, dtype=torch.bool)
        near[[prefix >> (bits - shift - 2 * _DIGIT) for prefix in histograms]] = True
        first = (keys >> (bits - _DIGIT)).add_(1 << (_DIGIT - 1))
        keys = keys[near.to(keys.device).index_select(0, first.int())]
    leading = keys >> (shift + _DIGIT)
    for prefix, histogram in histograms.items():
        alike = leading == prefix - (1 << (bits - shift - _DIGIT - 1))
        digits = ((keys if bool(alike.all()) else keys[alike]) >> shift).bitwise_and_((1 << _DIGIT) - 1)
        histogram += torch.bincount(digits, minlength=1 << _DIGIT).cpu()
