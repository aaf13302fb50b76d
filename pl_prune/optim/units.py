"""`Units` and `Rows`: the slices of units on live tensors, summed, scaled and zeroed without a loop over units."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pl_prune.core.groups import ParameterGroups
from pl_prune.core.types import PruneError, check_type, plain, score_dtype


@dataclass(frozen=True, eq=False)
class _Slices:
    """One dimension of one parameter: the unit of every position, or the number of units where it has none."""

    name: str
    dim: int
    ids: Tensor
    device_ids: Tensor


class Units:
    """All units of a network, numbered group by group, over the "out" slices of its parameters.

    Args:
        groups: The groups.
        params: The parameters of the network by name, on one device.

    Attributes:
        size: Number of units.
        layer: The number of the group of every unit, (size,) of int64.
        entries: Number of entries of every unit, (size,) of float64.

    Raises:
        PruneError: If a parameter is missing or of another shape, or produces units along two dimensions.
    """

    def __init__(self, groups: ParameterGroups, params: Mapping[str, Tensor]) -> None:
        self.groups = groups
        sizes = list(groups.sizes.values())
        self.size = sum(sizes)
        self.layer = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes, dtype=torch.int64))
        ids: dict[tuple[str, int], Tensor] = {}
        first = 0
        for group in groups:
            number = torch.arange(first, first + group.size)[:, None]
            first += group.size
            for member in (m for m in group.members if m.kind == "out"):
                name = plain(member.name)
                if name not in params or tuple(params[name].shape) != groups.shapes[member.name]:
                    found = tuple(params[name].shape) if name in params else "no such parameter"
                    raise PruneError(
                        f"Expected {name!r} of shape {groups.shapes[member.name]}, as traced; found {found}. Trace this network."
                    )
                key = name, member.dim
                if key not in ids:
                    ids[key] = torch.full((params[name].shape[member.dim],), self.size)
                ids[key][member.index] = number.expand_as(member.index)
        names = [name for name, _ in ids]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise PruneError(
                f"Expected every parameter to produce units along one dimension; found two of {twice[0]!r}. "
                "Leave one of its layers out by `exclude`."
            )
        self._slices = [_Slices(name, dim, i, i.to(params[name].device)) for (name, dim), i in ids.items()]
        self.names = names
        self.device = params[names[0]].device if names else torch.device("cpu")
        self.dtype = score_dtype(params[names[0]]) if names else torch.float32
        self.entries = torch.zeros(self.size + 1, dtype=torch.float64)
        for part in self._slices:
            shape = params[part.name].shape
            each = torch.full((len(part.ids),), shape.numel() / shape[part.dim], dtype=torch.float64)
            self.entries.index_add_(0, part.ids, each)
        self.entries = self.entries[:-1]

    def sums(self, left: Mapping[str, Tensor], right: Mapping[str, Tensor], names: Container[str] = ()) -> Tensor:
        """Sum products of entries over the slices of every unit.

        Args:
            left: One factor by parameter name; a parameter that is missing in a factor counts as zero.
            right: The other.
            names: Which parameters count; all of them if empty.

        Returns:
            (size,), in float32 or better, on the parameters' device.
        """
        total = torch.zeros(self.size + 1, dtype=self.dtype, device=self.device)
        for part in self._slices:
            if (not names or part.name in names) and part.name in left and part.name in right:
                a, b = _rows(left[part.name], part.dim), _rows(right[part.name], part.dim)
                total.index_add_(0, part.device_ids, (a.to(self.dtype) * b.to(self.dtype)).sum(1))
        return total[:-1]

    def by_root(self, values: Tensor) -> dict[str, Tensor]:
        """Part one value per unit into groups.

        Args:
            values: (size,).

        Returns:
            (group size,) by root.
        """
        return dict(zip(self.groups.sizes, torch.split(values, list(self.groups.sizes.values())), strict=True))

    def owners(self, families: Iterable[Container[str]]) -> list[int | None]:
        """Say which family of parameters each group belongs to.

        Args:
            families: Names of parameters.

        Returns:
            The number of the family by group; None where a parameter of the group is in no family.

        Raises:
            PruneError: If a group is split over two.
        """
        families = list(families)
        found: list[int | None] = []
        for group in self.groups:
            of = {}
            for member in (m for m in group.members if m.kind == "out"):
                name = plain(member.name)
                of[name] = next((i for i, family in enumerate(families) if name in family), None)
            if len(set(of.values()) - {None}) > 1:
                some = {number: name for name, number in reversed(of.items()) if number is not None}
                raise PruneError(
                    f"Expected one optimizer for all parameters of a unit of {group.root!r}; found it split over {len(some)}: "
                    f"{', '.join(sorted(some.values()))}. Give them to one optimizer, or leave the layer out by `exclude`."
                )
            found.append(None if None in of.values() else next(iter(of.values())))
        return found


class Rows:
    """The slices of some units, found once: what is done to them touches no other row.

    Args:
        units: All units.
        chosen: The numbers of some, (k,) of int64.
    """

    def __init__(self, units: Units, chosen: Tensor) -> None:
        local = torch.full((units.size + 1,), -1)
        local[chosen] = torch.arange(len(chosen))
        self._count, self._like = len(chosen), units
        self._parts: list[tuple[str, int, Tensor, Tensor]] = []
        for part in units._slices:
            unit = local[part.ids]
            if len(at := (unit >= 0).nonzero()[:, 0]):
                device = part.device_ids.device
                self._parts.append((part.name, part.dim, at.to(device), unit[at].to(device)))

    @torch.no_grad()
    def scale_to_(self, tensors: Mapping[str, Tensor], norms: Tensor) -> None:
        """Give every unit a norm; one that is zero stays zero.

        Args:
            tensors: Tensors by parameter name, changed in place.
            norms: (k,), on the tensors' device.
        """
        squares = torch.zeros(self._count, dtype=self._like.dtype, device=self._like.device)
        taken = []
        for name, dim, at, unit in self._parts:
            rows = tensors[name].index_select(dim, at)
            squares.index_add_(0, unit, _rows(rows, dim).to(squares.dtype).square().sum(1))
            taken.append(rows)
        factors = torch.where(squares > 0, norms.to(squares.dtype) / squares.sqrt(), 0)
        for (name, dim, at, unit), rows in zip(self._parts, taken, strict=True):
            shape = [-1 if d == dim else 1 for d in range(rows.ndim)]
            scaled = rows * factors[unit].view(shape)
            tensors[name].index_copy_(dim, at, scaled.to(rows.dtype))

    @torch.no_grad()
    def fill_(self, tensors: Mapping[str, Tensor]) -> None:
        """Zero every unit, whatever it holds.

        Args:
            tensors: Tensors by parameter name, changed in place.
        """
        for name, dim, at, _ in self._parts:
            tensors[name].index_fill_(dim, at, 0)


def stepped(params: Mapping[str, nn.Parameter], optimizers: Iterable[Optimizer]) -> list[set[str]]:
    """Name the parameters that each optimizer steps.

    Args:
        params: Parameters by name.
        optimizers: The optimizers.

    Returns:
        Names by optimizer; frozen parameters are in none.
    """
    held = [{id(p) for group in o.param_groups for p in group["params"]} for o in optimizers]
    return [{n for n, p in params.items() if id(p) in ids and p.requires_grad} for ids in held]


def trainable(
    groups: ParameterGroups, params: Mapping[str, nn.Parameter], optimizers: Iterable[Optimizer]
) -> ParameterGroups:
    """Leave out the groups that no optimizer brings to zero.

    Args:
        groups: All groups.
        params: Parameters by name.
        optimizers: The optimizers.

    Returns:
        The groups whose parameters are all trained; the others are in `rejected`.

    Raises:
        PruneError: If no group is left.
    """
    check_type("groups", groups, ParameterGroups, "what `trace_groups` returned")
    families = stepped(params, optimizers)
    owners = dict(zip(groups.sizes, Units(groups, params).owners(families), strict=True))
    why = "a parameter of it is frozen, or in no optimizer"
    found = groups.subset([root for root, owner in owners.items() if owner is not None and groups[root].exact])
    rejected = {root: why for root, owner in owners.items() if owner is None}
    if not len(found):
        reasons = {**groups.rejected, **rejected}
        raise PruneError(
            f"Expected at least one group of units to prune; found none. Rejected: {dict(list(reasons.items())[:5])}. "
            "Look at `include`, `exclude`, and what is frozen."
        )
    return ParameterGroups(found, found.shapes, groups.macs, {**groups.rejected, **rejected})


def _rows(tensor: Tensor, dim: int) -> Tensor:
    return tensor.detach().movedim(dim, 0).reshape(tensor.shape[dim], -1)
