"""The numeric probe: are units that are zero really gone?"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pl_prune.core.groups import ParameterGroups
from pl_prune.core.masks import MaskSet
from pl_prune.core.types import PruneError
from pl_prune.structure.cut import apply, plan, replace
from pl_prune.structure.running import disagreement, in_dtype, outputs, skeleton

_TOLERANCE = 1e-6


def keep_exact(
    model: nn.Module, groups: ParameterGroups, args: tuple[Any, ...], kwargs: dict[str, Any], deadline: float
) -> ParameterGroups:
    """Reject the groups whose removal changes outputs although their units are zero, or breaks the network.

    All groups are tested together; only if that fails, halves of them are. Groups that are not exact have to run.

    Args:
        model: The network.
        groups: Its groups.
        args: Positional arguments of an example.
        kwargs: Keyword arguments of it.
        deadline: When to give up, by `time.monotonic`.

    Returns:
        The groups that pass; the others are in `rejected`.

    Raises:
        PruneError: If the deadline passes.
    """
    random = randomised(model)
    inputs = in_dtype(args, torch.float64), in_dtype(kwargs, torch.float64)
    rejected: dict[str, str] = {}
    keep = {}
    for i, group in enumerate(groups):
        generator = torch.Generator().manual_seed(i)
        order = torch.randperm(group.size, generator=generator)
        keep[group.root] = torch.ones(group.size, dtype=torch.bool)
        keep[group.root][order[: max(1, round(0.3 * group.size))]] = False

    def fault(roots: list[str]) -> str | None:
        if time.monotonic() > deadline:
            raise PruneError(
                f"Expected the numeric check of {len(groups)} groups to stay within max_seconds; found more needed, with faults in "
                f"{list(rejected)[:3]}. Name layers like these in `exclude`, or raise the limit."
            )
        return find_fault(random, groups, {root: keep[root] for root in roots}, *inputs)

    def search(roots: list[str], why: str) -> None:
        if len(roots) == 1:
            rejected[roots[0]] = why
            return
        for half in (roots[: len(roots) // 2], roots[len(roots) // 2 :]):
            if (found := fault(half)) is not None:
                search(half, found)

    for exact in (True, False):  # what is not exact would hide the faults of what is
        good = [group.root for group in groups if group.exact is exact]
        while good and (why := fault(good)) is not None:
            before = len(rejected)
            search(good, why)
            if len(rejected) == before:  # only together do they fail
                rejected[good[-1]] = why
            good = [root for root in good if root not in rejected]
    left = groups.subset([root for root in keep if root not in rejected])
    return ParameterGroups(left, left.shapes, groups.macs, {**groups.rejected, **rejected})


def find_fault(
    model: nn.Module, groups: ParameterGroups, keep: Mapping[str, Tensor], args: Any, kwargs: Any
) -> str | None:
    """Compare a network whose units are zero with one from which they are sliced.

    Args:
        model: The network.
        groups: Its groups.
        keep: Which units stay, by root.
        args: Positional arguments.
        kwargs: Keyword arguments.

    Returns:
        What is wrong, None if nothing is.
    """
    small = skeleton(model)
    try:
        apply(small, plan(small, groups, keep))
        if not all(groups[root].exact for root in keep):
            after, before = outputs(small, args, kwargs), outputs(model, args, kwargs)
            same = [t.shape for t in after] == [t.shape for t in before]
            return None if same else "the outputs have other shapes without its units"
        found = disagreement(masked_copy(model, groups.expand(keep)), small, args, kwargs, _TOLERANCE)
    except Exception as error:
        return f"the network does not run without its units ({type(error).__name__}: {str(error)[:120]})"
    return None if found <= _TOLERANCE else f"zeroed units still change the outputs (by {found:.1e} of the largest)"


def masked_copy(model: nn.Module, masks: MaskSet) -> nn.Module:
    """Zero what masks prune, in a copy that shares all other tensors.

    Args:
        model: The network.
        masks: Masks over its parameters.

    Returns:
        The masked network.
    """
    parameters = dict(model.named_parameters())
    masks.check_fits(parameters)
    masked, news = skeleton(model), {}
    for name, mask in masks.items():
        if not bool(mask.all()):
            old = parameters[name]
            new = old.detach().clone().masked_fill_(~mask.to(old.device), 0)  # keeps the memory format
            news[name] = nn.Parameter(new, requires_grad=old.requires_grad)
    replace(masked, news)
    return masked


def randomised(model: nn.Module) -> nn.Module:
    """Copy a network in double precision, with noise in whatever hides a fault by being zero or constant.

    Args:
        model: The network.

    Returns:
        The copy.
    """
    noisy = copy.deepcopy(model).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*noisy.named_parameters(), *noisy.named_buffers()]:
            if not tensor.is_floating_point() or not tensor.numel():
                continue
            scale = name.endswith("running_var") or (tensor.ndim == 1 and name.endswith("weight"))
            flat = isinstance(tensor, nn.Parameter) and (
                tensor.ndim == 1 or bool((tensor == tensor.flatten()[0]).all())
            )
            if scale or flat or name.endswith("running_mean"):
                drawn = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
                tensor.copy_(drawn + 0.5 if scale else drawn - 0.5)
    return noisy
