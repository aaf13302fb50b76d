"""What convolutions, norms and embeddings do to labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pl_prune.structure.labels import FIXED, Reference, along, compact, line

if TYPE_CHECKING:
    from pl_prune.structure.rules import Rules

Of = Callable[[Tensor], "Tensor | Reference"]


def convolution(rules: Rules, args: Sequence[Any], out: Tensor, of: Of) -> Any:
    """Consume input channels and produce output channels; grouped convolutions lose the same channels of every group."""
    ledger, weight = rules.ledger, of(args[1])
    source = ledger.labels(of(args[0]))
    transposed, count = bool(args[6]), int(args[8])
    lines = [line(weight, d) for d in (0, 1)] if isinstance(weight, Reference) else [None]
    if None in lines:
        return rules.opaque([source, weight], "its weight is computed from parameters", out)
    (dim0, rows), (dim1, columns) = lines  # type: ignore[misc]
    name, channels = weight.name, compact(source).movedim(1, 0).flatten(1)  # type: ignore[union-attr]
    channels = channels.expand(source.shape[1], -1)
    depthwise = count > 1 and source.shape[1] == count
    if depthwise and (transposed and len(columns) > 1):
        return rules.opaque([source, weight], "it is a depthwise transposed convolution with a multiplier", out)
    first = ledger.axis(name, dim0, "out" if depthwise else "in" if transposed else "producer")[rows]
    if depthwise:
        produced = first
        per_input = first.view(count, -1)
        ledger.union(per_input[:, :, None], channels[:, None, :])
        ledger.union(per_input, per_input[:, :1])
        ledger.pin(
            torch.where((channels == FIXED).any(1)[:, None], per_input, FIXED), "it works on a tensor of a fixed size"
        )
    else:
        second = ledger.axis(name, dim1, "producer" if transposed else "in")[columns]
        consumed, produced = (first, second.repeat(count)) if transposed else (second.repeat(count), first)
        ledger.union(consumed[:, None], channels)
        for labels in (consumed, produced) if count > 1 else ():
            orbits = labels.view(count, -1)
            ledger.union(orbits, orbits[:1])
        if count > 1:
            mixed = (channels == FIXED).any(1)
            ledger.pin(torch.where(mixed, consumed, FIXED), "it is combined with a tensor whose size is fixed")
    if args[2] is not None:
        ledger.union(ledger.labels(of(args[2])), produced)
    return produced.view([1, -1] + [1] * (out.ndim - 2)).expand(out.shape)


def batch_norm(rules: Rules, args: Sequence[Any], out: Any, of: Of) -> Any:
    """Merge a norm's weight, bias and statistics with the channel."""
    ledger, source = rules.ledger, rules.ledger.labels(of(args[0]))
    channels = compact(source).movedim(1, 0).flatten(1).expand(source.shape[1], -1)
    for i, tensor in enumerate(args[1:5]):
        if tensor is None:
            if i < 2:
                ledger.pin(channels, "a norm without weight and bias leaves a constant in its place")
            continue
        ledger.union(ledger.labels(of(tensor))[:, None], channels)
        channels = torch.where(channels > 0, channels, ledger.labels(of(tensor))[:, None])
    ledger.union(channels, channels[:, :1])
    labels = channels[:, 0].view([1, -1] + [1] * (source.ndim - 2)).expand(source.shape)
    return rules.rest(labels, out)


def layer_norm(rules: Rules, args: Sequence[Any], out: Any, of: Of, kind: str) -> Any:
    """Merge a norm's weight and bias with the features; its statistics over units are not exact."""
    source = rules.ledger.labels(of(args[0]))
    count = len(args[1]) if isinstance(args[1], (list, tuple, torch.Size)) else 1
    lead = source.ndim - count
    _, varies = along(source, list(range(lead, source.ndim)))
    reason = f"{kind} takes its statistics over the units"
    rules.ledger.pin(torch.where(varies, compact(source), FIXED), reason, inexact=True)
    labels = compact(source)
    for tensor in args[2:4]:
        if isinstance(tensor, Tensor):
            added = rules.ledger.labels(of(tensor))
            wide = set(range(lead))
            labels = rules.combine(labels, set(), compact(added.view([1] * lead + list(added.shape))), wide)[0]
    return rules.rest(labels.expand(source.shape), out)


def group_norm(rules: Rules, args: Sequence[Any], out: Any, of: Of) -> Any:
    """Let the channels of a group of the norm leave together, and its weight and bias with them."""
    ledger, source = rules.ledger, rules.ledger.labels(of(args[0]))
    channels = compact(source).movedim(1, 0).flatten(1).expand(source.shape[1], -1)
    for tensor in args[1:3]:
        if tensor is None:
            ledger.pin(channels, "a norm without weight and bias leaves a constant in its place")
        else:
            ledger.union(ledger.labels(of(tensor))[:, None], channels)
    groups = channels.reshape(int(args[6]), -1)
    ledger.union(groups, groups[:, :1])
    return rules.rest(source, out)


def embedding(rules: Rules, args: Sequence[Any], out: Tensor, of: Of) -> Any:
    """Produce the features of an embedding."""
    weight = of(args[0])
    row = line(weight, 1) if isinstance(weight, Reference) else None
    if row is None:
        return rules.opaque([weight], "its weight is computed from parameters", out)
    return rules.ledger.axis(weight.name, row[0], "producer")[row[1]].expand(out.shape)  # type: ignore[union-attr]
