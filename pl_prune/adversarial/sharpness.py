"""How sharp a loss is in the space of scores, and how far masks have moved."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil

import torch
from torch import Tensor

from pl_prune.adversarial.score_state import Scored
from pl_prune.adversarial.scored import ScoredWeights
from pl_prune.core.hessian import hessian_products
from pl_prune.core.masks import MaskSet
from pl_prune.core.seeds import generator_of

Loss = Callable[[], Tensor]
"""Computes the loss of fixed data on the network as it is: evaluation mode, fixed adversarial examples."""


def largest_eigenvalue(scored: ScoredWeights, loss: Loss, iterations: int = 10, seed: int = 0) -> float:
    """Return the eigenvalue of largest absolute value, with its sign, of the Hessian of the loss with respect to scores.

    Masks have no derivative, so it is the Hessian that the straight-through estimator sees, D H D, with H that of the weights
    in use, w0 * M(s), and D the diagonal matrix of w0 * sign(s). It takes one forward pass, and a double backward pass for each
    iteration and one more.

    Args:
        scored: Weights and scores.
        loss: The loss.
        iterations: Of the power iteration.
        seed: Of the unit vector that it starts from.

    Returns:
        v'Hv of the last unit vector; 0 where the Hessian vanishes.

    Source:
        S2AP, equations 10 and 11; 10 iterations, as in the paper.
    """
    names = list(scored.params)

    def swapped(vector: list[Tensor]) -> list[Tensor]:
        return list(scored.score_gradients(dict(zip(names, vector, strict=True))).values())

    v = [torch.randn(s.shape, generator=generator_of(seed, name)).to(s) for name, s in scored.scores.items()]
    v = [part / _length(v) for part in v]
    value = 0.0
    vectors = (swapped(v) for _ in range(iterations + 1))  # each is made when the product before it is known
    for product in hessian_products(loss, list(scored.params.values()), vectors):
        image = swapped(product)
        value = float(torch.stack([(a * b).sum() for a, b in zip(v, image, strict=True)]).sum())
        length = _length(image)
        if not float(length) > 0:
            break
        v = [part / length for part in image]
    return value


def loss_difference(scored: Scored, loss: Loss, rho: float, iterations: int = 20) -> float:
    """Return by how much the loss can rise when every score moves by at most `rho` times its absolute value.

    The largest rise that APGD finds, with the masks of the moved scores: a lower bound, and never negative. The network is as it
    was at the end, also after an exception. One forward and backward pass for each iteration and one more.

    Args:
        scored: Scores, of weights or of units.
        loss: The loss.
        rho: Radius, as a fraction.
        iterations: Of APGD.

    Returns:
        max L(w0 * M(s + nu)) - L(w0 * M(s)).

    Source:
        S2AP, equation 12, with c = |s|; Croce and Hein, Reliable evaluation of adversarial robustness with an ensemble of diverse
        parameter-free attacks, algorithm 1. The paper leaves c and the iterations open. Divergence: momentum begins anew where the step
        is halved.
    """
    scores = scored.scores
    now = before = best = torch.cat([torch.zeros_like(s).flatten() for s in scores.values()])  # nu / |s|
    try:
        start, slope = _climb(scored, loss, now)
        top, best_slope, last = start, slope, start
        step, rises, since, halved, top_before = 2 * rho, 0, 0, False, start
        checkpoints = _checkpoints(iterations)
        for k in range(1, iterations + 1):
            share = 0.75 if k > 1 else 1.0
            aim = (now + step * slope).clamp_(-rho, rho)
            new = (now + share * (aim - now) + (1 - share) * (now - before)).clamp_(-rho, rho)
            before, now = now, new
            value, slope = _climb(scored, loss, now)
            rises, last = rises + (value > last), value
            if value > top:
                top, best, best_slope = value, now, slope
            if k in checkpoints:
                halved = rises < 0.75 * (k - since) or (not halved and top == top_before)
                if halved:
                    step, now, before, slope, last = step / 2, best, best, best_slope, top
                rises, since, top_before = 0, k, top
    finally:
        scored.put()
    return top - start


def mask_stability(first: MaskSet, now: MaskSet) -> tuple[float, float]:
    """Return how far masks are from the first ones: 0 where they are the same.

    Args:
        first: The masks at initialisation, before any step.
        now: Masks of the same names and shapes.

    Returns:
        The Hamming distance as a fraction of all entries; and as a fraction of the entries that both keep, each counted, which
        sparsity does not scale: where both keep k, the fraction of the k that were exchanged.

    Source:
        S2AP, equation 13. The paper writes |m_0|; its scale falls as sparsity grows, so the first number is the paper's.

    >>> one = MaskSet({"w": torch.tensor([True, True, False, False])})
    >>> mask_stability(one, MaskSet({"w": torch.tensor([True, False, True, False])}))
    (0.5, 0.5)
    """
    distance = first.hamming(now)
    kept = sum(k for masks in (first, now) for k, _ in masks.counts().values())
    return distance, distance * sum(n for _, n in first.counts().values()) / max(kept, 1)


def _length(parts: list[Tensor]) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(parts)))
    return length


def _climb(scored: Scored, loss: Loss, moved: Tensor) -> tuple[float, Tensor]:
    """Return the loss at s + |s| * moved, and the signs of its straight-through gradient."""
    parts = torch.split(moved, [s.numel() for s in scored.scores.values()])
    scored.put({
        name: part.view(s.shape) * s.abs() for (name, s), part in zip(scored.scores.items(), parts, strict=True)
    })
    value = loss()
    found = torch.autograd.grad(value, list(scored.params.values()), allow_unused=True)
    gradients = {
        name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(scored.params.items(), found, strict=True)
    }
    slopes = scored.score_gradients(gradients)
    signs = [slopes[name].sign().flatten().to(torch.int8) for name in scored.scores]
    return float(value.detach()), torch.cat(signs)


def _checkpoints(iterations: int) -> set[int]:
    """Return where APGD looks whether to halve its step."""
    places, before, at = [], 0.0, 0.22
    while at <= 1:
        places.append(ceil(at * iterations))
        before, at = at, at + max(at - before - 0.03, 0.06)
    return set(places)
