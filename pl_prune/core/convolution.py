"""Operations as they have to be written to be differentiated twice, and convolutions whose second derivative is fast."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import hardsigmoid
from torch.overrides import TorchFunctionMode


class FastDoubleBackward(TorchFunctionMode):
    """Inside this context, `conv1d`, `conv2d` and `conv3d` are differentiated twice by the kernels of the first derivative.

    PyTorch's own double backward writes the gradient of the weight as a convolution with a kernel of the size of the
    feature map, which takes about twice as long. Values are the same up to rounding. Transposed convolutions, string
    paddings, inputs without a batch dimension and autocast are left to PyTorch. Hard sigmoids, of which PyTorch has no
    second derivative, are clamped lines.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replace a convolution.

        Args:
            func: What is called.
            types: Classes that take part.
            args: Its arguments.
            kwargs: Its named arguments.

        Returns:
            Its result.
        """
        if func is hardsigmoid:
            return (args[0] + 3).clamp(0, 6) / 6
        if func in _DIMENSIONS:
            call = _arguments(*args, **(kwargs or {}))
            dims = _DIMENSIONS[func]
            x = call["input"]
            cast = torch.is_autocast_enabled(x.device.type)  # which converts what PyTorch's own function is given
            if x.ndim == dims + 2 and not isinstance(call["padding"], str) and not cast:
                geometry = [_tuple(call[key], dims) for key in ("stride", "padding", "dilation")]
                return _Convolution.apply(x, call["weight"], call["bias"], *geometry, call["groups"])
        return func(*args, **(kwargs or {}))


_DIMENSIONS = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}


def _arguments(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> dict[str, Any]:
    return locals()


def _tuple(value: Any, dims: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values


class _Convolution(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = geometry
        return _forward(x, weight, bias, geometry)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        to_x, to_weight, to_bias = ctx.needs_input_grad[:3]
        by_x, by_weight = _Backward.apply(grad, x, weight, to_x, to_weight, *ctx.geometry)
        by_bias = grad.sum([0, *range(2, grad.ndim)]) if to_bias else None
        return by_x, by_weight, by_bias, None, None, None, None


class _Backward(Function):
    @staticmethod
    def forward(
        ctx: Any, grad: Tensor, x: Tensor, weight: Tensor, to_x: bool, to_weight: bool, *geometry: Any
    ) -> tuple[Tensor | None, Tensor | None]:
        ctx.save_for_backward(grad, x, weight)
        ctx.geometry = geometry
        ctx.set_materialize_grads(False)
        return _backward(grad, x, weight, geometry, to_x, to_weight)

    @staticmethod
    def backward(ctx: Any, of_x: Tensor | None, of_weight: Tensor | None) -> Any:
        grad, x, weight = ctx.saved_tensors
        to_grad, to_x, to_weight = ctx.needs_input_grad[:3]
        parts = [_forward(x, of_weight, None, ctx.geometry)] if to_grad and of_weight is not None else []
        parts += [_forward(of_x, weight, None, ctx.geometry)] if to_grad and of_x is not None else []
        by_grad = parts[0] if len(parts) == 1 else parts[0].add_(parts[1]) if parts else None
        by_x = by_weight = None
        if to_x and of_weight is not None:
            by_x = _backward(grad, x, of_weight, ctx.geometry, True, False)[0]
        if to_weight and of_x is not None:
            by_weight = _backward(grad, of_x, weight, ctx.geometry, False, True)[1]
        return by_grad, by_x, by_weight, *[None] * 6


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Any) -> Tensor:
    stride, padding, dilation, groups = geometry
    return torch.convolution(x, weight, bias, stride, padding, dilation, False, [0] * len(stride), groups)


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: Any, to_x: bool, to_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    stride, padding, dilation, groups = geometry
    by_x, by_weight, _ = torch.ops.aten.convolution_backward(
        grad, x, weight, None, stride, padding, dilation, False, [0] * len(stride), groups, [to_x, to_weight, False]
    )
    return by_x, by_weight
