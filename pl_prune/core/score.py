"""`score`: from a model and a criterion to scores."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, overload

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pl_prune.core import sync
from pl_prune.core.batch import cut
from pl_prune.core.criterion import Criterion
from pl_prune.core.group_criterion import GroupCriterion
from pl_prune.core.loss import Loss
from pl_prune.core.probe import Probe
from pl_prune.core.sandbox import attributes_of, untouched
from pl_prune.core.select import Select
from pl_prune.core.types import Params, PruneError, Scores, check_scores, check_type


@overload
def score(
    model: nn.Module,
    criterion: Criterion,
    batches: Iterable[Any] | None = None,
    loss_fn: Loss | None = None,
    select: Select | None = None,
) -> Scores: ...


@overload
def score(
    model: nn.Module,
    criterion: Sequence[Criterion],
    batches: Iterable[Any] | None = None,
    loss_fn: Loss | None = None,
    select: Select | None = None,
) -> list[Scores]: ...


def score(
    model: nn.Module,
    criterion: Criterion | Sequence[Criterion],
    batches: Iterable[Any] | None = None,
    loss_fn: Loss | None = None,
    select: Select | None = None,
) -> Scores | list[Scores]:
    """Score the prunable entries of a model, and leave the model and the random state as they were.

    The model is scored in evaluation mode. In a distributed job every rank passes its own batches and gets the scores
    of all.

    Args:
        model: Any module, on any device.
        criterion: How to score; several criteria share the passes over the data that they have in common.
        batches: Batches on the model's device, (inputs, targets) for criteria that need logits; None for data-free
            criteria. Their size decides memory and speed, not the scores.
        loss_fn: `loss_fn(model, batch)`, the mean loss of a batch; None for data-free criteria.
        select: Which parameters are prunable; the default `Select()` when None.

    Returns:
        Scores by parameter name, higher = keep, float32 or float64; a list of them for a list of criteria. A criterion
        of several rounds gives the scores of its first.

    Raises:
        PruneError: If nothing is prunable, data that a criterion needs is missing, or a loss or score is not finite.

    >>> import torch, pl_prune as plp
    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    >>> batch = torch.ones(4, 2), torch.zeros(4, 1)
    >>> loss_fn = lambda m, b: nn.functional.mse_loss(m(b[0]), b[1])
    >>> scores = plp.score(model, plp.SNIP(), [batch], loss_fn)
    >>> {name: tuple(s.shape) for name, s in scores.items()}
    {'0.weight': (2, 2)}
    >>> first, second = plp.score(model, [plp.SNIP(), plp.FisherPruning()], [batch], loss_fn)
    """
    criteria = list(criterion) if isinstance(criterion, Sequence) else [criterion]
    for one in criteria:
        check_type("criterion", one, Criterion, "for example pl_prune.SNIP()")
    select = select or Select()
    with untouched(model):
        data = list(batches) if batches is not None else []
        check_data(criteria, data, loss_fn)
        loss = repeatable(model, loss_fn)
        run = (lambda: loss(model, _first_two(data[0]))) if loss is not None and data else None
        found = sync.agreed(lambda: list(select(model, run)))
        chosen = sync.of_first(found, run is not None)  # which layer is the last shows where there are data
        params = {name: p for name, p in model.named_parameters() if name in set(chosen)}
        for p in params.values():
            p.requires_grad_()  # `untouched` takes it back from those that are frozen
        probe = Probe(model, params, loss, data)
        scores = sync.agreed(lambda: [run_criterion(one, probe) for one in criteria])
    return scores if isinstance(criterion, Sequence) else scores[0]


def check_data(criteria: Iterable[Criterion | GroupCriterion], data: Sequence[Any], loss_fn: Loss | None) -> None:
    """Raise if data or a loss that a criterion needs is missing.

    Args:
        criteria: The criteria.
        data: The batches of this rank.
        loss_fn: The loss.

    Raises:
        PruneError: If a single process has no batch, or there is no loss, for a criterion that needs it.
    """
    for one in criteria:
        no_data = one.needs_data and not data and sync.rank_and_size()[1] == 1
        if no_data or (one.needs_loss and loss_fn is None):
            raise PruneError(
                f"Expected batches and a loss function, which {type(one).__name__} needs; "
                f"found {len(data)} batches and loss_fn={loss_fn!r}. Pass both."
            )


def repeatable(model: nn.Module, loss_fn: Loss | None) -> Loss | None:
    """Let every call of a loss start from the attributes that the model's modules have now.

    Args:
        model: The model, inside `untouched`.
        loss_fn: Its loss; None for none.

    Returns:
        The loss; None for none.
    """
    if loss_fn is None:
        return None
    again = attributes_of(model)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        again()
        return loss_fn(model, batch)

    return loss


def _first_two(batch: Any) -> Any:
    """Cut two samples out of a batch, or return it whole where not everything in it counts samples."""
    sizes = {leaf.shape[:1] if isinstance(leaf, Tensor) else None for leaf in tree_leaves(batch)}
    (size,) = sizes if len(sizes) == 1 else (None,)
    return cut(batch, size[0], 0, 2) if size else batch


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
