"""Labels: which unit every element of every tensor of a network belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

FREE = -1
"""Label of padding and of constants made on the way: they follow the shape of what they meet."""
FIXED = 0
"""Label of what no unit owns: inputs, sums over units. Units have labels from 1 on."""
_LARGEST = 1 << 22
_MANY = 1 << 16


@dataclass
class Reference:
    """A tensor that is a parameter or buffer, moved about but not computed with.

    Args:
        name: Of the parameter or buffer.
        tags: For each dimension of it, the position there of every element of the moved tensor.
    """

    name: str
    tags: list[Tensor]


class Ledger:
    """The labels of all parameters and buffers, what has to leave together, and what has to stay.

    Args:
        model: The network.
    """

    def __init__(self, model: nn.Module) -> None:
        named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self.names = {id(t): name for name, t in named.items()}
        self.tensors = named
        self.axes: dict[tuple[str, int], int] = {}  # first label of a dimension of a parameter
        self.elements: dict[str, int] = {}  # first label of a parameter that is used element by element
        self.uses: dict[tuple[str, int], str] = {}
        self.count = 1
        self.roots = torch.zeros(1, dtype=torch.int64)
        self.pins: list[tuple[Tensor, str, bool]] = []
        self._edges: list[Tensor] = []
        self._merged = False

    def axis(self, name: str, dim: int, use: str | None = None) -> Tensor:
        """Return the labels of the positions of a dimension.

        Args:
            name: Of a parameter or buffer.
            dim: The dimension.
            use: "producer" (a unit's own rows), "out" or "in"; the first of these that is ever said holds.

        Returns:
            One label per position.
        """
        key = (name, dim)
        size = self.tensors[name].shape[dim]
        if key not in self.axes:
            self.axes[key] = self._more(size)
        if use is not None:
            rank = ("producer", "out", "in")
            self.uses[key] = min(use, self.uses.get(key, use), key=rank.index)
        return self.roots[self.axes[key] : self.axes[key] + size]

    def labels(self, tensor: Tensor | Reference) -> Tensor:
        """Return labels by element, of a parameter too.

        Args:
            tensor: Labels, or a reference.

        Returns:
            Labels.
        """
        if isinstance(tensor, Tensor):
            return tensor
        original, shape = self.tensors[tensor.name], tensor.tags[0].shape if tensor.tags else torch.Size()
        if original.ndim == 0:
            return torch.full(shape, FREE)
        if original.ndim == 1:
            return self.axis(tensor.name, 0, "out")[tensor.tags[0]]
        if original.numel() > _LARGEST:
            for dim in range(original.ndim):
                self.pin(self.axis(tensor.name, dim), f"{tensor.name} takes part in a computation element by element")
            return torch.full((), FIXED).expand(shape)
        if tensor.name not in self.elements:
            self.elements[tensor.name] = self._more(original.numel())
        flat = torch.zeros((), dtype=torch.int64)
        for size, tag in zip(original.shape, tensor.tags, strict=True):
            flat = flat * size + tag
        return self.settled(self.roots[flat + self.elements[tensor.name]].expand(shape)).expand(shape)

    def refer(self, name: str) -> Reference:
        """Return a reference to a whole parameter or buffer.

        Args:
            name: Of the parameter or buffer.

        Returns:
            The reference.
        """
        shape = self.tensors[name].shape
        views = [[-1 if i == d else 1 for i in range(len(shape))] for d in range(len(shape))]
        return Reference(name, [torch.arange(n).view(v).expand(shape) for n, v in zip(shape, views, strict=True)])

    def union(self, a: Tensor, b: Tensor) -> None:
        """Say that units leave together.

        Args:
            a: Labels.
            b: Labels that broadcast with them; pairs with a label that is no unit's are passed over.
        """
        a, b = torch.broadcast_tensors(compact(a), compact(b))
        pairs = torch.stack([a.flatten(), b.flatten()])
        pairs = self.roots[pairs[:, (pairs > 0).all(0)]]
        pairs = pairs[:, pairs[0] != pairs[1]]
        if pairs.shape[1]:
            self._edges.append(pairs)
            if sum(edges.shape[1] for edges in self._edges) > _MANY:
                self._merge()

    def pin(self, labels: Tensor, reason: str, inexact: bool = False) -> None:
        """Say that units stay.

        Args:
            labels: Their labels, among others.
            reason: Why.
            inexact: Whether they could leave if outputs may change.
        """
        found = compact(labels).unique()
        if bool((found > 0).any()):
            self.pins.append((found[found > 0], reason, inexact))

    def idle(self) -> list[str]:
        """Return the weights that no run has met.

        Returns:
            Names of parameters of two and more dimensions.
        """
        met = {name for name, _ in self.axes} | self.elements.keys()
        return [n for n, t in self.tensors.items() if isinstance(t, nn.Parameter) and t.ndim > 1 and n not in met]

    def settle(self) -> bool:
        """Merge what leaves together, and start over with the merged labels.

        Returns:
            Whether anything was merged.
        """
        self._merge()
        merged, self._merged = self._merged, False
        return merged

    def settled(self, labels: Tensor) -> Tensor:
        """Return labels as what has been merged so far makes them, dimensions along which they are the same reduced to one.

        Args:
            labels: Labels.

        Returns:
            Labels that broadcast to the shape of these; the very same ones where none is a unit's.
        """
        labels = compact(labels)
        if not bool((labels > 0).any()):
            return labels
        labels = torch.where(labels > 0, self.roots[labels.clamp_min(0)], labels)
        for dim, size in enumerate(labels.shape):
            if size > 1 and torch.equal(labels, (first := labels.narrow(dim, 0, 1)).expand_as(labels)):
                labels = first
        return labels

    def _merge(self) -> None:
        if self._edges:
            self.roots = components(self.roots, torch.cat(self._edges, 1))
            self._merged = True
        self._edges = []

    def _more(self, size: int) -> int:
        first, self.count = self.count, self.count + size
        self.roots = torch.cat([self.roots, torch.arange(first, self.count)])
        return first


def components(roots: Tensor, pairs: Tensor) -> Tensor:
    """Merge classes of labels.

    Args:
        roots: The smallest label of the class of each label.
        pairs: (2, n) labels to merge.

    Returns:
        The roots after merging.
    """
    parent = roots.clone()
    while True:
        a, b = parent[pairs[0]], parent[pairs[1]]
        if torch.equal(a, b):
            return parent
        parent.scatter_reduce_(0, torch.maximum(a, b), torch.minimum(a, b), "amin")
        while not torch.equal(parent, shorter := parent[parent]):
            parent = shorter


def compact(labels: Tensor) -> Tensor:
    """Reduce expanded dimensions to one.

    Args:
        labels: Labels.

    Returns:
        A view that broadcasts to the same labels.
    """
    for dim, (size, stride) in enumerate(zip(labels.shape, labels.stride(), strict=True)):
        if stride == 0 and size > 1:
            labels = labels.narrow(dim, 0, 1)
    return labels


def along(labels: Tensor, dims: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Reduce labels over dimensions.

    Args:
        labels: Labels.
        dims: Which dimensions.

    Returns:
        The label where it is the same along these dimensions, `FIXED` where it is not, and whether it is not; both
        with those dimensions as 1.
    """
    small = compact(labels)
    if not dims or not small.numel():
        return small, torch.zeros_like(small, dtype=torch.bool)
    high = small.amax(list(dims), keepdim=True)
    low = torch.where(small == FREE, high, small).amin(list(dims), keepdim=True)
    return torch.where(low == high, high, FIXED), low != high


def line(reference: Reference, dim: int) -> tuple[int, Tensor] | None:
    """Find the dimension of a parameter that runs along a dimension of its moved form, and nowhere else.

    Args:
        reference: The moved parameter.
        dim: A dimension of the moved form.

    Returns:
        The dimension of the parameter and the position there by position; None where there is no such dimension.
    """
    for original, tag in enumerate(reference.tags):
        small = compact(tag)
        if small.shape[dim] > 1 and small.numel() == small.shape[dim]:
            return original, small.flatten()
    single = [d for d, size in enumerate(reference.tags[0].shape) if size == 1] if reference.tags else []
    alone = [original for original, tag in enumerate(reference.tags) if compact(tag).numel() == 1]
    if dim in single and single.index(dim) < len(alone):  # dimensions of one position keep their order
        original = alone[single.index(dim)]
        return original, reference.tags[original].flatten()[:1]
    return None
