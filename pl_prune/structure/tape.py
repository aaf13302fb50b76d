"""A tape of the operators that one run of a network executes, and the labels of its tensors."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from pl_prune.core.types import PruneError
from pl_prune.structure.labels import Reference
from pl_prune.structure.rules import Rules
from pl_prune.structure.running import tensors_of

_COUNTED = frozenset(["convolution", "_convolution", "mm", "addmm", "bmm", "baddbmm"])


class Tape(TorchDispatchMode):
    """What a run executed, so that labels can follow it again and again while the network runs once.

    Args:
        deadline: When to give up, by `time.monotonic`.
        memory: How many bytes activations and labels may take.

    Attributes:
        last: The last operator that was recorded or followed.
        macs: Multiply-accumulates by parameter name, as last followed.
    """

    def __init__(self, deadline: float, memory: float) -> None:
        super().__init__()
        self.deadline, self.memory = deadline, memory
        self.last = ""
        self.macs: dict[str, int] = {}
        self._entries: list[tuple[Any, Any, Any, Any]] = []
        self._originals: dict[int, tuple[Tensor, Tensor]] = {}  # by id of the stand-in; holds both: ids stay theirs
        self._stand_ins: dict[int, Tensor] = {}
        self._results: list[Tensor] = []
        self._storages: dict[int, int] = {}

    def record(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Run a model once.

        Args:
            model: The module.
            args: Positional arguments.
            kwargs: Keyword arguments.
        """
        with self:
            out = model(*args, **kwargs)
        self._results = tensors_of(out)

    def follow(self, rules: Rules) -> None:
        """Move labels along; what the model returned stays.

        Args:
            rules: What operators do to labels.
        """
        known: dict[int, Tensor | Reference] = {}
        ledger = rules.ledger
        self.macs = {}

        def of(tensor: Tensor) -> Tensor | Reference:
            key = id(self._originals[id(tensor)][1] if id(tensor) in self._originals else tensor)
            if key in known:
                return known[key]
            name = ledger.names.get(key)
            return rules.constant(tensor.shape) if name is None else ledger.refer(name)

        for func, args, kwargs, out in self._entries:
            self.last = _name(func)
            self._count(args, out, of)
            found = rules(func, args, kwargs, out, of)
            for tensor, labels in zip(_flat(out), _flat(found), strict=True):
                if isinstance(tensor, Tensor) and labels is not None:
                    known[id(self._originals[id(tensor)][1])] = labels
                    if isinstance(labels, Tensor):
                        self._guard(labels)
        for tensor in self._results:
            ledger.pin(ledger.labels(of(tensor)), "it reaches the output of the model")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        before = tree_map(self._stand_in, (args, kwargs))  # an operator in place may change the shape
        out = func(*args, **kwargs)
        self.last = _name(func)
        self._entries.append((func, *before, tree_map(self._stand_in, out)))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._guard(tensor)
        return out

    def _stand_in(self, value: Any) -> Any:
        """Return what keeps the shape that a tensor has now."""
        if not isinstance(value, Tensor):
            return value
        known = self._stand_ins.get(id(value))
        if known is None or known.shape != value.shape or known.stride() != value.stride():
            known = self._stand_ins[id(value)] = value.detach()
            self._originals[id(known)] = (known, value)
        return known

    def _count(self, args: Any, out: Any, of: Any) -> None:
        """Count the multiply-accumulates of weights."""
        if self.last not in _COUNTED:
            return
        for tensor in args[:3]:
            weight = of(tensor) if isinstance(tensor, Tensor) else None
            if isinstance(weight, Reference) and tensor.ndim > 1:
                if "convolution" in self.last:
                    positions = (args[0] if args[6] else out).numel() // (args[0] if args[6] else out).shape[1]
                else:
                    positions = out.numel() // tensor.shape[-1 if tensor is args[-1] else -2]
                self.macs[weight.name] = self.macs.get(weight.name, 0) + tensor.numel() * positions

    def _guard(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._storages[storage.data_ptr()] = storage.nbytes()
        used = sum(self._storages.values()) if len(self._storages) % 16 == 0 else 0
        if time.monotonic() > self.deadline or used > self.memory:
            limit = "max_gigabytes" if used > self.memory else "max_seconds"
            raise PruneError(
                f"Expected tracing to stay within {limit}; found more needed at the operator {self.last} ({used / 1e9:.1f} GB). "
                "Trace one small sample (fewer pixels or tokens), or raise the limit."
            )


def _name(func: Any) -> str:
    return str(func._schema.name.partition("::")[2])


def _flat(value: Any) -> list[Any]:
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in _flat(item)]
    return [value]
