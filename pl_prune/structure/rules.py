"""What each operator does to labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from pl_prune.structure import layers, operators, products
from pl_prune.structure.labels import FIXED, FREE, Ledger, Reference, along, compact

Traced = Tensor | Reference


class Rules:
    """The rules of operators, over one ledger.

    Args:
        ledger: Where unions and pins go.
    """

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.orbits = False  # whether reshapes and splits of units impose a pattern; after the heads are known

    def __call__(
        self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any, of: Callable[[Tensor], Traced]
    ) -> Any:
        """Label the outputs of an operator.

        Args:
            func: The operator.
            args: Its arguments.
            kwargs: Its keyword arguments.
            out: What it returned.
            of: Returns the labels of a tensor.

        Returns:
            Labels in the structure of `out`.
        """
        name = func._schema.name.partition("::")[2]
        base = name[:-1] if name.endswith("_") and not name.startswith("__") else name
        inputs = [of(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if name in operators.FACTORIES:
            return tree_map(lambda t: torch.full(t.shape, FREE) if isinstance(t, Tensor) else None, out)
        if not inputs:
            return tree_map(lambda t: self.constant(t.shape) if isinstance(t, Tensor) else None, out)
        if base in operators.MOVES or name in operators.MOVES:
            return self.move(func, args, kwargs, out, of, base)
        if base in operators.JOINS:
            args = tree_map(lambda t: self.ledger.labels(of(t)) if isinstance(t, Tensor) else t, args)
            return func(*args, **kwargs)
        if name == "as_strided_" and tuple(args[1]) == tuple(out.shape) == tuple(self.ledger.labels(inputs[0]).shape):
            return inputs[0]  # the strides of dimensions of one element are made regular before a convolution
        if name == "copy_":
            return self.copy(*(self.ledger.labels(of(t)) for t in args[:2]))
        if base == "constant_pad_nd":
            return self.pad(self.ledger.labels(of(args[0])), args[1])
        if base in operators.SPATIAL:
            return self.spatial(self.ledger.labels(of(args[0])), out, name)
        if base in operators.SUMS or base in operators.STATISTICS:
            return self.reduction(func, args, kwargs, out, self.ledger.labels(of(args[0])), base)
        if base in operators.SCANS:
            dim = args[1] if len(args) > 1 and isinstance(args[1], int) else kwargs.get("dim", -1)
            return self.scan(self.ledger.labels(of(args[0])), dim, out, base.strip("_"))
        if base in operators.PRODUCTS:
            return products.product(self, base, args, out, of)
        if base in ("convolution", "_convolution", "convolution_overrideable"):
            return layers.convolution(self, args, out, of)
        if base in operators.BATCH_NORMS:
            return layers.batch_norm(self, args, out, of)
        if base in ("native_layer_norm", "layer_norm", "_fused_rms_norm", "rms_norm"):
            return layers.layer_norm(self, args, out, of, "LayerNorm" if "layer" in base else "RMSNorm")
        if base == "native_group_norm":
            return layers.group_norm(self, args, out, of)
        if base == "glu":
            halves = self.ledger.labels(of(args[0])).chunk(2, args[1] if len(args) > 1 else -1)
            self.ledger.union(*halves)
            return torch.maximum(*halves)
        if base == "embedding":
            return layers.embedding(self, args, out, of)
        if torch.Tag.pointwise in func.tags or base in operators.POINTWISE:
            return self.pointwise(args, kwargs, out, of)
        reason = f"its values go through the operator {name}" + (
            f" ({operators.FUSED[name]})" if name in operators.FUSED else ""
        )
        for labels in inputs:
            self.ledger.pin(self.ledger.labels(labels), reason)
        return tree_map(lambda t: self.constant(t.shape) if isinstance(t, Tensor) else None, out)

    def constant(self, shape: Sequence[int]) -> Tensor:
        """Return labels of what no unit owns."""
        return torch.full((), FIXED).expand(shape)

    def rest(self, first: Tensor, out: Any) -> Any:
        """Label the first of several outputs; the others are no unit's."""
        if isinstance(out, Tensor):
            return first
        return type(out)([first, *(self.constant(t.shape) if isinstance(t, Tensor) else None for t in out[1:])])

    def move(
        self,
        func: Any,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        out: Any,
        of: Callable[[Tensor], Traced],
        base: str,
    ) -> Any:
        """Move labels as the elements are moved."""
        source = of(args[0])
        kwargs = {
            k: v for k, v in kwargs.items() if k not in ("dtype", "device", "memory_format", "layout", "pin_memory")
        }
        kwargs.pop("non_blocking", None)
        if base in (
            "clone",
            "contiguous",
            "_to_copy",
            "to",
            "lift_fresh",
            "lift",
            "lift_fresh_copy",
            "alias",
            "detach",
        ):
            return source
        views = ("view", "_unsafe_view", "reshape", "_reshape_alias", "view_copy")
        if base in views:  # labels may be laid out otherwise than what they belong to
            func, args = torch.ops.aten.reshape.default, args[:2]
        if isinstance(source, Reference):
            tags = [func(tag, *args[1:], **kwargs) for tag in source.tags]
            if isinstance(out, Tensor):
                return Reference(source.name, tags)
            return type(out)(Reference(source.name, [tag[i] for tag in tags]) for i in range(len(out)))
        if self.orbits and base in views:
            self.unflattened(source, out.shape)
        moved = func(source, *args[1:], **kwargs)
        if self.orbits and base in ("split", "split_with_sizes", "chunk"):
            for part in moved[1:]:
                if part.shape == moved[0].shape and self.varying(source, args[2] if len(args) > 2 else 0):
                    self.ledger.union(part, moved[0])
        return moved

    def varying(self, labels: Tensor, dim: int) -> bool:
        """Say whether labels differ along a dimension."""
        return bool(along(labels, [dim % labels.ndim])[1].any()) if labels.ndim else False

    def unflattened(self, labels: Tensor, shape: Sequence[int]) -> None:
        """Let the rows of a dimension of units that is split into a matrix lose the same columns."""
        old, new, i, j = list(labels.shape), list(shape), 0, 0
        while i < len(old) and j < len(new):
            width, parts, start = new[j], [j], i
            height = old[i]
            while height != width and (i < len(old) - 1 or j < len(new) - 1):
                if height < width and i < len(old) - 1:
                    i += 1
                    height *= old[i]
                elif j < len(new) - 1:
                    j += 1
                    width *= new[j]
                    parts.append(j)
                else:
                    return
            parts = [p for p in parts if new[p] > 1]
            if start == i and len(parts) > 1 and self.varying(labels, start):
                matrix = labels.reshape(new)
                live = [p for p in parts if bool(along(matrix, [p])[1].any())]
                for p in live[:-1]:
                    self.ledger.union(matrix, matrix.narrow(p, 0, 1))
            i, j = i + 1, j + 1

    def copy(self, target: Tensor, source: Tensor) -> Tensor:
        """Write labels where the target is a fresh constant, else merge."""
        source = source.expand(target.shape)
        if compact(target).shape == target.shape and not bool((target > 0).any()):
            target.copy_(source)
            return target
        self.ledger.union(target, source)
        return torch.maximum(target, source)

    def pad(self, labels: Tensor, widths: Sequence[int]) -> Tensor:
        """Pad with free labels; along a dimension of units the padding is fixed."""
        padded = [labels.ndim - 1 - i // 2 for i, width in enumerate(widths) if width]
        fill = FIXED if any(self.varying(labels, dim) for dim in padded) else FREE
        return torch.constant_pad_nd(labels, list(widths), fill)

    def spatial(self, labels: Tensor, out: Any, name: str) -> Any:
        """Keep the channel of what looks at the positions of one channel."""
        first = out if isinstance(out, Tensor) else out[0]
        count = (
            int(name.partition("d_")[0].rstrip("d")[-1]) if name.partition("d_")[0].rstrip("d")[-1:].isdigit() else 2
        )
        dims = list(range(labels.ndim - count, labels.ndim))
        value, varies = along(labels, dims)
        self.ledger.pin(torch.where(varies, compact(labels), FIXED), f"{name} mixes it with others")
        if name.startswith("roi"):
            value = along(value, [0])[0]
        return self.rest(value.expand(first.shape), out)

    def reduction(self, func: Any, args: Sequence[Any], kwargs: Any, out: Any, labels: Tensor, base: str) -> Any:
        """Reduce labels: what reduces over one unit is that unit's, what reduces over several is no one's."""
        names = [a.name for a in func._schema.arguments]
        bound = {**dict(zip(names, args, strict=False)), **kwargs}
        dims = bound.get("dim")
        dims = (
            list(range(labels.ndim)) if dims is None or dims == [] else [dims] if isinstance(dims, int) else list(dims)
        )
        dims = [d % max(labels.ndim, 1) for d in dims] if labels.ndim else []
        value, varies = along(labels, dims)
        if base in operators.STATISTICS:
            self.ledger.pin(
                torch.where(varies, compact(labels), FIXED), f"{base} is taken over its units", inexact=True
            )
        full = [1 if d in dims else n for d, n in enumerate(labels.shape)]
        value = value.expand(full)
        return tree_map(lambda t: value.reshape(t.shape) if isinstance(t, Tensor) else None, out)

    def scan(self, labels: Tensor, dim: int, out: Any, name: str) -> Any:
        """Keep labels; an operator that looks along units is not exact."""
        _, varies = along(labels, [dim % labels.ndim] if labels.ndim else [])
        self.ledger.pin(torch.where(varies, compact(labels), FIXED), f"{name} is taken over its units", inexact=True)
        return tree_map(lambda _: labels, out) if isinstance(out, Tensor) else type(out)(labels for _ in out)

    def pointwise(self, args: Sequence[Any], kwargs: dict[str, Any], out: Any, of: Callable[[Tensor], Traced]) -> Any:
        """Merge what is combined element by element."""
        operands = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        first = out if isinstance(out, Tensor) else out[0]
        if len(operands) == 1 and isinstance(source := of(operands[0]), Reference):
            return source if isinstance(out, Tensor) else self.rest(self.ledger.labels(source), out)
        result: tuple[Tensor, set[int]] | None = None
        for operand in operands:
            if first.ndim < operand.ndim:
                continue
            labels = self.ledger.labels(of(operand))
            lead = first.ndim - operand.ndim
            wide = {d for d in range(first.ndim) if first.shape[d] > 1 and (d < lead or operand.shape[d - lead] == 1)}
            wide |= {d + lead for d, s in enumerate(operand.stride()) if s == 0 and operand.shape[d] > 1}
            new = (compact(labels.view([1] * lead + list(labels.shape)) if lead else labels), wide)
            result = new if result is None else self.combine(*result, *new)
        labels = result[0] if result is not None else torch.full((), FREE)
        return self.rest(labels.expand(first.shape), out)

    def combine(self, a: Tensor, wide_a: set[int], b: Tensor, wide_b: set[int]) -> tuple[Tensor, set[int]]:
        """Merge two operands; one that is broadcast over several units is shared by them and stays."""
        shape = torch.broadcast_shapes(a.shape, b.shape)
        a_over = along(a, [d for d in wide_b if a.shape[d] > 1])[1]  # a differs where b is one
        b_over = along(b, [d for d in wide_a if b.shape[d] > 1])[1]
        reason = "it is broadcast over the units of another layer"
        self.ledger.pin(torch.where(a_over & (a > 0), b, FIXED), reason)
        self.ledger.pin(torch.where(b_over & (b > 0), a, FIXED), reason)
        self.ledger.union(torch.where(a_over | b_over, FIXED, a), torch.where(a_over | b_over, FIXED, b))
        for one, over, other, wide in ((a, a_over, b, wide_b), (b, b_over, a, wide_a)):
            dims = [d for d in range(one.ndim) if d not in wide and one.shape[d] > 1]
            if bool((other == FIXED).any()) and bool(along(one, dims)[1].any()):
                fixed = torch.where((other == FIXED) & ~over & along(one, dims)[1], one, FIXED)
                self.ledger.pin(fixed, "it is combined with a tensor whose size is fixed (an input, a sum over units)")
        out = torch.where(
            a_over.expand(a_over.shape) | (b <= 0), a, torch.where(b_over | (a <= 0), b, torch.maximum(a, b))
        )
        out = torch.where((a <= 0) & (b <= 0), torch.maximum(a, b), torch.where(out <= 0, torch.maximum(a, b), out))
        return self.ledger.settled(out).expand(torch.broadcast_shapes(out.shape, shape)), wide_a & wide_b

    def opaque(self, operands: Sequence[Traced], reason: str, out: Any) -> Any:
        """Give up on an operator: what goes in stays."""
        for operand in operands:
            self.ledger.pin(self.ledger.labels(operand), reason)
        return self.rest(self.constant((out if isinstance(out, Tensor) else out[0]).shape), out)
