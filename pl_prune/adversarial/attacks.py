"""Projected gradient ascent inside a ball and the box [0, 1]."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pl_prune.adversarial.inputs import check_inputs, evaluating, logits_of
from pl_prune.core.types import PruneError, check_choice, check_count, check_positive

_ALIKE: ContextVar[bool] = ContextVar("alike", default=False)


@contextmanager
def alike() -> Iterator[None]:
    """Start all images of a batch from the same draw, so that no image's attack depends on the others of its batch.

    Yields:
        None.
    """
    token = _ALIKE.set(True)
    try:
        yield
    finally:
        _ALIKE.reset(token)


def check_eps(eps: float, norm: str) -> None:
    """Raise unless a radius makes sense in [0, 1].

    Args:
        eps: The radius.
        norm: Its norm.

    Raises:
        PruneError: If it is 0, negative, not a number, or larger than the box.
    """
    check_choice("norm", norm, ("linf", "l2"))
    number = isinstance(eps, (int, float)) and not isinstance(eps, bool)
    if not number or not 0 < eps < float("inf") or (norm == "linf" and eps > 1):
        bound = "in (0, 1]" if norm == "linf" else "above 0"
        raise PruneError(
            f"Expected eps {bound}, the radius of the attack on images in [0, 1]; found {eps!r}. Write 8/255 as 0.03137."
        )


@dataclass(frozen=True)
class PGD:
    """Ascend the loss by projected gradient steps.

    Args:
        eps: Radius of the ball around each image.
        step_size: Length of a step, at most `eps`.
        steps: Number of steps.
        norm: "linf" steps by the gradient's sign, "l2" by the gradient of length one.
        start: "uniform" in the ball, "noise" (normal, of deviation 0.001), or "image".

    Source:
        Madry et al., Towards deep learning models resistant to adversarial attacks, section 2.1; the start "noise" is
        that of Zhang et al. (TRADES). Divergence: the model is in evaluation mode, as in TRADES, where Madry et al. leave it
        in training mode.
    """

    eps: float = 8 / 255
    step_size: float = 2 / 255
    steps: int = 10
    norm: Literal["linf", "l2"] = "linf"
    start: Literal["uniform", "noise", "image"] = "uniform"

    def __post_init__(self) -> None:
        check_step(self.eps, self.step_size, self.norm, longest=1)
        check_count("steps", self.steps)
        check_choice("start", self.start, ("uniform", "noise", "image"))

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Attack images by cross-entropy.

        Args:
            model: Maps images to logits; its modes are as before at the end, and no gradient is left.
            x: Images (N, ...) in [0, 1].
            y: Labels (N,).
            generator: Of the random start, on the device of `x`.

        Returns:
            Images of the same shape, in the ball and in [0, 1].
        """
        highest = check_inputs(x, y)
        with evaluating(model):
            return self.ascend(
                lambda moved: cross_entropy(logits_of(model, moved, highest), y, reduction="sum"), x, generator
            )

    def ascend(self, objective: Callable[[Tensor], Tensor], x: Tensor, generator: torch.Generator | None) -> Tensor:
        """Ascend an objective.

        Args:
            objective: Maps images to a sum over them.
            x: Images (N, ...) in [0, 1].
            generator: Of the random start, on the device of `x`.

        Returns:
            Images of the same shape, in the ball and in [0, 1].
        """
        return ascend(objective, x, self.begin(x, generator), self.eps, self.step_size, self.steps, self.norm)

    def begin(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return where the ascent starts.

        Args:
            x: Images (N, ...) in [0, 1].
            generator: Of the random start, on the device of `x`.

        Returns:
            Images of the same shape; "noise" is not projected before the first step.
        """
        if self.start == "image":
            return x.detach()
        if self.start == "noise":
            return x.detach() + torch.empty_like(_drawn(x)).normal_(std=0.001, generator=generator)
        return (x.detach() + random_in_ball(x, self.eps, self.norm, generator)).clamp_(0, 1)


def check_step(eps: float, step_size: float, norm: str, longest: float) -> None:
    """Raise unless radius and step fit each other.

    Args:
        eps: The radius.
        step_size: The step.
        norm: Their norm.
        longest: The longest step allowed, as a multiple of the radius.

    Raises:
        PruneError: If they do not.
    """
    check_eps(eps, norm)
    check_positive("step_size", step_size)
    if step_size > longest * eps * (1 + 1e-9):
        bound = "eps" if longest == 1 else f"{longest:g} eps"
        raise PruneError(
            f"Expected a step size of at most {bound} = {longest * eps:.4g}, or steps leave the ball; found {step_size:.4g}. "
            "Set step_size to eps / 4 for ten steps, or to 1.25 eps for the one of FastAT."
        )


def random_in_ball(x: Tensor, eps: float, norm: str, generator: torch.Generator | None) -> Tensor:
    """Draw uniformly from a ball.

    Args:
        x: Whose shape, type and device to use (N, ...).
        eps: The radius.
        norm: "linf" or "l2".
        generator: On the device of `x`.

    Returns:
        One draw for each image, or within `alike` one for all (1, ...).
    """
    x = _drawn(x)
    if norm == "linf":
        return torch.empty_like(x).uniform_(-eps, eps, generator=generator)
    direction = _unit(torch.empty_like(x).normal_(generator=generator))
    radius = torch.empty_like(x.flatten(1)[:, 0]).uniform_(generator=generator) ** (1 / x[0].numel())
    return direction * eps * radius.view(-1, *(1 for _ in x.shape[1:]))


def ascend(
    objective: Callable[[Tensor], Tensor], x: Tensor, start: Tensor, eps: float, step_size: float, steps: int, norm: str
) -> Tensor:
    """Take projected gradient steps up; no parameter's `.grad` is touched.

    Args:
        objective: Maps images to a sum over them.
        x: Centres of the balls (N, ...), in [0, 1].
        start: Where to start.
        eps: The radius.
        step_size: The length of a step.
        steps: Their number.
        norm: "linf" or "l2".

    Returns:
        Images in the ball and in [0, 1], detached.
    """
    x, moved = x.detach(), start
    low, high = ((x - eps).clamp_(min=0), (x + eps).clamp_(max=1)) if norm == "linf" else (None, None)
    for _ in range(steps):
        with torch.enable_grad():
            moved = moved.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(objective(moved), moved)
        if norm == "linf":
            moved = moved.detach().add(gradient.sign(), alpha=step_size).clamp_(low, high)
        else:
            away = moved.detach() + step_size * _unit(gradient) - x
            away = away * (eps / _lengths(away).clamp_(min=eps))
            moved = (x + away).clamp_(0, 1)  # x is in the box, so this brings it nearer still
    return moved.detach()


def _drawn(x: Tensor) -> Tensor:
    return x[:1] if _ALIKE.get() else x


def _lengths(x: Tensor) -> Tensor:
    lengths: Tensor = torch.linalg.vector_norm(x.flatten(1), dim=1)
    return lengths.view(-1, *(1 for _ in x.shape[1:]))


def _unit(x: Tensor) -> Tensor:
    return x / _lengths(x).clamp_(min=1e-12)
