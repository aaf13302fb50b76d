"""`shrink`: a smaller network with the same outputs."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pl_prune.core.groups import ParameterGroups
from pl_prune.core.masks import MaskSet
from pl_prune.core.types import PruneError, check_type
from pl_prune.structure.constants import fold
from pl_prune.structure.cut import Cuts, apply, plan
from pl_prune.structure.manifest import note_cuts
from pl_prune.structure.probe import masked_copy
from pl_prune.structure.running import Inputs, as_call, disagreement, in_dtype
from pl_prune.structure.trace import trace_groups

_TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5}


def shrink(
    model: nn.Module, masks: Mapping[str, Tensor], example_inputs: Inputs, groups: ParameterGroups | None = None
) -> nn.Module:
    """Copy a network without the units that masks remove.

    A unit is gone where all its "out" slices are masked. Where only its weights are and a bias is left, it is a constant:
    if the layers behind it can take it up in their biases, it goes too. Other masked entries are zeros in the copy.
    The copy is compared with the masked network on the example, in evaluation mode, before it is returned: to 1e-12 of
    the largest output in float64, else to 1e-5. Training modes, requires_grad, memory format, devices, dtypes and hooks
    are kept; optimizers have to be made anew, because sliced parameters are new objects.

    Args:
        model: The network, dense or masked; it is left as it was.
        masks: Boolean masks by parameter name, `groups.expand(...)` say.
        example_inputs: As for `trace_groups`.
        groups: The groups that the masks were made of; traced anew if None. Groups that are not exact change outputs, and
            no comparison is made.

    Returns:
        The smaller network. `save_shrunk` writes it, `load_shrunk` reads it.

    Raises:
        PruneError: If the masks do not fit, no unit can leave, or the outputs differ.

    Source:
        Divergence from Torch-Pruning: nothing is pruned step by step; index maps of all tensors are collected first, and
        applied once.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> groups = trace_groups(net, torch.randn(1, 4))
    >>> masks = groups.expand({"0": torch.arange(8) < 5})
    >>> shrink(net, masks, torch.randn(1, 4), groups)[0]
    Linear(in_features=4, out_features=5, bias=True)
    """
    check_type("masks", masks, Mapping, "boolean masks by parameter name, as `groups.expand` returns them")
    masks = masks if isinstance(masks, MaskSet) else MaskSet(masks)
    masks.check_fits(dict(model.named_parameters()))
    args, kwargs = as_call(example_inputs)
    groups = trace_groups(model, example_inputs) if groups is None else groups
    check_groups(model, groups)
    keep = dict(groups.collapse(masks))
    masked = masked_copy(model, masks)
    biases = fold(masked, groups, keep, masks, args, kwargs)
    if empty := [root for root, kept in keep.items() if not bool(kept.any())]:
        raise PruneError(
            f"Expected at least one unit left in every group; found none in {empty[:3]}. Keep one, with "
            "min_per_layer=1 of the allocation."
        )
    if all(bool(kept.all()) for kept in keep.values()):
        raise PruneError(
            "Expected masks that remove whole units; found none that is zero altogether. Make masks by `groups.expand`: "
            "an unstructured mask leaves every unit alive."
        )
    cuts = plan(model, groups, keep)
    cuts.biases = list(biases)
    small = copy.deepcopy(masked)
    for parameter in small.parameters():
        parameter.grad = None
    apply(small, Cuts(biases=cuts.biases))
    for name, added in biases.items():
        with torch.no_grad():
            small.get_parameter(name).add_(added)
    apply(small, cuts)
    exact = all(groups[root].exact or bool(kept.all()) for root, kept in keep.items())
    if exact:
        _verify(masked, small, args, kwargs)
    note_cuts(small, model, cuts)
    return small


def check_groups(model: nn.Module, groups: ParameterGroups) -> None:
    """Raise unless groups are those of a model.

    Args:
        model: The network.
        groups: The groups.

    Raises:
        PruneError: If a parameter is missing or has another shape.
    """
    check_type("groups", groups, ParameterGroups, "what `trace_groups` returned")
    shapes = {n: tuple(t.shape) for n, t in [*model.named_buffers(), *model.named_parameters()]}
    odd = [f"{n} {s} (here {shapes.get(n, 'absent')})" for n, s in groups.shapes.items() if shapes.get(n) != s]
    if odd:
        raise PruneError(
            f"Expected groups of this {type(model).__name__}; found others: {', '.join(odd[:4])}. "
            "Trace this network; the names are those of the module that is passed."
        )


def _verify(masked: nn.Module, small: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
    dtypes = {p.dtype for p in small.parameters()}
    dtype = next(iter(dtypes)) if len(dtypes) == 1 else torch.float32
    if dtype not in _TOLERANCES:  # half precision is too coarse to tell a fault from rounding
        dtype, masked, small = torch.float32, copy.deepcopy(masked).float(), copy.deepcopy(small).float()
    args, kwargs = in_dtype(args, dtype), in_dtype(kwargs, dtype)
    error = disagreement(masked, small, args, kwargs, _TOLERANCES[dtype])
    if error > _TOLERANCES[dtype]:
        raise PruneError(
            f"Expected the smaller network to agree with the masked one to {_TOLERANCES[dtype]:.0e} of the largest output; found "
            f"{error:.1e}. Nothing was changed: report this, with `groups.report()`, or leave the layers out by `exclude`."
        )
