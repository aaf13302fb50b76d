"""`attach_hesso`: HESSO in a plain PyTorch training loop."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from pl_prune.core.group_budget import Target
from pl_prune.core.groups import ParameterGroups
from pl_prune.core.types import PruneError, check_type, plain
from pl_prune.optim.hesso import Hesso
from pl_prune.optim.pace import Budget, Pace
from pl_prune.optim.saliency import Saliency
from pl_prune.optim.units import Units, trainable


class AttachedHesso(Hesso):
    """What `attach_hesso` returns: `Hesso`, called by the hooks of its optimizer, until `detach`."""

    _handles: tuple[RemovableHandle, ...] = ()

    def attach(self) -> None:
        """Register the hooks."""
        (optimizer,) = self.optimizers
        self.enforcement.attach([optimizer])
        self._handles = (
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(lambda *_: self.after_step(optimizer)),
        )

    def detach(self) -> None:
        """Remove the hooks; weights stay as they are."""
        self.enforcement.detach()
        for handle in self._handles:
            handle.remove()

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(callable(value) and not isinstance(value, Optimizer) for value in (*args, *kwargs.values())):
            raise PruneError(
                "Expected gradients before `optimizer.step()`; found a closure, which makes them within. Call `loss.backward()` and then "
                "`step()` without it."
            )
        self.before_step(optimizer)


def budget_of(
    units: Units,
    target_group_sparsity: float | None,
    target_params: float | None,
    target_macs: float | None,
    min_keep: int,
) -> Budget:
    """Return the budget that one of three targets asks for.

    Args:
        units: The units.
        target_group_sparsity: Fraction of the units to remove.
        target_params: Fraction of the whole network's parameters to remove.
        target_macs: Fraction of its multiply-accumulates.
        min_keep: Units that every group keeps.

    Returns:
        The budget.
    """
    target, sparsity = the_target(target_group_sparsity, target_params, target_macs)
    return Budget(units, sparsity, target, min_keep)


def the_target(
    target_group_sparsity: float | None, target_params: float | None, target_macs: float | None
) -> tuple[Target, float]:
    """Return the one target that is given.

    Args:
        target_group_sparsity: Fraction of the units to remove.
        target_params: Fraction of the whole network's parameters to remove.
        target_macs: Fraction of its multiply-accumulates.

    Returns:
        What is counted, and the fraction to remove.

    Raises:
        PruneError: Unless exactly one is given.
    """
    asked: dict[Target, float | None] = {"groups": target_group_sparsity, "params": target_params, "macs": target_macs}
    given = [(target, sparsity) for target, sparsity in asked.items() if sparsity is not None]
    if len(given) != 1:
        raise PruneError(
            f"Expected one of target_group_sparsity, target_params and target_macs; found {len(given)} of them. "
            "Set the others to None (null in YAML)."
        )
    return given[0]


def attach_hesso(
    optimizer: Optimizer,
    model: nn.Module,
    groups: ParameterGroups,
    target_group_sparsity: float | None = None,
    *,
    start: int,
    duration: int,
    periods: int = 10,
    target_params: float | None = None,
    target_macs: float | None = None,
    saliency: Saliency | None = None,
    min_keep: int = 1,
) -> AttachedHesso:
    """Let HESSO prune a model while a plain PyTorch loop trains it.

    Clip gradients between `backward()` and `step()` as ever; saliencies are then those of clipped gradients. Save
    `hesso.state_dict()` beside the model's and the optimizer's.

    Args:
        optimizer: The optimizer that steps the model; any `torch.optim.Optimizer` that is called without closure.
        model: The model that the groups were traced on.
        groups: What `trace_groups` returned.
        target_group_sparsity: Fraction of the units to remove.
        start: Optimizer steps before the first units are chosen.
        duration: Optimizer steps until the last unit is zero.
        periods: In how many periods they go.
        target_params: Fraction of the whole network's parameters to remove, in place of a fraction of the units.
        target_macs: Fraction of its multiply-accumulates.
        saliency: How units are scored; `Saliency()` if None.
        min_keep: Units that every group keeps.

    Returns:
        HESSO at work: `keep()` and `masks()` say what it left, `detach()` ends it.

    Raises:
        PruneError: If the target cannot be met, no group can be pruned, or an argument is not of its kind.

    >>> import torch, pl_prune as plp
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    >>> groups = plp.trace_groups(model, torch.ones(1, 4))
    >>> optimizer = torch.optim.Adam(model.parameters())
    >>> hesso = plp.attach_hesso(optimizer, model, groups, 0.5, start=1, duration=4, periods=2)
    >>> for _ in range(6):
    ...     model(torch.ones(1, 4)).sum().backward(); optimizer.step(); optimizer.zero_grad()
    >>> int((model[0].weight == 0).all(1).sum())
    4
    """
    check_type(
        "optimizer", optimizer, Optimizer, "attach_hesso(optimizer, model, groups, 0.5, start=..., duration=...)"
    )
    check_type("model", model, nn.Module, "attach_hesso(optimizer, model, groups, 0.5, start=..., duration=...)")
    saliency = Saliency() if saliency is None else saliency
    check_type("saliency", saliency, Saliency, "for example pl_prune.Saliency('taylor1')")
    live = {plain(name): p for name, p in model.named_parameters()}
    units = Units(trainable(groups, live, [optimizer]), live)
    budget = budget_of(units, target_group_sparsity, target_params, target_macs, min_keep)
    hesso = AttachedHesso(live, [optimizer], budget, Pace.of(start, duration, periods), saliency)
    hesso.attach()
    return hesso
