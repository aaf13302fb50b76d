"""`trace_groups`: run a network once and see what leaves together."""

from __future__ import annotations

import difflib
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from pl_prune.core.groups import ParameterGroups
from pl_prune.core.sandbox import untouched
from pl_prune.core.types import PruneError
from pl_prune.structure.assemble import assemble
from pl_prune.structure.labels import Ledger, Reference
from pl_prune.structure.probe import keep_exact
from pl_prune.structure.rules import Rules
from pl_prune.structure.running import Inputs, as_call, plain_attention, tensors_of

_PASSES = 20


def trace_groups(
    model: nn.Module,
    example_inputs: Inputs,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    exact: bool = True,
    max_seconds: float = 120.0,
    max_gigabytes: float = 8.0,
) -> ParameterGroups:
    """Find what leaves a network together: channels, orbits of grouped convolutions, heads, hidden units.

    The network runs in evaluation mode on the example; every element of every tensor carries the label of the unit that
    it belongs to, moved by the same operators as the element itself, so that reshapes, shuffles, splits, windows and
    heads need no special case. What is found is then checked by numbers: random units are zeroed in a float64 copy with
    random biases and statistics, sliced off, and the outputs compared; layers that fail are rejected with the reason.
    The output layer, frozen layers and layers whose units would change the outputs are rejected. The model is left as
    it was.

    Args:
        model: Any module; a LightningModule with a `forward` too.
        example_inputs: A tensor for `model(x)`, a tuple for `model(*args)`, a mapping for `model(**kwargs)`. One small
            sample will do.
        include: Shell patterns on layer or parameter names: only groups with a producing layer among them.
        exclude: Shell patterns of layers that must stay whole: no group with any slice of them.
        exact: Whether to keep only groups whose removal changes no output. False adds those whose units
            meet a LayerNorm or other statistics over units (the residual stream of transformers), marked `exact=False`.
        max_seconds: Give up after that.
        max_gigabytes: Give up when the activations and labels of the example take more.

    Returns:
        The groups; `rejected` holds the reasons for the other layers.

    Raises:
        PruneError: If the model does not run on the example, no group is found, an output layer is asked for, a pattern
            matches nothing, or tracing takes too long or too much memory.

    Source:
        Fang et al., DepGraph: towards any structural pruning, for the notion of groups; Chen et al., OTO, for
        zero-invariant groups. Divergence: units are found from the elements that operators move, not from a graph of layers
        with hand-written dependencies; whole heads, grouped-query attention, channel shuffles and windows follow from it.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
    >>> trace_groups(net, torch.randn(1, 3, 8, 8)).sizes
    {'0': 8}
    """
    args, kwargs = as_call(example_inputs)
    _check_patterns(model, include, exclude)
    deadline = time.monotonic() + max_seconds
    with untouched(model):
        ledger, macs, samples = label(model, args, kwargs, deadline, max_gigabytes)
    groups = assemble(model, ledger, {k: v // samples for k, v in macs.items()}, include, exclude, exact)
    if len(groups):
        groups = keep_exact(model, groups, args, kwargs, deadline)
    if not len(groups):
        reasons = [f"{layer}: {why}" for layer, why in list(groups.rejected.items())[:4]]
        raise PruneError(
            f"Expected at least one layer whose units can leave; found none ({'; '.join(reasons) or 'no layer ran'}). "
            "Pass exact=False for groups whose removal changes outputs, unfreeze layers, or widen `include` and `exclude`."
        )
    return groups


def label(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], deadline: float, max_gigabytes: float
) -> tuple[Ledger, dict[str, int], int]:
    """Run the model until its labels do not change any more.

    Args:
        model: The module, in evaluation mode.
        args: Positional arguments.
        kwargs: Keyword arguments.
        deadline: When to give up, by `time.monotonic`.
        max_gigabytes: Limit of memory.

    Returns:
        The ledger, multiply-accumulates by parameter name, and the number of samples.

    Raises:
        PruneError: If the model does not run, or a limit is reached.
    """
    ledger = Ledger(model)
    rules = Rules(ledger)
    with ExitStack() as stack:
        stack.enter_context(plain_attention())
        stack.enter_context(torch.no_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        in_training = False
        for _ in range(_PASSES):
            ledger.pins.clear()
            trace = _Trace(rules, deadline, max_gigabytes * 1e9)
            try:
                trace.run(model, args, kwargs)
            except PruneError:
                raise
            except Exception as error:
                raise PruneError(
                    f"Expected {type(model).__name__} to run on the example inputs; found {type(error).__name__}: "
                    f"{str(error)[:300]}{trace.where()}. Pass what its forward takes; a part that cannot be traced can be "
                    "named in `exclude` or traced apart."
                ) from error
            in_training = in_training or bool(ledger.idle())
            if in_training:  # auxiliary heads run in training alone, and read what is to be sliced
                with suppress(Exception):
                    _Trace(rules, deadline, max_gigabytes * 1e9).run(model.train(), args, kwargs)
                model.eval()
            if not ledger.settle():
                if rules.orbits:
                    break
                rules.orbits = True
    return ledger, trace.macs, max(_samples((*args, *kwargs.values())), 1)


def _samples(values: tuple[Any, ...]) -> int:
    """Count the samples of a batch: the length of the first tensor, or of a list of them."""
    first = next((v for v in values if isinstance(v, (Tensor, list, tuple))), None)
    return 1 if first is None or (isinstance(first, Tensor) and not first.ndim) else len(first)


class _Trace(TorchDispatchMode):
    """Follow the labels of one run."""

    def __init__(self, rules: Rules, deadline: float, memory: float) -> None:
        super().__init__()
        self.rules = rules
        self.deadline, self.memory = deadline, memory
        self.known: dict[int, tuple[Tensor, Tensor | Reference]] = {}  # holds the tensors: an id stays theirs
        self.storages: dict[int, int] = {}
        self.macs: dict[str, int] = {}
        self.last = ""

    def run(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run a model once; what it returns stays."""
        with self:
            out = model(*args, **kwargs)
        for tensor in tensors_of(out):
            self.rules.ledger.pin(self.rules.ledger.labels(self.of(tensor)), "it reaches the output of the model")

    def of(self, tensor: Tensor) -> Tensor | Reference:
        if id(tensor) in self.known:
            return self.known[id(tensor)][1]
        name = self.rules.ledger.names.get(id(tensor))
        return self.rules.constant(tensor.shape) if name is None else self.rules.ledger.refer(name)

    def where(self) -> str:
        return f" after the operator {self.last}" if self.last else ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.last = func._schema.name.partition("::")[2]
        self.count(args, out)
        found = self.rules(func, args, kwargs, out, self.of)
        for tensor, labels in zip(_flat(out), _flat(found), strict=True):
            if isinstance(tensor, Tensor) and labels is not None:
                self.known[id(tensor)] = (tensor, labels)
                self.storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
                if isinstance(labels, Tensor):
                    self.storages[labels.untyped_storage().data_ptr()] = labels.untyped_storage().nbytes()
        self.guard()
        return out

    def count(self, args: Any, out: Any) -> None:
        """Count the multiply-accumulates of weights."""
        if self.last not in ("convolution", "_convolution", "mm", "addmm", "bmm", "baddbmm"):
            return
        for tensor in args[:3]:
            weight = self.of(tensor) if isinstance(tensor, Tensor) else None
            if isinstance(weight, Reference) and tensor.ndim > 1:
                if "convolution" in self.last:
                    positions = (args[0] if args[6] else out).numel() // (args[0] if args[6] else out).shape[1]
                else:
                    positions = out.numel() // tensor.shape[-1 if tensor is args[-1] else -2]
                self.macs[weight.name] = self.macs.get(weight.name, 0) + tensor.numel() * positions

    def guard(self) -> None:
        used = sum(self.storages.values()) if len(self.storages) % 16 == 0 else 0
        if time.monotonic() > self.deadline or used > self.memory:
            limit = "max_gigabytes" if used > self.memory else "max_seconds"
            raise PruneError(
                f"Expected tracing to stay within {limit}; found more needed at the operator {self.last} ({used / 1e9:.1f} GB). "
                "Trace one small sample (fewer pixels or tokens), or raise the limit."
            )


def _flat(value: Any) -> list[Any]:
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in _flat(item)]
    return [value]


def _check_patterns(model: nn.Module, include: Sequence[str] | None, exclude: Sequence[str] | None) -> None:
    names = [n for n, _ in model.named_modules() if n] + [n for n, _ in model.named_parameters()]
    for field, patterns in (("include", include), ("exclude", exclude)):
        if isinstance(patterns, str):
            raise PruneError(
                f"Expected {field} to be a list of patterns; found the string {patterns!r}. Put it in a list."
            )
        for pattern in patterns or ():
            if not any(fnmatchcase(name, pattern) for name in names):
                close = difflib.get_close_matches(pattern, names, 1)
                hint = f"Did you mean {close[0]!r}?" if close else "Look at the names in `model.named_modules()`."
                raise PruneError(f"Expected {field} to match a layer; found none for {pattern!r}. {hint}")
