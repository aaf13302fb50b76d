"""`iterate`: the rounds of a criterion that scores a network as masked so far."""

from __future__ import annotations

import torch

from pl_prune.core import sync
from pl_prune.core.allocate import Allocation, LayerAllocation
from pl_prune.core.criterion import Criterion
from pl_prune.core.masks import MaskSet
from pl_prune.core.probe import Probe
from pl_prune.core.score import run_criterion
from pl_prune.core.types import PruneError, Scores, check_sparsity, describe


def iterate(
    criterion: Criterion, probe: Probe, allocation: Allocation, sparsity: float, within: MaskSet | None = None
) -> tuple[MaskSet, Scores]:
    """Score and prune in the criterion's rounds, and leave the weights as they were.

    Round e of E keeps the fraction d (k / d)^(e / E) on the way from the density d to k = 1 - sparsity; the last round
    keeps exactly what was asked. The weights are masked while later rounds score, and what a round pruned stays pruned
    unless the criterion says otherwise.

    Args:
        criterion: How to score; one round for most.
        probe: What to score.
        allocation: Where the kept entries go.
        sparsity: Fraction to prune in the end, in [0, 1).
        within: Masks already in force, which keep more; nothing that they prune comes back.

    Returns:
        The same masks on every rank, and the scores of the last round.

    Raises:
        PruneError: If the sparsity is out of range, or scores that compare nothing between layers meet an allocation that
            lets layers compete.

    Source:
        Tanaka et al., Pruning neural networks without any data by iteratively conserving synaptic flow, algorithm 1.
        The exponent acts on the density:
        the port in the code of Gollini Navarrete et al. lets it act on the sparsity, and so removes almost everything
        in its first round.
    """
    check_sparsity(sparsity)
    if criterion.layerwise_only and not isinstance(allocation, LayerAllocation):
        raise PruneError(
            f"Expected an allocation with a budget for each layer, since {type(criterion).__name__} orders the entries of a layer and "
            f"compares nothing between layers; found {describe(allocation)}. Use Layerwise(), ERK() or SmartRatio()."
        )
    device = next(iter(probe.params.values())).device
    whole = {name: p.detach().clone() for name, p in probe.params.items()} if criterion.rounds > 1 else {}
    density = 1.0 if within is None else 1 - within.sparsity()
    masks = within
    try:
        for done in probe.track(range(1, criterion.rounds + 1), "rounds") if whole else [1]:
            target = sparsity_after(done, criterion.rounds, sparsity, density)
            scores = sync.agreed(lambda: run_criterion(criterion, probe.fresh(whole)))
            masks = _same(allocation, scores, target, within if criterion.can_return else masks, device)
            if done < criterion.rounds:
                _restore(probe, whole)  # what an earlier round pruned may have returned
                masks.apply_(probe.params)
    finally:
        _restore(probe, whole)
    assert masks is not None
    return masks, scores


def sparsity_after(done: int, rounds: int, sparsity: float, density: float = 1.0) -> float:
    """Return the sparsity after a round, on a way that removes the same fraction of what is left each time.

    Args:
        done: Rounds done, from 1 on.
        rounds: Rounds in all.
        sparsity: What is asked for in the end.
        density: What is kept before the first round.

    Returns:
        The sparsity; exactly what was asked for after the last round.
    """
    return sparsity if done == rounds else 1 - density * ((1 - sparsity) / density) ** (done / rounds)


@torch.no_grad()
def _restore(probe: Probe, whole: Scores) -> None:
    for name, weight in whole.items():
        probe.params[name].copy_(weight)


def _same(
    allocation: Allocation, scores: Scores, sparsity: float, within: MaskSet | None, device: torch.device
) -> MaskSet:
    return sync.masks_of_rank_zero(lambda: allocation(scores, sparsity, within), device)
