"""`Group` and `Member`: units of a layer, and the slices that leave with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor

Kind: TypeAlias = Literal["out", "in", "stat"]


@dataclass(frozen=True, eq=False)
class Member:
    """The slices of one tensor that belong to the units of a group.

    Args:
        name: Name of a parameter, or of a buffer for "stat".
        dim: The dimension that is sliced.
        index: Positions of that dimension by unit, (size, k) of int64: row u holds the k positions of unit u.
        kind: "out" is a slice whose zeroing, together with the unit's other "out" slices, makes the unit zero: rows of
            the weights that produce it, their biases, weights and biases of the norms behind them. "in" is a column
            of a weight that consumes the unit: never zeroed, it leaves when the network is shrunk. "stat" is a buffer
            that leaves with the unit (running statistics).
    """

    name: str
    dim: int
    index: Tensor
    kind: Kind = "out"


@dataclass(frozen=True, eq=False)
class Group:
    """Units of one layer that can leave one by one: channels, orbits of a grouped convolution, heads, hidden units.

    Args:
        root: Name of the layer that produces the units first; unique.
        size: Number of units.
        members: What leaves with them.
        exact: Whether a unit whose "out" slices are zero can be sliced off without any change to the outputs.
    """

    root: str
    size: int
    members: tuple[Member, ...]
    exact: bool = True
