"""`untouched`: run a model and leave no trace."""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pl_prune.core.types import PruneError


@contextmanager
def untouched(model: nn.Module, train: bool = False, seed: int = 0) -> Iterator[None]:
    """Restore a model and the random state at the end, also after an exception.

    Restored are: training modes, `requires_grad`, `.grad`, buffers and every tensor, list, dict, set and number that a
    module holds as an attribute (metric states among them), and the random states of torch (CPU and CUDA), numpy and
    random.
    Not restored: parameter values (scoring does not change them) and objects of other classes that a module holds.

    Args:
        model: The module to run inside.
        train: The mode inside: evaluation by default.
        seed: Seed of the random state inside, so that the outside state has no influence.

    Yields:
        None; inside, gradients are enabled, autocast is off, and compiled modules run as they were written.

    Raises:
        PruneError: If a layer is lazy and has not seen its first batch.
    """
    lazy = [name for name, t in [*model.named_parameters(), *model.named_buffers()] if is_lazy(t)]
    if lazy:
        raise PruneError(
            f"Expected a materialised model; found the lazy {lazy[0]!r}. Run one batch through the model first."
        )
    parameters = [(p, p.requires_grad, p.grad, _freeze(p.grad)) for p in model.parameters()]
    frozen = [_freeze(m.__dict__) for m in model.modules()]  # training modes and buffers are in there
    with ExitStack() as stack:
        stack.enter_context(_random_state(seed))
        if "torch._dynamo" in sys.modules:  # compiled code cannot be differentiated twice, nor run with hooks added
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device in {"cpu"} | {p.device.type for p, *_ in parameters}:
            stack.enter_context(torch.autocast(device, enabled=False))
        try:
            model.train(train)
            yield
        finally:
            for thaw in frozen:
                thaw()
            for parameter, requires_grad, grad, thaw_grad in parameters:
                parameter.requires_grad_(requires_grad)
                parameter.grad = grad
                thaw_grad()


@contextmanager
def aside(model: nn.Module) -> Iterator[None]:
    """Run a model as it is, with the random numbers that come next, and restore it and the random state at the end.

    Restored is what `untouched` restores of modules, buffers and random states; modes stay, and `.grad` is not looked at.

    Args:
        model: The module to run inside.

    Yields:
        None.
    """
    frozen = [_freeze(m.__dict__) for m in model.modules()]
    with _random_state(None):
        try:
            yield
        finally:
            for thaw in frozen:
                thaw()


def attributes_of(model: nn.Module) -> Callable[[], None]:
    """Note what a module holds beside parameters, so that no batch sees what another one left there (a hidden state).

    Noted are buffers with their values, numbers, tensors, and lists and dicts as long as they are; what is inside objects
    of other classes is not.

    Args:
        model: The module.

    Returns:
        A function that puts it back; functions among the attributes stay as they are.
    """
    own = set(nn.Module().__dict__) - {"training"}
    places = [m._buffers for m in model.modules()]
    places += [m.__dict__ for m in model.modules()]
    noted = [(place, {k: v for k, v in place.items() if k not in own and not callable(v)}) for place in places]
    values: list[Any] = [value for _, then in noted for value in then.values()]
    lists: list[tuple[Any, Any]] = [(value, type(value)(value)) for value in values if type(value) in (list, dict)]
    tensors = [t for t in values if isinstance(t, Tensor) and not isinstance(t, nn.Parameter) and not t.is_inference()]
    copies = [(t, t.detach().clone()) for t in tensors]
    versions = [t._version for t in tensors]

    def again() -> None:
        for place, then in noted:
            for name in [n for n, v in place.items() if n not in then and n not in own and not callable(v)]:
                del place[name]
            place.update(then)
        for value, copy in lists:
            value.clear()
            value.extend(copy) if isinstance(value, list) else value.update(copy)
        for i, (t, copy) in enumerate(copies):
            if t._version != versions[i]:
                with torch.no_grad():
                    t.copy_(copy)
                versions[i] = t._version

    return again


@contextmanager
def _random_state(seed: int | None) -> Iterator[None]:
    numpy = sys.modules.get("numpy")
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    saved = torch.get_rng_state(), random.getstate(), numpy.random.get_state() if numpy else None
    saved_cuda = torch.cuda.get_rng_state_all() if cuda else []
    try:
        if seed is not None:
            torch.default_generator.manual_seed(seed)
            random.seed(seed)
            if numpy:
                numpy.random.seed(seed)
            if cuda:
                torch.cuda.manual_seed_all(seed)
        yield
    finally:
        torch.set_rng_state(saved[0])
        random.setstate(saved[1])
        if numpy:
            numpy.random.set_state(saved[2])
        if cuda:
            torch.cuda.set_rng_state_all(saved_cuda)


def _freeze(value: Any) -> Callable[[], Any]:
    """Return a function that gives `value` back as it is now, contents included."""
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and not value.is_inference():
        copy = value.detach().clone()

        def thaw_tensor() -> Tensor:
            with torch.no_grad():
                if not torch.equal(value, copy):  # an expanded tensor cannot be written to
                    value.copy_(copy)
                return value

        return thaw_tensor
    if isinstance(value, dict):
        items = {key: _freeze(item) for key, item in value.items()}

        def thaw_dict() -> Any:
            old = {key: thaw() for key, thaw in items.items()}
            value.clear()
            value.update(old)
            return value

        return thaw_dict
    if isinstance(value, (list, deque)):
        members = [_freeze(item) for item in value]

        def thaw_sequence() -> Any:
            old = [thaw() for thaw in members]
            value.clear()
            value.extend(old)
            return value

        return thaw_sequence
    if type(value) is tuple:
        parts = [_freeze(item) for item in value]

        def thaw_tuple() -> Any:
            for thaw in parts:
                thaw()
            return value

        return thaw_tuple
    if isinstance(value, set):
        elements = set(value)

        def thaw_set() -> Any:
            value.clear()
            value.update(elements)
            return value

        return thaw_set
    return lambda: value
