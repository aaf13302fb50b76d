"""`cric`: CRIC on a trained network, without training it."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import cycle
from typing import Any

import torch
from torch import nn

from pl_prune.core import sync
from pl_prune.core.groups import ParameterGroups
from pl_prune.core.loss import Loss, checked_loss
from pl_prune.core.masks import MaskSet
from pl_prune.core.sandbox import untouched
from pl_prune.core.types import PruneError, check_count, check_positive, check_type, plain
from pl_prune.optim.cric import CRIC, Walk
from pl_prune.optim.pace import Budget
from pl_prune.optim.saliency import Saliency
from pl_prune.optim.units import Units


def cric(
    model: nn.Module,
    groups: ParameterGroups,
    count: int,
    batches: Iterable[Any],
    loss_fn: Loss,
    config: CRIC | None = None,
    saliency: Saliency | None = None,
    lr: float = 1e-3,
    min_keep: int = 1,
) -> MaskSet:
    """Choose redundant units of a trained network by CRIC, without training it; the network stays as it is.

    The network runs in evaluation mode. Each sample takes the next batch, from the first again where they end. In a
    distributed job every rank passes its own batches.

    Args:
        model: The network that the groups were traced on.
        groups: What `trace_groups` returned.
        count: How many units are to go.
        batches: Batches on the model's device.
        loss_fn: `loss_fn(model, batch)`, the mean loss of a batch.
        config: The cycle's settings; `CRIC()` if None.
        saliency: How a sample is scored; `Saliency()` if None.
        lr: Step size of the gradient steps on trial.
        min_keep: Units that every group keeps.

    Returns:
        Which units stay, (size,) of bool by root: `groups.expand(...)` makes masks over parameters of it.

    Raises:
        PruneError: If so many units cannot go, there is no batch, or a loss or gradient is not finite.

    Source:
        HESSO, table 8 (zero-shot pruning).

    >>> import pl_prune as plp
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> groups = plp.trace_groups(model, torch.ones(1, 4))
    >>> batch = torch.randn(16, 4), torch.arange(16) % 2
    >>> keep = plp.cric(model, groups, 3, [batch], lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]))
    >>> int(keep["0"].sum())
    5
    """
    config, saliency = config or CRIC(), saliency or Saliency()
    check_type("config", config, CRIC, "for example pl_prune.CRIC(max_cycles=5)")
    check_type("saliency", saliency, Saliency, "for example pl_prune.Saliency('taylor1')")
    check_type("groups", groups, ParameterGroups, "what `trace_groups` returned")
    check_count("count", count)
    check_positive("lr", lr)
    total = sum(groups.sizes.values())
    if count >= total:
        raise PruneError(f"Expected fewer than the {total} units to go; found count={count}. Lower it.")
    data = list(batches)
    if not data:
        raise PruneError("Expected at least one batch to sample on; found none. Pass batches of training data.")
    live = {plain(name): p for name, p in model.named_parameters()}
    units = Units(groups, live)
    moving = {name: p for name, p in live.items() if p.requires_grad or name in units.names}
    budget = Budget(units, count / total, "groups", min_keep)
    with untouched(model):
        for p in moving.values():
            p.requires_grad_()
        walk = Walk(moving, units, saliency, budget, config)
        rates = dict.fromkeys(moving, lr)
        for batch in cycle(data):
            walk.swap()
            try:
                loss = sync.agreed(lambda batch=batch: checked_loss(loss_fn, model, batch))  # type: ignore[misc]
                found = torch.autograd.grad(loss, list(moving.values()), allow_unused=True)
            finally:
                walk.swap()
            grads = {
                name: torch.zeros_like(moving[name]) if g is None else g for name, g in zip(moving, found, strict=True)
            }
            sync.sum_(grads.values())
            grads = {name: g / sync.rank_and_size()[1] for name, g in grads.items()}
            if not walk.sample(grads, rates):
                raise PruneError(
                    "Expected finite weights and gradients; found others. Look at the weights and at the data."
                )
            if walk.cycle.finished:
                break
    gone = torch.zeros(units.size, dtype=torch.bool)
    gone[budget.lowest(walk.cycle.scores, gone, 0, 1)] = True
    return MaskSet(units.by_root(~gone))
