"""Whether a pruned network still carries a signal from its input to its output."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from pl_prune.core.masks import MaskSet
from pl_prune.core.neutral import neutral_norms
from pl_prune.core.sandbox import untouched
from pl_prune.core.select import is_layer


def find_path(model: nn.Module, masks: MaskSet, run: Callable[[nn.Module, Any], object], batch: Any) -> bool | None:
    """Say whether any input reaches the output layer's result through kept weights.

    One float64 pass of ones through |w| * mask, biases zero and norms neutral, from the first layer's input on; each
    layer's result is rescaled, so that depth cannot overflow. A second pass, of zeros, finds networks in which constants
    flow anyway (sigmoids, class tokens), where this says nothing.

    Args:
        model: The network.
        masks: What is kept.
        run: `run(model, batch)` executes the network; its result is not looked at.
        batch: A batch on the model's device; its floating-point tensors are replaced by ones.

    Returns:
        True or False; None where the network cannot be run in this way, or its output does not depend on the input alone.
    """
    weights = {name: _as_flow(name, p.detach()) for name, p in model.named_parameters()}
    weights = {name: w * masks[name].to(w.device) if name in masks else w for name, w in weights.items()}
    buffers = {name: _positive(b.double()) for name, b in model.named_buffers() if b.is_floating_point()}
    state = {f"model.{name}": tensor for name, tensor in {**weights, **buffers}.items()}
    ones = tree_map(lambda x: torch.ones_like(x, dtype=torch.float64) if _is_float(x) else x, batch)
    reached = _flows(model, run, state, ones, 1.0)
    return None if reached and _flows(model, run, state, ones, 0.0) is not False else reached


def _flows(
    model: nn.Module, run: Callable[[nn.Module, Any], object], state: dict[str, Tensor], batch: Any, value: float
) -> bool | None:
    """Run with the first layer's input set to a value; say whether the last layer's result is positive somewhere."""
    reached: list[bool] = []
    started: list[nn.Module] = []

    def feed(module: nn.Module, inputs: Any) -> Any:
        if started:
            return None
        started.append(module)
        return (torch.full_like(inputs[0], value), *inputs[1:])

    def rescale(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        top = output.detach().amax()
        reached.append(bool(top > 0))
        return output / top if top > 0 else output

    fast, dtype = torch.backends.mha.get_fastpath_enabled(), torch.get_default_dtype()
    with ExitStack() as stack:
        stack.enter_context(untouched(model))
        stack.enter_context(neutral_norms(model))
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        stack.callback(torch.set_default_dtype, dtype)
        torch.backends.mha.set_fastpath_enabled(False)
        torch.set_default_dtype(torch.float64)
        for module in model.modules():
            if is_layer(module):
                stack.enter_context(module.register_forward_pre_hook(feed))
                stack.enter_context(module.register_forward_hook(rescale))
        try:
            torch.func.functional_call(_Shell(model, run), state, (batch,))
        except Exception:  # a network that insists on its own dtype or inputs; the caller reports "unknown"
            return None
    return reached[-1] if reached else None


class _Shell(nn.Module):
    """Lets `functional_call` swap the weights of a model that is run by other ways than its `forward`."""

    def __init__(self, model: nn.Module, run: Callable[[nn.Module, Any], object]) -> None:
        super().__init__()
        self.model = model
        self.run = run

    def forward(self, batch: Any) -> object:
        return self.run(self.model, batch)


def _positive(buffer: Tensor) -> Tensor:
    return buffer.abs() if bool(buffer.isfinite().all()) else buffer  # an attention mask of -inf must stay one


def _is_float(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _as_flow(name: str, parameter: Tensor) -> Tensor:
    if name.endswith("bias"):
        return torch.zeros_like(parameter, dtype=torch.float64)
    flow = parameter.abs().double()
    return flow if flow.any() else torch.ones_like(flow)  # zero at initialisation, but not for long
