"""Products of a Hessian with vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pl_prune.core.convolution import FastDoubleBackward
from pl_prune.core.graph import edges
from pl_prune.core.types import PruneError

_ADVICE = (
    "Use a criterion without Hessian products (SNIP, Fisher, Gauss-Newton), or, for scoring, the plain form of that "
    "operation in place of the fused one."
)


def hessian_products(
    loss: Callable[[], Tensor], params: Sequence[Tensor], vectors: Iterable[list[Tensor]]
) -> Iterator[list[Tensor]]:
    """Multiply the Hessian of a loss by vectors, on one graph.

    Args:
        loss: Computes the loss.
        params: With respect to what.
        vectors: Tensors in the order of `params`.

    Yields:
        Products in the order of `params`, zeros where the second derivative vanishes.

    Raises:
        PruneError: If an operation has no second derivative, be it that PyTorch would silently leave it out.
        RuntimeError: What the loss itself raises.
    """
    try:
        with _kernels():
            first = torch.autograd.grad(loss(), params, create_graph=True, allow_unused=True)
        live = [(g, i) for i, g in enumerate(first) if g is not None and g.requires_grad]
        # The mark of `once_differentiable`, which hides what lies behind it from autograd.
        roots = [g for g, _ in live]
        nodes = (node for node in (*(g.grad_fn for g in roots), *edges(roots)) if node is not None)
        if any(node.name() == "torch::autograd::Error" for node in nodes):
            raise PruneError(
                "Expected operations that can be differentiated twice, for Hessian products; found a custom autograd function "
                f"marked once_differentiable. {_ADVICE}"
            )
        for vector in vectors:
            products: Sequence[Tensor | None] = [None] * len(params)
            if live:
                with _kernels():  # checkpointed parts run forward again
                    products = torch.autograd.grad(
                        roots, params, [vector[i].to(g.dtype) for g, i in live], retain_graph=True, allow_unused=True
                    )
            result = [torch.zeros_like(p) if hv is None else hv for p, hv in zip(params, products, strict=True)]
            del products  # the caller takes them out of the list, and their memory is free for the next
            yield result
    except RuntimeError as error:
        if "derivative for" not in str(error):
            raise
        raise PruneError(
            f"Expected operations that can be differentiated twice, for Hessian products; found one that cannot ({error}). {_ADVICE}"
        ) from error


@contextmanager
def _kernels() -> Iterator[None]:
    """Run with operations that can be differentiated twice: fused attention cannot."""
    with sdpa_kernel(SDPBackend.MATH), FastDoubleBackward():
        yield
