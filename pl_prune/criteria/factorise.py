"""Non-negative factorisation of many matrices at once: A, of shape (n, o, d), is about V^T H with V (n, r, o) and H (n, r, d).

V is held transposed, so that both factors are updated by the same code. Matrices of other shapes join by factors that are
zero beyond their sides and stay so: products with A are made shape by shape, all else once for all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor

Solver = Literal["mu", "hals"]
Divergence = Literal["frobenius", "kl", "itakura-saito"]

EPSILON = 1e-8
COPIES = {"frobenius": 0, "kl": 1, "itakura-saito": 2}
"""How many copies of one A an update makes."""
SMALL = 1 << 18
"""Up to how many entries of an A waking other threads takes longer than what they would do."""

_ALIGNED = 16
_PASSES = 3  # of HALS over the rows of a factor, for each product of the other with A
_CHECK_EVERY = 10
_ZERO = 1e-6  # NNDSVDa: what is below counts as zero


def factorise(
    matrices: Sequence[Tensor],
    v: Tensor,
    h: Tensor,
    iterations: int,
    solver: Solver = "mu",
    divergence: Divergence = "frobenius",
    tolerance: float = 0.0,
) -> None:
    """Fit V^T H to non-negative matrices, in place; V is updated before H.

    Args:
        matrices: Stacks of matrices of one shape, (n_i, o_i, d_i), with means of about 1: the epsilon of the denominators
            is absolute.
        v: First factors of all of them in order, (n, r, o) with o the largest `width(o_i, r)`; zero beyond a
            matrix's own o_i, positive elsewhere; overwritten.
        h: Second factors, (n, r, d), likewise; overwritten.
        iterations: How many times both factors are updated.
        solver: Multiplicative updates, or HALS (Frobenius only), each of whose iterations passes three times over the
            rows of either factor.
        divergence: What is minimised.
        tolerance: A matrix is finished when its divergence fell by less than this fraction over ten iterations; 0
            never.

    Source:
        "mu": Lee and Seung, Algorithms for non-negative matrix factorization, theorems 1 and 2, for Frobenius and KL;
        for Itakura-Saito, Fevotte and Idier, Algorithms for nonnegative matrix factorization with the beta-divergence,
        the updates with exponent 1/2, which never increase it.
        "hals": Cichocki and Phan, Fast local algorithms for large scale nonnegative matrix and tensor factorizations,
        with the repeated passes of Gillis and Glineur, Accelerated multiplicative updates and hierarchical ALS.
    """
    update = _hals if solver == "hals" else _UPDATES[divergence]
    halves = _Half(v, h, [a.mT for a in matrices]), _Half(h, v, matrices)
    done = torch.zeros(len(v), dtype=torch.bool, device=v.device)
    final_v, final_h = (v.clone(), h.clone()) if tolerance else (v, h)
    with _threads_for(matrices):
        before = halves[1].divergences(divergence) if tolerance else None
        for i in range(iterations):
            for half in halves:
                update(half)
            if before is not None and (i + 1) % _CHECK_EVERY == 0:
                now = halves[1].divergences(divergence)
                new = ~done & (before - now <= tolerance * before)
                final_v[new], final_h[new] = v[new], h[new]
                done |= new
                before = now
                if bool(done.all()):
                    break
    if tolerance:
        v[done], h[done] = final_v[done], final_h[done]


def width(side: int, rank: int) -> int:
    """Return the least width of a factor with which a matrix gets the same bits alone and beside others.

    Below 400 multiplications `torch.bmm` takes another way, which rounds differently; so it may where rows are not aligned
    to 64 bytes.

    Args:
        side: The matrix's side.
        rank: Rank of the factor.

    Returns:
        The side, or more.
    """
    return -(-max(side, 400 // rank + 1) // _ALIGNED) * _ALIGNED


def divergence_of(a: Tensor, v: Tensor, h: Tensor, kind: Divergence) -> Tensor:
    """Return what `factorise` minimises: half the squared distance, or the divergence, of each matrix.

    Args:
        a: The matrices, (n, o, d).
        v: First factors, (n, r, o).
        h: Second factors, (n, r, d).
        kind: Which divergence.

    Returns:
        One number for each matrix, (n,).
    """
    if kind == "frobenius":
        cross = (v * torch.bmm(h, a.mT)).sum((1, 2))
        square = (torch.bmm(v, v.mT) * torch.bmm(h, h.mT)).sum((1, 2))
        whole: Tensor = torch.linalg.vector_norm(a, dim=(1, 2)).square()
        return (whole + square) / 2 - cross
    fit = torch.bmm(v.mT, h).add_(EPSILON)
    if kind == "kl":
        total = fit.sum((1, 2))
        return torch.xlogy(a, fit.reciprocal_().mul_(a)).sum((1, 2)) - a.sum((1, 2)) + total
    ratio = torch.div(a, fit, out=fit)
    total = ratio.sum((1, 2))
    return total - ratio.clamp_(min=EPSILON).log_().add_(1).sum((1, 2))


class _Half:
    """A factor x that is to be updated while the other one, y, is fixed: A is about y^T x."""

    def __init__(self, x: Tensor, y: Tensor, matrices: Sequence[Tensor]) -> None:
        self.x = x
        self.above, self.below = torch.zeros_like(x), torch.zeros_like(x)
        self.gram = x.new_zeros(len(x), x.shape[1], -(-x.shape[1] // _ALIGNED) * _ALIGNED)[:, :, : x.shape[1]]
        self.epsilon = x.new_full((1, 1, 1), EPSILON)
        self.rows = list(zip(*(torch.split(t, 1, 1) for t in (x, self.above, self.gram)), strict=True))
        self.pieces, self.runs = [], []
        first = 0
        for side, run in groupby(matrices, key=lambda a: a.shape[1]):
            start = first
            for a in run:
                here = slice(first, first := first + len(a))
                above, below = (t[here, :, : a.shape[2]] for t in (self.above, self.below))
                self.pieces.append((a, x[here, :, : a.shape[2]], y[here, :, :side], above, below))
            self.runs.append((y[start:first, :, :side], y[start:first, :, :side].mT, self.gram[start:first]))

    def multiply(self) -> None:
        """Set `above` to y A and `gram` to y y^T."""
        for a, _, y, above, _ in self.pieces:
            above.copy_(torch.bmm(y, a))
        for y, transposed, gram in self.runs:
            gram.copy_(torch.bmm(y, transposed))

    def divergences(self, kind: Divergence) -> Tensor:
        return torch.cat([divergence_of(a, y, x, kind) for a, x, y, *_ in self.pieces])


def _frobenius(half: _Half) -> None:
    half.multiply()
    torch.baddbmm(half.epsilon, half.gram, half.x, out=half.below)
    half.x.mul_(half.above).div_(half.below)


def _kl(half: _Half) -> None:
    for a, x, y, above, below in half.pieces:
        fit = torch.bmm(y.mT, x).add_(EPSILON)
        above.copy_(torch.bmm(y, torch.div(a, fit, out=fit)))
        torch.sum(y, 2, keepdim=True, out=below[:, :, :1])
    half.x.mul_(half.above).div_(half.below[:, :, :1].add_(EPSILON))


def _itakura_saito(half: _Half) -> None:
    for a, x, y, above, below in half.pieces:
        inverse = torch.bmm(y.mT, x).add_(EPSILON).reciprocal_()
        below.copy_(torch.bmm(y, inverse))
        above.copy_(torch.bmm(y, inverse.square_().mul_(a)))
    half.x.mul_(half.above.div_(half.below.add_(EPSILON)).sqrt_())


_UPDATES = {"frobenius": _frobenius, "kl": _kl, "itakura-saito": _itakura_saito}


def _hals(half: _Half) -> None:
    """Set each row of x in turn to its best non-negative value, all else fixed; a row without a partner stays as it is."""
    half.multiply()
    own = half.gram.diagonal(dim1=1, dim2=2)
    inverse = own.clamp(min=torch.finfo(own.dtype).tiny).reciprocal_().unsqueeze(2)
    half.above.mul_(inverse)
    half.gram.mul_(inverse)
    own.round_().sub_(1)  # 1 to 0; 0, where there is no partner, to -1
    best = torch.empty_like(half.x[:, :1])
    for _ in range(_PASSES):
        for row, wanted, others in half.rows:
            torch.baddbmm(wanted, others, half.x, alpha=-1, out=best)
            torch.clamp(best, min=0, out=row)


def svd_start(a: Tensor, rank: int, spread: bool) -> tuple[Tensor, Tensor]:
    """Make first factors out of the leading singular vectors; no random number is drawn.

    Args:
        a: The matrices, (n, o, d), with a mean of about 1.
        rank: Rank of the factors.
        spread: False takes the stronger of the positive and the negative part of each pair of vectors and puts the
            matrix's mean in place of zeros (NNDSVDa); True takes absolute values, so that nothing starts at zero.

    Returns:
        V and H.

    Source:
        Boutsidis and Gallopoulos, SVD based initialization, algorithm 1, variant NNDSVDa, for False; True is ours.
    """
    if a.shape[1] > a.shape[2]:
        h, v = svd_start(a.mT, rank, spread)
        return v, h
    size, device = a.shape[1], a.device if a.device.type != "mps" else torch.device("cpu")  # MPS has no float64
    gram = torch.zeros(len(a), size, size, dtype=torch.float64, device=device)
    for block in torch.split(a, size, 2):
        wide = block.to(device, torch.float64)
        gram.baddbmm_(wide, wide.mT)
    values, vectors = torch.linalg.eigh(gram)  # squared singular values, ascending
    roots = values[:, -rank:].flip(1).clamp_(min=0).pow_(0.25).unsqueeze(2)
    roots = roots.maximum(1e-6 * roots[:, :1]).to(a).clamp_(min=torch.finfo(a.dtype).tiny)
    left = vectors[:, :, -rank:].flip(2).mT.to(a)
    v, h = left * roots, torch.bmm(left, a).div_(roots)
    if spread:
        return v.abs_(), h.abs_()
    parts = [(v.clamp(min=0), h.clamp(min=0)), (v.neg().clamp_(min=0), h.neg().clamp_(min=0))]
    norms = [[torch.linalg.vector_norm(x, dim=2, keepdim=True) for x in pair] for pair in parts]
    positive = norms[0][0] * norms[0][1] > norms[1][0] * norms[1][1]
    v, h = (torch.where(positive, up, down) for up, down in zip(*parts, strict=True))
    size_v, size_h = (torch.where(positive, up, down).clamp_(min=1e-30) for up, down in zip(*norms, strict=True))
    balance, mean = (size_h / size_v).sqrt_(), a.mean((1, 2)).view(-1, 1, 1)
    v, h = v.mul_(balance), h.div_(balance)
    return torch.where(v < _ZERO, mean, v), torch.where(h < _ZERO, mean, h)


@contextmanager
def _threads_for(matrices: Sequence[Tensor]) -> Iterator[None]:
    """Use one thread where all matrices are small."""
    threads = torch.get_num_threads()
    large = any(a.numel() > SMALL or a.device.type != "cpu" for a in matrices)
    if large or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
