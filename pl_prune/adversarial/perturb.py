"""The perturbation that sharpness-aware steps are taken at: up the gradient, layer by layer within a bound."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pl_prune.core.types import PruneError, check_choice

Mode: TypeAlias = Literal["project", "scale"]


@torch.no_grad()
def perturbation(
    gradients: Mapping[str, Tensor],
    values: Mapping[str, Tensor],
    gamma: float,
    mode: Mode = "project",
    rates: Mapping[str, float] | None = None,
    before: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return what to add to values, so that the loss rises.

    Args:
        gradients: Of the loss, by layer.
        values: What is perturbed, by layer.
        gamma: Bound of each layer's perturbation, as a fraction of the layer's norm.
        mode: "project": a step along the gradient of all layers together, brought to length one, and each layer brought back
            to its bound where it is beyond it; "scale": each layer's own gradient, brought to its bound.
        rates: Length of the step of "project", by layer: the optimizer's learning rate.
        before: The perturbation to step from; None: none.

    Returns:
        By layer; zero everywhere where a gradient is not finite. Nothing waits for the device.

    Source:
        S2AP, algorithm 1, lines 4 to 8 ("project"); Wu et al., Adversarial weight perturbation helps robust generalization, equation 10
        ("scale"). The paper leaves open which norm brings the gradient to length one: here that of all layers together.
    """
    names = list(gradients)
    g = [gradients[name] for name in names]
    lengths = torch.stack(torch._foreach_norm(g))
    total = torch.linalg.vector_norm(lengths)
    tiny = torch.finfo(total.dtype).tiny
    bounds = gamma * torch.stack(torch._foreach_norm([values[name] for name in names]))
    if mode == "scale":
        factors = bounds / lengths.clamp_(min=1e-20)  # far from where the quotient overflows
    else:
        assert rates is not None
        factors = torch.tensor([rates[name] for name in names], dtype=total.dtype).to(total.device)
        factors = factors / total.clamp_(min=tiny)
    finite = torch.isfinite(total)
    moves = {}
    for i, name in enumerate(names):
        move = torch.where(finite, g[i] * factors[i], 0)
        if mode == "project":
            if before is not None:
                move = move + before[name]
            length = torch.linalg.vector_norm(move)
            move *= (bounds[i] / length.clamp_(min=tiny)).clamp_(max=1)
        moves[name] = move
    return moves


def learning_rates(optimizers: Iterable[Optimizer], params: Mapping[str, nn.Parameter]) -> dict[str, float]:
    """Return the learning rate that each parameter is stepped with now.

    Args:
        optimizers: The optimizers.
        params: The parameters, by name.

    Returns:
        By name; 0 for one that no optimizer steps.
    """
    found = {id(p): float(group["lr"]) for o in optimizers for group in o.param_groups for p in group["params"]}
    return {name: found.get(id(p), 0.0) for name, p in params.items()}


def check_perturbation(gamma: float, mode: str, warmup_epochs: int) -> None:
    """Raise unless the settings of a perturbation make sense.

    Args:
        gamma: Its bound.
        mode: Its mode.
        warmup_epochs: Epochs without it.

    Raises:
        PruneError: If one is not of its kind or range.
    """
    if isinstance(gamma, bool) or not isinstance(gamma, (int, float)) or not 0 <= gamma < float("inf"):
        raise PruneError(f"Expected gamma of 0 or more; found {gamma!r}. The paper uses 0.001 to 0.0075.")
    check_choice("mode", mode, ("project", "scale"))
    if isinstance(warmup_epochs, bool) or not isinstance(warmup_epochs, int) or warmup_epochs < 0:
        raise PruneError(
            f"Expected warmup_epochs to be a whole number of 0 or more; found {warmup_epochs!r}. Write 0 for none."
        )
