"""Autograd's graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from torch import Tensor
from torch.autograd.graph import Node

from pl_prune.core.types import Params


def edges(tensors: Iterable[Tensor]) -> Iterator[Node]:
    """Walk the graph that tensors were computed by.

    Args:
        tensors: Where to start.

    Yields:
        The node at the end of every edge, so a node as often as it is used.
    """
    todo = [t.grad_fn for t in tensors]
    seen = set(todo)
    while todo:
        node = todo.pop()
        for after, _ in node.next_functions if node is not None else ():
            if after is not None:
                yield after
                if after not in seen:
                    seen.add(after)
                    todo.append(after)


def uses(value: Tensor, params: Params) -> Counter[str]:
    """Count how often the graph of a value uses each parameter.

    Args:
        value: Computed from parameters.
        params: Parameters by name.

    Returns:
        Numbers by name.
    """
    names = {id(p): name for name, p in params.items()}
    used = (names.get(id(getattr(node, "variable", None))) for node in edges([value]))
    return Counter(name for name in used if name is not None)
