"""Squared per-sample gradients in one backward pass, from layer inputs and output gradients."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from pl_prune.core.select import is_layer
from pl_prune.core.types import Params, score_dtype

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def squared_sums(
    model: nn.Module, params: Params, loss: Callable[[Any], Tensor], batch: Any, size: int
) -> dict[str, Tensor]:
    """Sum the squared gradients of each sample's own loss over one batch.

    Layers of other kinds than Linear and Conv, and weights used outside their layers, are found by comparing the
    per-sample gradients' sum with the gradient itself; then every sample is differentiated alone.

    Args:
        model: The network.
        params: Its prunable parameters.
        loss: The summed loss of a batch; samples must not interact.
        batch: Tensors in any nesting, samples along the first dimension.
        size: Number of samples of the batch.

    Returns:
        Sums by parameter name.
    """
    fast = _from_hooks(model, params, loss, batch, size)
    if fast is not None:
        return fast
    total = {name: torch.zeros_like(p, dtype=score_dtype(p)) for name, p in params.items()}
    for i in range(size):
        grads = torch.autograd.grad(loss(cut(batch, size, i, i + 1)), list(params.values()), allow_unused=True)
        for sum_, grad in zip(total.values(), grads, strict=True):
            if grad is not None:
                sum_.add_(grad.to(sum_.dtype).square())
    return total


def cut(batch: Any, size: int, start: int, stop: int) -> Any:
    """Cut samples out of a batch.

    Args:
        batch: Tensors in any nesting.
        size: Number of samples.
        start: First sample.
        stop: One past the last sample.

    Returns:
        A batch in which every tensor whose first dimension counted samples has `stop - start`.
    """
    return tree_map(lambda x: x[start:stop] if isinstance(x, Tensor) and x.ndim and x.shape[0] == size else x, batch)


def _from_hooks(
    model: nn.Module, params: Params, loss: Callable[[Any], Tensor], batch: Any, size: int
) -> dict[str, Tensor] | None:
    layers: dict[str, nn.Module] = {}
    for name in params:
        layer = model.get_submodule(name.rpartition(".")[0])
        plain = isinstance(layer, nn.Linear) or (is_layer(layer) and not isinstance(layer.padding, str))
        if not plain or not name.endswith("weight") or getattr(layer, "padding_mode", "zeros") != "zeros":
            return None
        layers[name] = layer
    calls: list[tuple[str, Tensor, Tensor]] = []
    with ExitStack() as stack:
        for name, layer in layers.items():

            def note(_: nn.Module, inputs: Any, output: Tensor, name: str = name) -> Tensor:
                calls.append((name, inputs[0].detach(), output))
                return output.clone()  # an in-place activation must not overwrite what we differentiate by

            stack.enter_context(layer.register_forward_hook(note))
        value = loss(batch)
    if any(x.shape[0] != size or output.shape[0] != size for _, x, output in calls):
        return None
    outputs = [output for _, _, output in calls]
    grads = torch.autograd.grad(value, [*outputs, *params.values()], allow_unused=True)
    by_call, by_weight = grads[: len(outputs)], grads[len(outputs) :]
    of_first = torch.autograd.grad(loss(cut(batch, size, 0, 1)), list(params.values()), allow_unused=True)
    result = {}
    for (name, layer), expected, first in zip(layers.items(), by_weight, of_first, strict=True):
        used = [(x, g) for (n, x, _), g in zip(calls, by_call, strict=True) if n == name and g is not None]
        squares, sums = _squares(layer, used, size)
        _, alone = _squares(layer, [(x[:1], g[:1]) for x, g in used], 1)
        if not (_agree(sums, expected) and _agree(alone, first)):
            return None
        result[name] = squares
    return result


def _agree(found: Tensor, expected: Tensor | None) -> bool:
    if expected is None:
        return not bool(found.any())
    tolerance = max(1e-3, 8 * torch.finfo(expected.dtype).eps)
    return float((found - expected).abs().max()) <= tolerance * float(found.abs().max())


@torch.no_grad()
def _squares(layer: nn.Module, used: list[tuple[Tensor, Tensor]], size: int) -> tuple[Tensor, Tensor]:
    """Return the sum of squares and the sum of the per-sample gradients of a layer's weight."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    dtype = score_dtype(weight)
    used = [(x.to(dtype), g.to(dtype)) for x, g in used]
    if isinstance(layer, nn.Linear) and len(used) == 1 and used[0][0].ndim == 2:
        x, g = used[0]
        return g.square().T @ x.square(), g.T @ x
    squares, sums = torch.zeros_like(weight, dtype=dtype), torch.zeros_like(weight, dtype=dtype)
    for i in range(size):
        of_sample = [_weight_grad(layer, x[i : i + 1], g[i : i + 1]) for x, g in used]
        if of_sample:
            grad = of_sample[0] if len(of_sample) == 1 else torch.stack(of_sample).sum(0)
            squares.addcmul_(grad, grad)
            sums += grad
    return squares, sums


def _weight_grad(layer: Any, x: Tensor, grad: Tensor) -> Tensor:
    if isinstance(layer, nn.Linear):
        return grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1])
    weight_grad: Tensor = torch.ops.aten.convolution_backward(
        grad, x, layer.weight.to(x.dtype), None, layer.stride, layer.padding, layer.dilation,
        isinstance(layer, _TRANSPOSED), layer.output_padding, layer.groups, [False, True, False],
    )[1]  # fmt: skip
    return weight_grad
