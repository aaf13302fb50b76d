"""Run a network on example inputs and take hold of what it returns."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pl_prune.core.sandbox import untouched
from pl_prune.core.types import PruneError

Inputs = Tensor | Sequence[Any] | Mapping[str, Any]
_CACHES = ("past_key_values", "cache_params", "cache", "mems")


def as_call(example_inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments that an example stands for.

    Args:
        example_inputs: A tensor, a tuple or list of arguments, or a mapping of keywords.

    Returns:
        Positional and keyword arguments.

    Raises:
        PruneError: If it is of another type.
    """
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, Sequence) and not isinstance(example_inputs, str):
        return tuple(example_inputs), {}
    raise PruneError(
        f"Expected example_inputs to be a tensor, a tuple or a dict; found {type(example_inputs).__name__}. "
        "Pass one batch as the model's forward takes it."
    )


def tensors_of(value: Any) -> list[Tensor]:
    """Return the tensors of an output, of whatever containers; caches of keys and values are not outputs.

    Args:
        value: What a model returned.

    Returns:
        Its tensors in order.
    """
    found: list[Tensor] = []

    def visit(item: Any, depth: int) -> None:
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, Mapping):
            for key, part in item.items():
                if key not in _CACHES:
                    visit(part, depth)
        elif isinstance(item, (list, tuple, set)):
            for part in item:
                visit(part, depth)
        elif hasattr(item, "__dict__") and depth < 3 and not isinstance(item, (nn.Module, type)):
            visit(vars(item), depth + 1)

    visit(value, 0)
    return found


def outputs(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], inner: bool = False) -> list[Tensor]:
    """Run a network in evaluation mode.

    Args:
        model: The network; it is left as it was.
        args: Positional arguments.
        kwargs: Keyword arguments.
        inner: Whether to return what its modules return, in the order of execution, before what it returns itself.

    Returns:
        Tensors.
    """
    found: list[Tensor] = []

    def after(_module: nn.Module, _inputs: Any, out: Any) -> None:
        found.extend(t.detach().clone() for t in tensors_of(out))

    with untouched(model), plain_attention(), torch.no_grad():
        handles = [m.register_forward_hook(after) for m in (model.modules() if inner else [model])]
        try:
            model(*copy.deepcopy(args), **copy.deepcopy(dict(kwargs)))
        finally:
            for handle in handles:
                handle.remove()
    return found


def difference(a: Tensor, b: Tensor) -> float:
    """Compare two tensors.

    Args:
        a: A tensor.
        b: Another.

    Returns:
        The largest difference relative to the largest finite entry of the first; infinity if shapes or places of
        infinities differ.
    """
    if a.shape != b.shape:
        return float("inf")
    a, b = a.double(), b.double()
    finite = a.isfinite()
    if not torch.equal(finite, b.isfinite()):
        return float("inf")
    if not bool(finite.any()):
        return 0.0
    return float((a - b)[finite].abs().max()) / (float(a[finite].abs().max()) or 1.0)


def disagreement(masked: nn.Module, small: nn.Module, args: Any, kwargs: Any, tolerance: float) -> float:
    """Compare the outputs of a network whose units are zero with those of one from which they are sliced.

    Where outputs jump under rounding errors (a detector that selects boxes), or there are none, the tensors of all modules
    that keep their shape and do not jump are compared in their place.

    Args:
        masked: The network with zeros.
        small: The sliced one.
        args: Positional arguments.
        kwargs: Keyword arguments.
        tolerance: The relative difference that is allowed.

    Returns:
        The largest relative difference; infinity where nothing can be compared.
    """
    before, after = outputs(masked, args, kwargs), outputs(small, args, kwargs)
    worst = max(map(difference, before, after), default=0.0) if len(before) == len(after) else float("inf")
    empty = not any(t.numel() for t in before if t.is_floating_point())
    if worst <= tolerance and not empty:
        return worst
    shaken = [(_shaken(args, tolerance / 100, seed), _shaken(kwargs, tolerance / 100, seed)) for seed in range(3)]
    if not empty and all(_steady(before, outputs(masked, *noisy), tolerance) for noisy in shaken):
        return worst
    before, after = outputs(masked, args, kwargs, inner=True), outputs(small, args, kwargs, inner=True)
    noises = [outputs(masked, *noisy, inner=True) for noisy in shaken]
    steady = [
        difference(x, y)
        for x, y, *moved in zip(before, after, *noises, strict=False)
        if x.numel() and x.is_floating_point() and x.shape == y.shape and _steady([x] * 3, moved, tolerance)
    ]
    return max(steady, default=float("inf"))


def _steady(before: list[Tensor], noisy: list[Tensor], tolerance: float) -> bool:
    return len(before) == len(noisy) and all(difference(x, z) <= tolerance for x, z in zip(before, noisy, strict=True))


def _shaken(value: Any, share: float, seed: int) -> Any:
    """Add a little noise to the floating-point tensors of inputs."""
    if isinstance(value, Tensor):
        if not value.is_floating_point() or not value.numel():
            return value
        noise = torch.rand(value.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 0.5
        return value + (share * float(value.abs().max()) * noise).to(value)
    if isinstance(value, Mapping):
        return {k: _shaken(v, share, seed) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_shaken(v, share, seed) for v in value)
    return value


def skeleton(model: nn.Module) -> nn.Module:
    """Copy a network's modules but not its tensors.

    Args:
        model: The network.

    Returns:
        Modules of their own with the same parameters and buffers.
    """
    memo: dict[int, Any] = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, memo)


@contextmanager
def plain_attention() -> Iterator[None]:
    """Keep torch's attention modules off their fused path.

    Yields:
        None.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def in_dtype(value: Any, dtype: torch.dtype) -> Any:
    """Cast the floating-point tensors of inputs.

    Args:
        value: Tensors in containers.
        dtype: What to.

    Returns:
        The same containers.
    """
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {k: in_dtype(v, dtype) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(in_dtype(v, dtype) for v in value)
    return value
