"""`score_groups`: from a model, its groups and a criterion to one score per unit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from pl_prune.core import sync
from pl_prune.core.criterion import Criterion
from pl_prune.core.group_criterion import GroupCriterion, out_names
from pl_prune.core.groups import GroupScores, ParameterGroups
from pl_prune.core.loss import Loss
from pl_prune.core.probe import Probe
from pl_prune.core.sandbox import untouched
from pl_prune.core.score import check_data, repeatable
from pl_prune.core.types import Params, PruneError, check_scores, check_type


def score_groups(
    model: nn.Module,
    criterion: GroupCriterion,
    groups: ParameterGroups,
    batches: Iterable[Any] | None = None,
    loss_fn: Loss | None = None,
) -> GroupScores:
    """Score the units of groups, and leave the model and the random state as they were.

    The model is scored in evaluation mode. In a distributed job every rank passes its own batches and gets the scores
    of all.

    Args:
        model: The module that the groups were traced on.
        criterion: How to score.
        groups: What `trace_groups` returned.
        batches: Batches on the model's device; None for criteria without data.
        loss_fn: `loss_fn(model, batch)`, the mean loss of a batch; None for criteria without data.

    Returns:
        One score per unit, (size,) by root, higher = keep.

    Raises:
        PruneError: If the groups are of another model, data that the criterion needs is missing, or a loss or score is not
            finite.

    >>> import torch, pl_prune as plp
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> groups = plp.trace_groups(model, torch.ones(1, 2))
    >>> units = plp.score_groups(model, plp.ByGroup(plp.Magnitude()), groups)
    >>> {root: tuple(s.shape) for root, s in units.items()}
    {'0': (3,)}
    """
    check_group_criterion(criterion)
    check_type("groups", groups, ParameterGroups, "what `trace_groups` returned")
    with untouched(model):
        data = list(batches) if batches is not None else []
        check_data([criterion], data, loss_fn)
        probe = Probe(model, producers(model, groups), repeatable(model, loss_fn), data)
        return sync.agreed(lambda: run_group_criterion(criterion, probe, groups))


def check_group_criterion(criterion: object) -> None:
    """Raise unless a criterion scores groups.

    Args:
        criterion: The criterion.

    Raises:
        PruneError: If it scores entries, or is no criterion.
    """
    if isinstance(criterion, Criterion):
        raise PruneError(
            f"Expected a criterion of groups; found {type(criterion).__name__}, which scores single entries. "
            f"Wrap it: pl_prune.ByGroup(pl_prune.{type(criterion).__name__}())."
        )
    check_type("criterion", criterion, GroupCriterion, "for example pl_prune.ByGroup(pl_prune.Magnitude())")


def producers(model: nn.Module, groups: ParameterGroups) -> Params:
    """Return the parameters that produce the units of groups, and let them have gradients; inside `untouched`.

    Args:
        model: The module that the groups were traced on.
        groups: The groups.

    Returns:
        Parameters by name, in `named_parameters()` order.

    Raises:
        PruneError: If the model has other parameters.
    """
    names = set(out_names(groups))
    params = {name: p for name, p in model.named_parameters() if name in names}
    odd = sorted(names - params.keys()) + [n for n, p in params.items() if tuple(p.shape) != groups.shapes[n]]
    if odd:
        raise PruneError(
            f"Expected the network that the groups were traced on; found other {odd[:5]}. Trace this {type(model).__name__}."
        )
    for p in params.values():
        p.requires_grad_()
    return params


def run_group_criterion(criterion: GroupCriterion, probe: Probe, groups: ParameterGroups) -> GroupScores:
    """Call a criterion of groups and hold it to its contract.

    Args:
        criterion: How to score.
        probe: What to score.
        groups: The groups.

    Returns:
        Checked scores.

    Raises:
        PruneError: If the scores are not one finite number per unit.
    """
    scores = criterion(probe, groups)
    found = {root: tuple(s.shape) for root, s in scores.items()}
    expected = {root: (size,) for root, size in groups.sizes.items()}
    if found != expected:
        odd = sorted(set(found.items()) ^ set(expected.items()))[:4]
        raise PruneError(
            f"Expected {type(criterion).__name__} to give one score per unit; found differences at {odd}. This is a bug of the criterion."
        )
    check_scores(scores)
    return scores
