"""Parameters and multiply-accumulate operations."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pl_prune.core.masks import MaskSet
from pl_prune.core.sandbox import untouched
from pl_prune.core.select import is_layer


@dataclass(frozen=True)
class Cost:
    """The cost of a whole network, pruned parameters counted as absent.

    Masked weights save neither time nor memory on ordinary hardware: these are counts, not measurements.

    Args:
        params: All parameters of the model, norms, biases and unpruned layers included.
        params_kept: The same without the pruned entries.
        macs: Multiply-accumulates of linear, convolution and attention-projection layers, for one sample.
        macs_kept: The same without those of pruned entries.
    """

    params: int
    params_kept: int
    macs: int
    macs_kept: int


def measure_cost(model: nn.Module, masks: MaskSet, run: Callable[[], object], samples: int) -> Cost:
    """Count parameters and MACs over one forward pass.

    Args:
        model: The network.
        masks: What is kept.
        run: Executes the network on one batch.
        samples: How many samples that batch holds.

    Returns:
        Whole-model counts.
    """
    macs = layer_macs(model, run)
    total = sum(p.numel() for p in model.parameters())
    density = {name: kept / max(size, 1) for name, (kept, size) in masks.counts().items()}
    pruned = sum(size - kept for kept, size in masks.counts().values())
    kept_macs = sum(n * density.get(name, 1.0) for name, n in macs.items())
    return Cost(total, total - pruned, sum(macs.values()) // samples, round(kept_macs / samples))


def layer_macs(model: nn.Module, run: Callable[[], object]) -> dict[str, int]:
    """Count the multiply-accumulates that every weight takes part in.

    Products between activations (attention scores) are not counted.

    Args:
        model: The network.
        run: Executes it once.

    Returns:
        MACs by parameter name, for the whole batch; layers that did not run are absent.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    macs: dict[str, int] = {}

    def add(weight: Tensor | None, positions: float) -> None:
        if weight is not None and id(weight) in names:
            name = names[id(weight)]
            macs[name] = macs.get(name, 0) + round(weight.numel() * positions)

    def after_layer(module: nn.Module, inputs: Any, output: Tensor) -> None:
        transposed = isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))
        counted = inputs[0] if transposed else output
        channels = (
            counted.shape[-1]
            if isinstance(module, nn.Linear)
            else module.in_channels
            if transposed
            else module.out_channels
        )
        add(module.weight, counted.numel() // channels)  # type: ignore[arg-type, operator]

    def after_attention(module: nn.MultiheadAttention, inputs: Any, keywords: dict[str, Any], _: Any) -> None:
        query, key, value = [
            inputs[i] if len(inputs) > i else keywords[k] for i, k in enumerate(("query", "key", "value"))
        ]
        tokens = [x.numel() // x.shape[-1] for x in (query, key, value)]
        if module.in_proj_weight is not None:
            add(module.in_proj_weight, sum(tokens) / 3)  # a third of its rows works on each of query, key and value
        for weight, positions in zip(
            (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight), tokens, strict=True
        ):
            add(weight, positions)
        add(module.out_proj.weight, tokens[0])

    fast = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(untouched(model))
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        torch.backends.mha.set_fastpath_enabled(False)
        for module in model.modules():
            if isinstance(module, nn.MultiheadAttention):
                stack.enter_context(module.register_forward_hook(after_attention, with_kwargs=True))
            elif is_layer(module):
                stack.enter_context(module.register_forward_hook(after_layer))
        run()
    return macs
