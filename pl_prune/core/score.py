"""`score`: from a model and a criterion to scores."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from pl_prune.core import sync
from pl_prune.core.criterion import Criterion
from pl_prune.core.loss import Loss
from pl_prune.core.probe import Probe
from pl_prune.core.sandbox import untouched
from pl_prune.core.select import Select
from pl_prune.core.types import Params, PruneError, Scores, check_scores, check_type


def score(
    model: nn.Module,
    criterion: Criterion,
    batches: Iterable[Any] | None = None,
    loss_fn: Loss | None = None,
    select: Select | None = None,
) -> Scores:
    """Score the prunable entries of a model, and leave the model and the random state as they were.

    The model is scored in evaluation mode. In a distributed job every rank passes its own batches and gets the scores
    of all.

    Args:
        model: Any module, on any device.
        criterion: How to score.
        batches: Batches on the model's device, (inputs, targets) for criteria that need logits; None for data-free
            criteria.
        loss_fn: `loss_fn(model, batch)`, the mean loss of a batch; None for data-free criteria.
        select: Which parameters are prunable; the default `Select()` when None.

    Returns:
        Scores by parameter name, higher = keep, float32 or float64.

    Raises:
        PruneError: If nothing is prunable, data that the criterion needs is missing, or a loss or score is not finite.

    >>> import torch, pl_prune as plp
    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    >>> batch = torch.ones(4, 2), torch.zeros(4, 1)
    >>> scores = plp.score(model, plp.SNIP(), [batch], lambda m, b: nn.functional.mse_loss(m(b[0]), b[1]))
    >>> {name: tuple(s.shape) for name, s in scores.items()}
    {'0.weight': (2, 2)}
    """
    check_type("criterion", criterion, Criterion, "for example pl_prune.SNIP()")
    select = select or Select()
    with untouched(model):
        data = list(batches) if batches is not None else []
        no_data = criterion.needs_data and not data and sync.rank_and_size()[1] == 1
        if no_data or (criterion.needs_loss and loss_fn is None):
            raise PruneError(
                f"Expected batches and a loss function, which {type(criterion).__name__} needs; "
                f"found {len(data)} batches and loss_fn={loss_fn!r}. Pass both."
            )
        run = (lambda: loss_fn(model, data[0])) if loss_fn is not None and data else None
        params = select(model, run)
        return run_criterion(criterion, Probe(model, params, loss_fn, data))


def run_criterion(criterion: Criterion, probe: Probe) -> Scores:
    """Call a criterion and hold it to its contract.

    Args:
        criterion: How to score.
        probe: What to score.

    Returns:
        Checked scores.

    Raises:
        PruneError: If the scores have other names or shapes than the parameters, or are not finite.
    """
    scores = criterion(probe)
    _check_shapes(scores, probe.params, type(criterion).__name__)
    check_scores(scores)
    return scores


def _check_shapes(scores: Scores, params: Params, name: str) -> None:
    found = {key: tuple(s.shape) for key, s in scores.items()}
    expected = {key: tuple(p.shape) for key, p in params.items()}
    if found != expected:
        odd = sorted(set(found.items()) ^ set(expected.items()))[:4]
        raise PruneError(
            f"Expected {name} to score every prunable parameter in its shape; found differences at {odd}. This is a bug of the criterion."
        )
