"""The text of `ParameterGroups.report`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from pl_prune.core.groups import ParameterGroups


def group_table(groups: ParameterGroups, keep: Mapping[str, Tensor] | None = None) -> str:
    """List groups and rejected layers.

    Args:
        groups: The groups.
        keep: Which units stay, by root; all of them if None.

    Returns:
        Lines of text.
    """
    keep = keep or {}
    rows = [("layer", "units", "slices", "params/unit", "MACs", "")]
    for group in groups:
        slices = sum(member.index.shape[1] for member in group.members if member.kind == "out")
        entries = sum(
            member.index.shape[1] * _slice(groups.shapes[member.name], member.dim)
            for member in group.members
            if member.kind != "stat"
        )
        macs = sum(groups.macs.get(name, 0) for name in {m.name for m in group.members if m.kind == "out"})
        units = f"{int(keep[group.root].sum())}/{group.size}" if group.root in keep else str(group.size)
        rows.append((group.root, units, str(slices), str(entries), str(macs), "" if group.exact else "changes outputs"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    dense, left = groups.cost({}), groups.cost(keep)
    total = f"{sum(groups.sizes.values())} units in {len(groups)} groups; {left[0]} of {dense[0]} parameters, {left[1]} of {dense[1]} MACs"
    if groups.rejected:
        lines += ["", "layers that stay whole:"]
        lines += [f"  {layer}: {reason}" for layer, reason in groups.rejected.items()]
    return "\n".join([*lines, "", total])


def _slice(shape: tuple[int, ...], dim: int) -> int:
    size = 1
    for i, length in enumerate(shape):
        size *= 1 if i == dim else length
    return size
