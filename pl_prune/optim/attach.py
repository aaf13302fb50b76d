"""Enforcement: what keeps pruned entries at zero while an optimizer runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.utils.hooks import RemovableHandle

from pl_prune.core.masks import MaskSet
from pl_prune.core.types import PruneError, check_type


class Enforcement:
    """Keep masks in force on live parameters.

    Masked gradients alone do not hold zeros under momentum or weight decay, so weights are zeroed again after every real
    optimizer step; the step hook is not called when a GradScaler skips a step.

    Args:
        params: The parameters, by the masks' names; they and the gradients that they hold are zeroed at once.
        masks: What to keep.
    """

    def __init__(self, params: Mapping[str, nn.Parameter], masks: MaskSet) -> None:
        self.params = params
        self._handles: list[RemovableHandle] = []
        self.masks = masks.to(next(iter(params.values())).device)
        self.zero_weights()
        self.zero_grads()

    def attach(self, optimizers: Iterable[Optimizer], gradient_hooks: bool = True) -> None:
        """Zero the optimizers' state of pruned entries (momenta) now, and the weights after each step.

        Args:
            optimizers: The optimizers that step the parameters.
            gradient_hooks: Zero gradients too, as soon as they are accumulated, so that clipping sees them masked.

        Raises:
            PruneError: If the optimizers step none of the parameters.
        """
        optimizers = list(optimizers)
        check_steps(optimizers, self.params)
        for optimizer in optimizers:
            self._zero_state(optimizer)
            self._handles.append(optimizer.register_step_post_hook(self._after_step))
        if gradient_hooks:
            for name, param in self.params.items():
                frozen = not param.requires_grad  # it may thaw later
                param.requires_grad_(True)
                handle = param.register_post_accumulate_grad_hook(self._gradient_hook(name))  # type: ignore[no-untyped-call]
                param.requires_grad_(not frozen)
                self._handles.append(handle)

    def change(self, masks: MaskSet, optimizers: Iterable[Optimizer]) -> None:
        """Keep other masks in force from now on, with the hooks that are there; may be called from one of them.

        Args:
            masks: What to keep, of the same parameters or some of them.
            optimizers: The optimizers, whose state of pruned entries is zeroed.
        """
        self.masks = masks.to(next(iter(self.params.values())).device)
        self.zero_weights()
        self.zero_grads()
        for optimizer in optimizers:
            self._zero_state(optimizer)

    def zero_weights(self) -> None:
        """Zero the pruned weights."""
        self.masks.apply_(self.params)

    def zero_grads(self) -> None:
        """Zero the gradients of pruned weights."""
        self.masks.mask_grads_(self.params)

    @torch.no_grad()
    def _zero_state(self, optimizer: Optimizer) -> None:
        if isinstance(optimizer, LBFGS):  # its curvature is that of another function, over all entries in one vector
            optimizer.state.clear()
        for name in self.masks:
            one, param = self.masks.subset([name]), self.params[name]
            for value in optimizer.state.get(param, {}).values():
                if isinstance(value, Tensor) and value.shape == param.shape and value.device == param.device:
                    one.apply_({name: value})

    def detach(self) -> None:
        """Remove every hook; may be called twice."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _after_step(self, *_: Any) -> None:
        self.zero_weights()

    def _gradient_hook(self, name: str) -> Any:
        def hook(param: nn.Parameter) -> None:
            if name in self.masks:
                self.masks.subset([name]).mask_grads_({name: param})

        return hook


def check_steps(optimizers: Iterable[Optimizer], params: Mapping[str, nn.Parameter]) -> None:
    """Raise if there are optimizers, and none of them steps any of the parameters.

    Args:
        optimizers: The optimizers.
        params: The pruned parameters.

    Raises:
        PruneError: If the optimizers were built for other parameters.
    """
    optimizers = list(optimizers)
    stepped = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    learning = {id(p) for p in params.values() if p.requires_grad}  # a frozen one may get its optimizer later
    if optimizers and learning and not stepped & learning:
        raise PruneError(
            "Expected an optimizer that steps the pruned parameters; found none of them in it. "
            "Build it from this model's parameters."
        )


def attach_masks(optimizer: Optimizer, model: nn.Module, masks: MaskSet) -> Enforcement:
    """Apply masks to a model and keep its zeros through a plain PyTorch training loop.

    Args:
        optimizer: The optimizer that steps the model; any `torch.optim.Optimizer`.
        model: The model that the masks were made for.
        masks: What to keep.

    Returns:
        The enforcement; `detach()` ends it and leaves the weights as they are.

    Raises:
        PruneError: If there is no mask, the masks do not fit the model, or the optimizer steps none of the masked
            parameters.

    >>> import torch, pl_prune as plp
    >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    >>> masks = plp.Global()(plp.score(model, plp.Magnitude()), 0.5)
    >>> optimizer = torch.optim.AdamW(model.parameters())
    >>> enforcement = plp.attach_masks(optimizer, model, masks)
    >>> model(torch.ones(1, 4)).sum().backward(); _ = optimizer.step()
    >>> int((model[0].weight == 0).sum())
    8
    """
    check_type("optimizer", optimizer, Optimizer, "attach_masks(optimizer, model, masks)")
    check_type("model", model, nn.Module, "attach_masks(optimizer, model, masks)")
    live = dict(model.named_parameters())
    if not masks:
        raise PruneError(
            "Expected at least one mask to enforce; found none. Make masks with `score` and an allocation first."
        )
    masks.check_fits(live)
    check_steps([optimizer], {name: live[name] for name in masks})
    enforcement = Enforcement({name: live[name] for name in masks}, masks)
    enforcement.attach([optimizer])
    return enforcement
