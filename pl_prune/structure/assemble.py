"""From labels to groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from pl_prune.core.groups import Group, Member, ParameterGroups
from pl_prune.core.types import PruneError
from pl_prune.core.units import Kind
from pl_prune.structure.labels import Ledger

_ALONE = "it has one unit, which cannot leave"
_OUTPUT = "it reaches the output of the model"


def assemble(
    model: nn.Module,
    ledger: Ledger,
    macs: Mapping[str, int],
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
    exact: bool,
) -> ParameterGroups:
    """Collect the units of each layer, and the reasons of those that stay.

    Args:
        model: The traced module.
        ledger: Its labels.
        macs: Multiply-accumulates by parameter name.
        include: Patterns of producing layers.
        exclude: Patterns of what stays whole.
        exact: Whether units that change outputs stay.

    Returns:
        Groups that are not checked by numbers yet.

    Raises:
        PruneError: If `include` asks for an output layer.
    """
    parameters = dict(model.named_parameters())
    order = {name: i for i, name in enumerate(ledger.tensors)}
    stay: dict[int, str] = {}
    inexact: dict[int, str] = {}
    for labels, reason, soft in ledger.pins:
        for root in ledger.roots[labels].tolist():
            (inexact if soft else stay).setdefault(root, reason)
    axes: dict[tuple[str, int], tuple[str, Tensor]] = {
        key: (_kind(ledger, key), ledger.roots[first : first + ledger.tensors[key[0]].shape[key[1]]])
        for key, first in ledger.axes.items()
    }
    for name, first in ledger.elements.items():
        _add_elements(ledger, name, first, axes, stay)
    if exact:
        stay = {**inexact, **stay}

    units: dict[int, dict[tuple[str, int], list[int]]] = {}
    for key in sorted(axes, key=lambda k: (order[k[0]], k[1])):
        for position, root in enumerate(axes[key][1].tolist()):
            units.setdefault(root, {}).setdefault(key, []).append(position)
    sorted_units: dict[tuple[Any, ...], list[dict[tuple[str, int], list[int]]]] = {}
    reasons: dict[str, str] = {}
    for root, slices in units.items():
        produced = [key for key in slices if axes[key][0] == "producer"]
        if not produced:
            continue
        why = stay.get(root) or _refused(slices, axes, parameters, produced, include, exclude)
        if why is not None:
            for key in produced:
                reasons.setdefault(layer_of(key[0]), why)
            continue
        signature = tuple((key, len(places)) for key, places in slices.items())
        sorted_units.setdefault((produced[0], signature, root in inexact), []).append(slices)

    groups: list[Group] = []
    taken: dict[str, int] = {}
    for (first, signature, soft), same in sorted_units.items():
        layer = layer_of(first[0])
        taken[layer] = taken.get(layer, 0) + 1
        root = layer if taken[layer] == 1 else f"{layer}#{taken[layer] - 1}"
        members = tuple(
            Member(key[0], key[1], torch.tensor([slices[key] for slices in same]), _public(ledger, key, axes[key][0]))
            for key, _ in signature
        )
        groups.append(Group(root, len(same), members, exact=not soft))
    whole = [g for g in groups if g.size > 1]
    reasons.update({g.root: _ALONE for g in groups if g not in whole})
    pruned = {layer_of(m.name) for g in whole for m in g.members if m.kind == "out"}
    idle = {layer_of(name): "it did not run on the example inputs" for name in ledger.idle()}
    rejected = {layer: why for layer, why in {**idle, **reasons}.items() if layer not in pruned}
    names = [name for (name, _), (kind, _) in axes.items() if kind == "producer"]
    for pattern in include or ():
        layers = {layer_of(n) for n in names if fnmatchcase(n, pattern) or fnmatchcase(layer_of(n), pattern)}
        if layers and all(rejected.get(layer) == _OUTPUT for layer in layers):
            raise PruneError(
                f"Expected layers whose units can leave in `include`; found an output layer and no other for {pattern!r} "
                f"({', '.join(sorted(layers)[:4])}). Its units are what the model returns: leave it out."
            )
    shapes = {
        n: tuple(t.shape)
        for n, t in ledger.tensors.items()
        if n in parameters or any(m.name == n for g in whole for m in g.members)
    }
    return ParameterGroups(whole, shapes, macs, rejected)


def layer_of(name: str) -> str:
    """Return the name of the module that holds a parameter.

    Args:
        name: Of the parameter.

    Returns:
        The module's name; the parameter's own where the model itself holds it.
    """
    return name.rpartition(".")[0] or name


def _kind(ledger: Ledger, key: tuple[str, int]) -> str:
    return ledger.uses.get(key, "out")


def _public(ledger: Ledger, key: tuple[str, int], kind: str) -> Kind:
    if not isinstance(ledger.tensors[key[0]], nn.Parameter):
        return "stat"
    return "in" if kind == "in" else "out"


def _add_elements(
    ledger: Ledger, name: str, first: int, axes: dict[tuple[str, int], tuple[str, Tensor]], stay: dict[int, str]
) -> None:
    """Find the dimension along which the elements of a bare parameter belong to units."""
    shape = ledger.tensors[name].shape
    roots = ledger.roots[first : first + shape.numel()].view(shape)
    for dim in range(len(shape)):
        rows = roots.movedim(dim, 0).flatten(1)
        shared = bool((rows == rows[:, :1]).all())
        if shared and (name, dim) not in axes and shape[dim] > 1:
            axes[name, dim] = ("out", rows[:, 0])
            return
    others = torch.cat([ledger.roots[:first], ledger.roots[first + shape.numel() :]])
    for root in roots[torch.isin(roots, others)].unique().tolist():
        stay.setdefault(root, f"{name} is shared by its units in a way that cannot be sliced")


def _refused(
    slices: Mapping[tuple[str, int], list[int]],
    axes: Mapping[tuple[str, int], tuple[str, Tensor]],
    parameters: Mapping[str, nn.Parameter],
    produced: Sequence[tuple[str, int]],
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
) -> str | None:
    """Return why a unit that could leave stays."""
    frozen = [k[0] for k in slices if axes[k][0] != "in" and k[0] in parameters and not parameters[k[0]].requires_grad]
    if frozen:
        return f"{frozen[0]} is frozen (requires_grad=False)"
    if exclude:
        for name, _ in slices:
            if any(fnmatchcase(name, p) or fnmatchcase(layer_of(name), p) for p in exclude):
                return f"{layer_of(name)} is excluded"
    if include and not any(fnmatchcase(n, p) or fnmatchcase(layer_of(n), p) for n, _ in produced for p in include):
        return "it is not included"
    return None
