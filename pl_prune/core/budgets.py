"""`nested_masks`: the masks of many budgets from one look at the scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from pl_prune.core.allocate import Allocation, Global, LayerAllocation
from pl_prune.core.masks import MaskSet
from pl_prune.core.topk import top_ks
from pl_prune.core.types import PruneError, check_scores, check_sparsity, check_type, prune_count


def nested_masks(
    allocation: Allocation, scores: Mapping[str, Tensor], sparsities: Sequence[float]
) -> dict[float, MaskSet]:
    """Select for several sparsities; `Global`, `Layerwise` and their like without floors share the search for thresholds.

    Args:
        allocation: Where the kept entries go.
        scores: Finite scores by parameter name, higher = keep.
        sparsities: Fractions of all entries to prune, in [0, 1).

    Returns:
        For each sparsity what the allocation returns; of two of them, the sparser one keeps nothing that the other prunes.

    Raises:
        PruneError: If there is no sparsity, one is out of range, or the allocation refuses.

    >>> import torch
    >>> scores = {"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([2.0, 0.0])}
    >>> {s: masks.counts() for s, masks in nested_masks(Global(), scores, [0.5, 0.75]).items()}
    {0.5: {'a': (1, 2), 'b': (1, 2)}, 0.75: {'a': (1, 2), 'b': (0, 2)}}
    """
    if not sparsities:
        raise PruneError("Expected at least one sparsity; found none. Ask for some, such as 0.9 0.95 0.98.")
    for sparsity in sparsities:
        check_sparsity(sparsity)
    check_type("scores", scores, Mapping, "what `score` returned for one criterion")
    floors = allocation.min_keep_rows or allocation.min_keep_cols or allocation.min_per_layer
    if floors or not (type(allocation) is Global or isinstance(allocation, LayerAllocation)):
        return {sparsity: allocation(scores, sparsity) for sparsity in sparsities}
    check_scores(scores)
    values = list(scores.values())
    sizes = [value.numel() for value in values]
    budgets = [sum(sizes) - prune_count(sparsity, sum(sizes)) for sparsity in sparsities]
    if isinstance(allocation, LayerAllocation):
        shapes, none = [value.shape for value in values], [0] * len(values)
        shares = [allocation._split(shapes, sizes, none, keep) for keep in budgets]
        layers = [
            top_ks([value], [share[i] for share in shares]) for i, value in enumerate(values)
        ]  # by layer, then by budget
        found = [[layer[j][0] for layer in layers] for j in range(len(budgets))]
    else:
        found = top_ks(values, budgets)
    return {s: MaskSet(dict(zip(scores, marks, strict=True))) for s, marks in zip(sparsities, found, strict=True)}
