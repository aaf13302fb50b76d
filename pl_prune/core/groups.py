"""`ParameterGroups`: which slices of which parameters leave a network together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from pl_prune.core.group_table import group_table
from pl_prune.core.masks import MaskSet
from pl_prune.core.types import PruneError, check_choice, check_type
from pl_prune.core.units import Group as Group
from pl_prune.core.units import Member as Member

Reduction: TypeAlias = Literal["sum", "mean", "max", "l2"]
GroupScores: TypeAlias = dict[str, Tensor]
"""One score per unit by the root of its group: (size,), finite, higher = keep."""


class ParameterGroups(Sequence[Group]):
    """The groups of a network as plain data: names, dimensions and index maps, no module in sight.

    Args:
        groups: The prunable groups.
        shapes: Shapes of all parameters of the network, and of the buffers among the members.
        macs: Multiply-accumulates of every weight for one sample, by parameter name.
        rejected: Why the other layers cannot be pruned, by layer name.

    Raises:
        PruneError: If a root appears twice, or a member has no shape.

    >>> out, column = Member("a.weight", 0, torch.tensor([[0], [1]])), Member("b.weight", 1, torch.tensor([[0], [1]]), "in")
    >>> groups = ParameterGroups([Group("a", 2, (out, column))], {"a.weight": (2, 3), "b.weight": (4, 2)})
    >>> groups.expand({"a": torch.tensor([True, False])}).counts()
    {'a.weight': (3, 6)}
    >>> groups.cost({"a": torch.tensor([True, False])})
    (7, 0)
    """

    def __init__(
        self,
        groups: Iterable[Group],
        shapes: Mapping[str, Sequence[int]],
        macs: Mapping[str, int] | None = None,
        rejected: Mapping[str, str] | None = None,
    ) -> None:
        groups = list(groups)
        self._groups = {group.root: group for group in groups}
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self.macs = dict(macs or {})
        self.rejected = dict(rejected or {})
        if len(self._groups) < len(groups):
            raise PruneError(f"Expected groups of {len(groups)} roots; found {len(self._groups)}. Name each root once.")
        if missing := {m.name for group in groups for m in group.members} - self.shapes.keys():
            raise PruneError(f"Expected a shape for every member; found none for {sorted(missing)[:5]}. Add them.")
        self._stats = {m.name for group in groups for m in group.members if m.kind == "stat"}

    def __getitem__(self, key: Any) -> Any:
        return self._groups[key] if isinstance(key, str) else list(self._groups.values())[key]

    def __iter__(self) -> Iterator[Group]:
        return iter(self._groups.values())

    def __len__(self) -> int:
        return len(self._groups)

    def __repr__(self) -> str:
        return f"ParameterGroups({len(self)} groups, {sum(self.sizes.values())} units, {len(self.rejected)} rejected layers)"

    @property
    def sizes(self) -> dict[str, int]:
        """Number of units by root."""
        return {root: group.size for root, group in self._groups.items()}

    def subset(self, roots: Iterable[str]) -> ParameterGroups:
        """Return some of the groups.

        Args:
            roots: Which ones.

        Returns:
            Those groups; shapes of parameters, MACs and reasons stay.
        """
        groups = [self._groups[root] for root in roots]
        buffers = self._stats - {member.name for group in groups for member in group.members}
        shapes = {name: shape for name, shape in self.shapes.items() if name not in buffers}
        return ParameterGroups(groups, shapes, self.macs, self.rejected)

    def expand(self, keep: Mapping[str, Tensor], inputs: bool = False) -> MaskSet:
        """Turn kept units into masks over parameters.

        Args:
            keep: Which units stay, (size,) of bool by root (a `MaskSet` over group scores is one); a group that is not
                named stays whole.
            inputs: Whether the "in" slices of a removed unit are masked too; they change no output.

        Returns:
            Masks over every parameter with an "out" slice (and with an "in" slice, if asked for).
        """
        kinds = ("out", "in") if inputs else ("out",)
        gone = self._removed(keep, kinds)
        names = dict.fromkeys(m.name for group in self for m in group.members if m.kind in kinds)
        masks = {}
        for name in self.shapes:
            if name not in names:
                continue
            mask = torch.ones(self.shapes[name], dtype=torch.bool)
            for dim, positions in gone.get(name, {}).items():
                mask.index_fill_(dim, positions.nonzero()[:, 0], False)
            masks[name] = mask
        return MaskSet(masks)

    def collapse(self, masks: Mapping[str, Tensor]) -> MaskSet:
        """Say which units masks over parameters leave alive: the inverse of `expand`.

        Args:
            masks: Boolean masks by parameter name; a parameter without a mask is kept.

        Returns:
            (size,) of bool by root: False where all "out" slices of the unit are masked.
        """
        keep = {}
        for group in self:
            alive = torch.zeros(group.size, dtype=torch.bool)
            for member in (m for m in group.members if m.kind == "out"):
                if member.name not in masks:
                    alive[:] = True
                    break
                rows = _rows(masks[member.name].detach().cpu(), member.dim).any(1)
                alive |= rows[member.index].any(1)
            keep[group.root] = alive
        return MaskSet(keep)

    def reduce(self, tensors: Mapping[str, Tensor], how: Reduction = "sum") -> GroupScores:
        """Reduce elementwise scores to one number per unit, over the "out" slices of the unit.

        Args:
            tensors: Scores by parameter name; parameters without a score do not count.
            how: "sum", "mean" (over the scored entries of the unit), "max", or "l2" (root of the sum of squares).

        Returns:
            (size,) by root, on the device of the scores, in their precision.

        Raises:
            PruneError: If a group has no scored entry, or a tensor has another shape than its parameter.
        """
        check_choice("how", how, ("sum", "mean", "max", "l2"))
        check_type("tensors", tensors, Mapping, "scores by parameter name, as `score` returns them")
        rows: dict[tuple[str, int], Tensor] = {}
        units = {}
        for group in self:
            parts, entries = [], 0
            for member in (m for m in group.members if m.kind == "out" and m.name in tensors):
                score, shape = tensors[member.name], self.shapes[member.name]
                if tuple(score.shape) != shape:
                    raise PruneError(
                        f"Expected scores of shape {shape} for {member.name!r}; found {tuple(score.shape)}. "
                        "Score the network that the groups were traced on."
                    )
                key = (member.name, member.dim)
                if key not in rows:
                    slices = _rows(score, member.dim)
                    rows[key] = (
                        slices.amax(1) if how == "max" else slices.square().sum(1) if how == "l2" else slices.sum(1)
                    )
                parts.append(rows[key][member.index.to(score.device)])
                entries += member.index.shape[1] * prod(shape) // shape[member.dim]
            if not parts:
                raise PruneError(
                    f"Expected a score for a parameter of {group.root!r}; found none. Score at least one of "
                    f"{[m.name for m in group.members if m.kind == 'out'][:3]}."
                )
            joined = torch.cat(parts, 1)
            total = joined.amax(1) if how == "max" else joined.sum(1)
            units[group.root] = total.sqrt() if how == "l2" else total / entries if how == "mean" else total
        return units

    def positions(self, keep: Mapping[str, Tensor]) -> dict[str, dict[int, Tensor]]:
        """Say which positions of which tensors are left when units leave.

        Args:
            keep: Which units stay, (size,) of bool by root.

        Returns:
            Kept positions, ascending int64, by tensor name and dimension; tensors that stay whole are absent.
        """
        gone = self._removed(keep, ("out", "in", "stat"))
        return {name: {dim: (~removed).nonzero()[:, 0] for dim, removed in dims.items()} for name, dims in gone.items()}

    def cost(self, keep: Mapping[str, Tensor]) -> tuple[int, int]:
        """Count what is left when units are sliced off.

        Args:
            keep: Which units stay, (size,) of bool by root; `{}` counts the whole network.

        Returns:
            Parameters, and multiply-accumulates of the weights for one sample.
        """
        kept = self.positions(keep)
        params = macs = 0
        for name, shape in self.shapes.items():
            if name in self._stats:
                continue
            left = list(shape)
            for dim, positions in kept.get(name, {}).items():
                left[dim] = len(positions)
            params += prod(left)
            macs += self.macs.get(name, 0) * prod(left) // max(prod(shape), 1)
        return params, macs

    def _removed(self, keep: Mapping[str, Tensor], kinds: Sequence[str]) -> dict[str, dict[int, Tensor]]:
        """Mark removed positions by tensor and dimension; only what loses something is there."""
        check_type("keep", keep, Mapping, "one boolean tensor by root, as an allocation over group scores returns")
        if unknown := keep.keys() - self._groups.keys():
            raise PruneError(
                f"Expected roots of groups; found {sorted(unknown)[:5]}. Known roots: {list(self._groups)[:5]}, ..."
            )
        gone: dict[str, dict[int, Tensor]] = {}
        for root, kept in keep.items():
            group = self._groups[root]
            if not isinstance(kept, Tensor) or kept.dtype != torch.bool or tuple(kept.shape) != (group.size,):
                found = f"{kept.dtype} of {tuple(kept.shape)}" if isinstance(kept, Tensor) else type(kept).__name__
                raise PruneError(
                    f"Expected {group.size} booleans for {root!r}; found {found}. Say True for each unit kept."
                )
            removed = ~kept.detach().cpu()
            if not bool(removed.any()):
                continue
            for member in (m for m in group.members if m.kind in kinds):
                dims = gone.setdefault(member.name, {})
                if member.dim not in dims:
                    dims[member.dim] = torch.zeros(self.shapes[member.name][member.dim], dtype=torch.bool)
                dims[member.dim][member.index[removed].flatten()] = True
        return gone

    def report(self, keep: Mapping[str, Tensor] | None = None) -> str:
        """List prunable layers with their units, parameters and MACs, and the other layers with reasons.

        Args:
            keep: Which units stay, by root; all of them if None.

        Returns:
            Lines of text.
        """
        return group_table(self, keep)

    def state_dict(self) -> dict[str, Any]:
        """Return plain containers and tensors, which `torch.load(weights_only=True)` can read.

        Returns:
            What `from_state_dict` takes.
        """
        groups = [{**vars(group), "members": [vars(member).copy() for member in group.members]} for group in self]
        shapes = {name: list(shape) for name, shape in self.shapes.items()}
        return {"groups": groups, "shapes": shapes, "macs": self.macs, "rejected": self.rejected}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> ParameterGroups:
        """Rebuild groups from `state_dict`.

        Args:
            state: What `state_dict` returned.

        Returns:
            Equal groups.

        Raises:
            PruneError: If the state is of another form.
        """
        try:
            groups = [Group(**{**g, "members": tuple(Member(**m) for m in g["members"])}) for g in state["groups"]]
            return cls(groups, state["shapes"], state["macs"], state["rejected"])
        except (KeyError, TypeError) as error:
            raise PruneError(
                f"Expected what `ParameterGroups.state_dict` returned; found a damaged or foreign state ({error!r}). Trace again."
            ) from error


def _rows(tensor: Tensor, dim: int) -> Tensor:
    """Return a matrix whose rows are the slices of a dimension."""
    return tensor.movedim(dim, 0).reshape(tensor.shape[dim], -1)
