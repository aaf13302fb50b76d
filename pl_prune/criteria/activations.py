"""`ActivationTaps`: gradients of scales put between layers and their activations, without any scale."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

_ACTIVATIONS = frozenset([
    "relu", "relu6", "leaky_relu", "rrelu", "prelu", "elu", "selu", "celu", "gelu", "silu", "mish", "hardswish",
    "hardsigmoid", "hardtanh", "hardshrink", "softshrink", "tanhshrink", "threshold", "tanh", "sigmoid",
    "logsigmoid", "softplus", "softsign", "clamp", "clamp_min", "clamp_max", "clip",
])  # fmt: skip
_IN_PLACE = frozenset(["__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__"])


@dataclass
class _Call:
    """One output of a layer: its name, its value before any activation, and whether an activation took it."""

    name: str
    output: Tensor
    value: Tensor
    channel: int
    activated: bool = False


class ActivationTaps(TorchFunctionMode):
    """Inside, every backward pass sums dL/dD of layers, for D * x - D' * x + sigma(x) in the place of sigma(x) at D = D'.

    That is the sum, over samples and positions, of x times the gradient at the activation's output; where no activation
    takes the layer's output itself, sigma is the identity. In-place activations and functions are seen as well as
    modules; of several activations of one output, the first counts.

    Args:
        model: The network.
        layers: Names of layers.

    Attributes:
        sums: dL/dD by layer, (channels,), of the layers whose output the loss depends on; but for plain layers whose outputs
            no activation takes, of which weights times their gradients say the same.
    """

    def __init__(self, model: nn.Module, layers: Iterable[str]) -> None:
        super().__init__()
        self.sums: dict[str, Tensor] = {}
        self._modules = {name: model.get_submodule(name) for name in layers}
        self._handles: list[RemovableHandle] = []
        self._calls: dict[int, _Call] = {}
        self._noted: list[_Call] = []
        self._alone = {name for name, m in self._modules.items() if _is_plain(m)}  # until an activation takes an output

    def __enter__(self) -> ActivationTaps:
        self._handles = [m.register_forward_hook(self._note(name)) for name, m in self._modules.items()]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()
        for call in self._noted:  # each holds the graph that holds it
            call.output = call.value = torch.empty(0)
        self._calls, self._noted = {}, []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else kwargs.get("input")
        call = self._calls.get(id(first)) if isinstance(first, Tensor) else None
        if call is None:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        in_place = bool(kwargs.get("inplace")) or name in _IN_PLACE or (name.endswith("_") and name[:2] != "__")
        if in_place:
            call.value = call.value.clone()
        result = func(*args, **kwargs)
        if name.rstrip("_") in _ACTIVATIONS and not call.activated:
            call.activated = True
            self._alone.discard(call.name)
            result.register_hook(self._adder(call))
        if in_place:
            del self._calls[id(first)]
        return result

    def _note(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, _: Any, output: Any) -> None:
            if not isinstance(output, Tensor) or not output.requires_grad:
                return
            call = _Call(name, output, output.detach(), channel_of(module, output))
            self._calls[id(output)] = call
            self._noted.append(call)
            output.register_hook(  # type: ignore[no-untyped-call]
                lambda grad: None if call.activated or call.name in self._alone else self._add(call, grad)
            )

        return hook

    def _adder(self, call: _Call) -> Callable[[Tensor], None]:
        return lambda grad: self._add(call, grad)

    def _add(self, call: _Call, grad: Tensor) -> None:
        dtype = torch.promote_types(grad.dtype, torch.float32)
        product = call.value.to(dtype) * grad.to(dtype)
        channel = call.channel % product.ndim
        total = product.sum([d for d in range(product.ndim) if d != channel])
        self.sums[call.name] = self.sums[call.name] + total if call.name in self.sums else total


def _is_plain(module: nn.Module) -> bool:
    """Say whether a layer's output is linear in its parameters: a layer of torch, whose weights nothing else computes."""
    return type(module).__module__.startswith("torch.nn.modules.") and not module._forward_pre_hooks


def channel_of(module: nn.Module, output: Tensor) -> int:
    """Say which dimension of a layer's output its channels are.

    Args:
        module: A linear, convolution or norm layer.
        output: Its output.

    Returns:
        The dimension.
    """
    if isinstance(module, _ConvNd):
        return -1 - len(module.kernel_size)
    return min(1, output.ndim - 1) if isinstance(module, (_NormBase, nn.GroupNorm)) else -1


def has_channels(module: nn.Module, dim: int) -> bool:
    """Say whether positions along a dimension of a layer's weight are the channels of its output.

    Args:
        module: The layer.
        dim: The dimension.

    Returns:
        False for layers whose output shows nothing of that (embeddings, attention modules, grouped transposed convolutions).
    """
    if isinstance(module, _ConvTransposeNd):
        return module.groups == 1 and dim == 1
    return is_norm(module) or (isinstance(module, (_ConvNd, nn.Linear)) and dim == 0)


def is_norm(module: nn.Module) -> bool:
    """Say whether a layer is a norm with a scale per channel.

    Args:
        module: The layer.

    Returns:
        True for batch, instance, group, layer and RMS norms of one dimension.
    """
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return len(module.normalized_shape) == 1
    return isinstance(module, (_NormBase, nn.GroupNorm))
