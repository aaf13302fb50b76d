"""`trace_groups`: run a network once and see what leaves together."""

from __future__ import annotations

import difflib
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from pl_prune.core.groups import ParameterGroups
from pl_prune.core.sandbox import untouched
from pl_prune.core.types import PruneError, check_type
from pl_prune.structure.assemble import assemble
from pl_prune.structure.labels import Ledger
from pl_prune.structure.probe import keep_exact
from pl_prune.structure.rules import Rules
from pl_prune.structure.running import Inputs, as_call, plain_attention
from pl_prune.structure.tape import Tape

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
    check_type("model", model, nn.Module, "the network to be traced")
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
    tapes = [Tape(deadline, max_gigabytes * 1e9)]
    with ExitStack() as stack:
        stack.enter_context(plain_attention())
        stack.enter_context(torch.no_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        try:
            tapes[0].record(model, args, kwargs)
            for _ in range(_PASSES):
                ledger.pins.clear()
                tapes[0].follow(rules)
                if len(tapes) == 1 and ledger.idle():  # auxiliary heads, which run in training alone
                    tapes.append(Tape(deadline, max_gigabytes * 1e9))
                    with _as_far_as_it_goes():
                        tapes[1].record(_training(model), args, kwargs)
                    model.eval()
                for tape in tapes[1:]:
                    with _as_far_as_it_goes():
                        tape.follow(rules)
                if not ledger.settle():
                    if rules.orbits:
                        break
                    rules.orbits = True
        except PruneError:
            raise
        except Exception as error:
            where = f" after the operator {tapes[0].last}" if tapes[0].last else ""
            raise PruneError(
                f"Expected {type(model).__name__} to run on the example inputs; found {type(error).__name__}: "
                f"{str(error)[:300]}{where}. Pass what its forward takes; a part that cannot be traced can be "
                "named in `exclude` or traced apart."
            ) from error
    return ledger, tapes[0].macs, max(_samples((*args, *kwargs.values())), 1)


def _training(model: nn.Module) -> nn.Module:
    """Put a model into training, but for batch norms, which refuse a single value."""
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
    return model


@contextmanager
def _as_far_as_it_goes() -> Iterator[None]:
    """Let a run in training end early: it may want targets; limits hold."""
    try:
        yield
    except PruneError:
        raise
    except Exception:
        return


def _samples(values: tuple[Any, ...]) -> int:
    """Count the samples of a batch: the length of the first tensor, or of a list of them."""
    first = next((v for v in values if isinstance(v, (Tensor, list, tuple))), None)
    return 1 if first is None or (isinstance(first, Tensor) and not first.ndim) else len(first)


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
