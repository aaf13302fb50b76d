"""Constants that masked weights leave behind, moved into the biases of the layers that read them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from pl_prune.core.groups import Group, ParameterGroups
from pl_prune.core.sandbox import untouched
from pl_prune.structure.cut import owner
from pl_prune.structure.running import plain_attention


def fold(
    masked: nn.Module,
    groups: ParameterGroups,
    keep: dict[str, Tensor],
    masks: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> dict[str, Tensor]:
    """Let units leave whose weights are zero but that are constant, not zero.

    A unit is taken where every layer that reads it is a Linear, or a convolution that is not grouped and does not pad with
    zeros, and finds one value in all samples and places of the example.

    Args:
        masked: The network with masked entries zero.
        groups: Its groups.
        keep: Which units stay, by root; units that are taken are set to False.
        masks: Masks over parameters.
        args: Positional arguments of an example.
        kwargs: Keyword arguments of it.

    Returns:
        What to add to the biases of which layers, by the name of the bias.
    """
    candidates = {g.root: c for g in groups if bool((c := _constant(masked, g, masks) & keep[g.root]).any())}
    readers = {owner(m.name): None for root in candidates for m in groups[root].members if m.kind == "in"}
    modules = dict(masked.named_modules())
    if not candidates or not all(name in modules for name in readers):
        return {}
    seen = _inputs(masked, {n: modules[n] for n in readers if _folds(modules[n])}, args, kwargs)
    added: dict[str, Tensor] = {}
    for root, constant in candidates.items():
        columns = [m for m in groups[root].members if m.kind == "in"]
        if not columns or any(m.name != f"{owner(m.name)}.weight" or owner(m.name) not in seen for m in columns):
            continue
        for member in columns:
            low, high = seen[owner(member.name)]
            constant &= (low == high)[member.index].all(1)
        if not bool(constant.any()) or not bool((keep[root] & ~constant).any()):
            continue
        for member in columns:
            module, value = modules[owner(member.name)], seen[owner(member.name)][0]
            places = member.index[constant].flatten()
            weight = module.weight.detach()
            kernel = weight.movedim(member.dim, 0)[places].flatten(2).sum(2) if weight.ndim > 2 else weight[:, places].T
            name = f"{owner(member.name)}.bias"
            shift = (value[places].to(weight)[:, None] * kernel).sum(0)
            added[name] = added[name] + shift if name in added else shift
        keep[root] = keep[root] & ~constant
    return added


def _constant(masked: nn.Module, group: Group, masks: Mapping[str, Tensor]) -> Tensor:
    """Say which units have no weight left that multiplies an input."""
    parameters = dict(masked.named_parameters())
    gone = torch.ones(group.size, dtype=torch.bool)
    for member in group.members:
        if member.kind == "out" and parameters[member.name].ndim > 1:
            if member.name not in masks:
                return torch.zeros(group.size, dtype=torch.bool)
            rows = masks[member.name].cpu().movedim(member.dim, 0).flatten(1).any(1)
            gone &= ~rows[member.index].any(1)
    return gone


def _folds(module: nn.Module) -> bool:
    if isinstance(module, nn.Linear):
        return True
    return (
        isinstance(module, _ConvNd)
        and not isinstance(module, _ConvTransposeNd)
        and module.groups == 1
        and (module.padding_mode != "zeros" or module.padding == "valid" or not any(module.padding))
    )


def _inputs(
    model: nn.Module, readers: Mapping[str, nn.Module], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the least and the largest value of every input channel of some layers."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles = []
    for name, module in readers.items():

        def before(module: nn.Module, inputs: Any, name: str = name) -> None:
            x = inputs[0].detach()
            rows = (
                x.flatten(0, -2)
                if isinstance(module, nn.Linear)
                else x.movedim(1 - module.weight.ndim, -1).flatten(0, -2)
            )
            low, high = rows.amin(0).cpu(), rows.amax(0).cpu()
            if name in seen:
                low, high = torch.minimum(low, seen[name][0]), torch.maximum(high, seen[name][1])
            seen[name] = low, high

        handles.append(module.register_forward_pre_hook(before))
    try:
        with untouched(model), plain_attention(), torch.no_grad():
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return seen
