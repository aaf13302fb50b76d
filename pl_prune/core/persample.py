"""Squared per-sample gradients in one backward pass, from layer inputs and output gradients."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from pl_prune.core.batch import cut
from pl_prune.core.graph import uses
from pl_prune.core.select import is_layer
from pl_prune.core.types import Params, score_dtype

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def squared_sums(
    model: nn.Module, params: Params, loss: Callable[[Any], Tensor], batch: Any, size: int
) -> list[Tensor]:
    """Sum the squared gradients of each sample's own loss over one batch.

    Layers of other kinds than Linear and Conv, and weights used outside their layers, are found by the graph of the
    loss and by the gradient of the first two samples; then every sample is differentiated alone.

    Args:
        model: The network.
        params: Its prunable parameters.
        loss: The summed loss of a batch; samples must not interact.
        batch: Tensors in any nesting, samples along the first dimension.
        size: Number of samples of the batch.

    Returns:
        Sums in the order of `params`.

    Raises:
        OutOfMemoryError: If there is not enough memory.
    """
    try:
        fast = _from_hooks(model, params, loss, batch, size)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # a layer that does more than its class, such as to pad its input itself
        fast = None
    if fast is not None:
        return fast
    total = [torch.zeros_like(p, dtype=score_dtype(p)) for p in params.values()]
    for i in range(size):
        grads = torch.autograd.grad(loss(cut(batch, size, i, i + 1)), list(params.values()), allow_unused=True)
        for sum_, grad in zip(total, grads, strict=True):
            if grad is not None:
                sum_.add_(grad.to(sum_.dtype).square())
    return total


def _from_hooks(
    model: nn.Module, params: Params, loss: Callable[[Any], Tensor], batch: Any, size: int
) -> list[Tensor] | None:
    layers: dict[str, nn.Module] = {}
    for name in params:
        layer = model.get_submodule(name.rpartition(".")[0])
        plain = isinstance(layer, nn.Linear) or (is_layer(layer) and not isinstance(layer.padding, str))
        if not plain or not name.endswith("weight") or getattr(layer, "padding_mode", "zeros") != "zeros":
            return None
        layers[name] = layer
    odd: list[str] = []
    calls: list[tuple[str, Tensor, int, GradientEdge]] = []
    with ExitStack() as stack:
        for name, layer in layers.items():

            def note(_: nn.Module, inputs: Any, named: Any, output: Tensor, name: str = name) -> None:
                if len(inputs) != 1 or named:
                    odd.append(name)
                elif output.requires_grad:
                    # The edge, and not the output: an in-place activation replaces the output's.
                    calls.append((name, inputs[0].detach(), len(output), get_gradient_edge(output)))

            stack.enter_context(layer.register_forward_hook(note, with_kwargs=True))
        value = loss(batch)
    if odd:
        return None
    used_by = uses(value, params)
    if any(used_by[name] != sum(n == name for n, *_ in calls) for name in params):
        return None
    if any((len(x), outputs) != (size, size) for _, x, outputs, _ in calls):
        return None
    grads = torch.autograd.grad(value, [edge for *_, edge in calls], allow_unused=True)
    of_two = torch.autograd.grad(loss(cut(batch, size, 0, 2)), list(params.values()), allow_unused=True)
    total = []
    for (name, layer), expected in zip(layers.items(), of_two, strict=True):
        dtype = score_dtype(params[name])
        used = [
            (x.to(dtype), g.to(dtype))
            for (n, x, *_), g in zip(calls, grads, strict=True)
            if n == name and g is not None
        ]
        if not _agree(_weight_grads(layer, [(x[:2], g[:2]) for x, g in used]).sum(0), expected):
            return None
        total.append(_squares(layer, used, size))
    return total


def _agree(found: Tensor, expected: Tensor | None) -> bool:
    if expected is None:
        return not bool(found.any())
    tolerance = max(1e-3, 8 * torch.finfo(expected.dtype).eps)
    return float((found - expected).abs().max()) <= tolerance * float(found.abs().max())


@torch.no_grad()
def _squares(layer: Any, used: list[tuple[Tensor, Tensor]], size: int) -> Tensor:
    """Return the sum over samples of the squared gradient of the weight, summed over the calls of the layer."""
    if isinstance(layer, nn.Linear) and len(used) == 1 and used[0][0].ndim == 2:
        x, g = used[0]
        return g.square().T @ x.square()
    squares = torch.zeros_like(layer.weight, dtype=score_dtype(layer.weight))
    at_once = min(8, max(1, 2**20 // squares.numel()))
    for i in range(0, size, at_once):
        for grad in _weight_grads(layer, [(x[i : i + at_once], g[i : i + at_once]) for x, g in used]):
            squares.addcmul_(grad, grad)
    return squares


@torch.no_grad()
def _weight_grads(layer: Any, used: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the gradients of the weight for each sample, summed over the calls of the layer."""
    total = torch.zeros((1, *layer.weight.shape), dtype=score_dtype(layer.weight), device=layer.weight.device)
    for x, grad in used:
        n = len(x)
        if isinstance(layer, nn.Linear):
            grads = grad.reshape(n, -1, grad.shape[-1]).mT @ x.reshape(n, -1, x.shape[-1])
        else:
            # Samples as groups of channels: one kernel for all of them.
            weight = x.new_empty((n * layer.weight.shape[0], *layer.weight.shape[1:]))
            x, grad = (t.reshape(1, -1, *t.shape[2:]) for t in (x, grad))
            grads = torch.ops.aten.convolution_backward(
                grad, x, weight, None, layer.stride, layer.padding, layer.dilation,
                isinstance(layer, _TRANSPOSED), layer.output_padding, n * layer.groups, [False, True, False],
            )[1].view(n, *layer.weight.shape)  # fmt: skip
        total = grads if len(used) == 1 else total + grads
    return total
