"""What matrix products do to labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pl_prune.structure.labels import FIXED, Reference, along, compact, line

if TYPE_CHECKING:
    from pl_prune.structure.rules import Rules

Traced = Tensor | Reference


def weighted(rules: Rules, inner: Tensor, reference: Reference, along_in: int, along_out: int) -> Tensor | None:
    """Let a weight consume `inner` (.., k) and return the labels of its rows."""
    columns, rows = line(reference, along_in), line(reference, along_out)
    if columns is None or rows is None:
        return None
    consumed = rules.ledger.axis(reference.name, columns[0], "in")[columns[1]]
    rules.ledger.union(consumed, inner)
    return rules.ledger.axis(reference.name, rows[0], "producer")[rows[1]]


def product(rules: Rules, base: str, args: Sequence[Any], out: Tensor, of: Callable[[Tensor], Traced]) -> Tensor:
    """Multiply matrices: by a weight, or of two activations (attention)."""
    bias, left, right = ([of(args[0])] if base in ("addmm", "baddbmm", "addmv") else [None]) + [
        of(a) for a in args[-2:] if isinstance(a, Tensor)
    ]
    if base in ("mv", "addmv"):
        return rules.opaque([left, right], "its values go through the operator mv", out)
    labels: Tensor | None
    if isinstance(right, Reference) and not isinstance(left, Reference):
        labels = weighted(rules, left, right, right.tags[0].ndim - 2, right.tags[0].ndim - 1)
        labels = None if labels is None else labels.expand(out.shape)
    elif isinstance(left, Reference) and not isinstance(right, Reference):
        labels = weighted(rules, right.transpose(-1, -2), left, left.tags[0].ndim - 1, left.tags[0].ndim - 2)
        labels = None if labels is None else labels[:, None].expand(out.shape)
    elif isinstance(left, Reference) or isinstance(right, Reference):
        labels = None
    else:
        labels = contraction(rules, left, right, out)
    if labels is None:
        return rules.opaque([left, right], "its weight is computed from parameters", out)
    if bias is not None:
        added = rules.ledger.labels(bias)
        lead = out.ndim - added.ndim
        wide = {d for d in range(out.ndim) if d < lead or added.shape[d - lead] == 1}
        added = added.view([1] * lead + list(added.shape))
        labels = rules.combine(compact(labels), set(), compact(added), wide)[0].expand(out.shape)
    return labels


def contraction(rules: Rules, left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """Multiply activations: units on the contracted dimension leave by heads where the batch tells heads apart."""
    left, right = (
        compact(left if left.ndim == 3 else left[None]),
        compact(right if right.ndim == 3 else right[None]),
    )
    right = right.transpose(1, 2)  # both (batch, free, contracted)
    contracted = bool(along(left, [2])[1].any()) or bool(along(right, [2])[1].any())
    if not contracted:
        a, b = along(left, [2])[0], along(right, [2])[0].transpose(1, 2)
        if bool(along(a, [0])[1].any()) or bool(along(b, [0])[1].any()):
            if bool(along(a, [1])[1].any()) and bool(along(b, [2])[1].any()):
                rules.ledger.pin(a, "it is multiplied with other units")
                rules.ledger.pin(b, "it is multiplied with other units")
            rules.ledger.union(a, b)
            return (
                torch
                .maximum(*torch.broadcast_tensors(a, b))
                .expand(torch.broadcast_shapes(out.shape, (1,) * 3))
                .reshape(out.shape)
            )
        return rules.combine(a, {2}, b, {1})[0].expand((1, *out.shape)[-3:]).reshape(out.shape)
    rules.ledger.union(left, left[:, :1])
    rules.ledger.union(right, right[:, :1])
    first, second = torch.broadcast_tensors(along(left, [1])[0], along(right, [1])[0])
    rules.ledger.union(left[:, :1], right[:, :1])
    for one, other in ((first, second), (second, first)):
        if bool(along(one, [2])[1].any()):
            rules.ledger.pin(torch.where(other == FIXED, one, FIXED), "it is multiplied with a tensor of a fixed size")
    joined = torch.maximum(first, second)
    if not bool(along(joined, [0])[1].any()):
        return rules.constant(out.shape)
    rules.ledger.union(joined, joined[..., :1])
    return joined[..., :1].expand((1, *out.shape)[-3:]).reshape(out.shape)
