"""Robust losses: how a batch is attacked, and what is minimised then."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from pl_prune.adversarial.attacks import PGD, ascend, check_step, random_in_ball
from pl_prune.adversarial.inputs import check_inputs, evaluating, logits_of
from pl_prune.core.types import PruneError, check_count


class RobustLoss(ABC):
    """A loss over a batch and its adversarial examples.

    A robust loss is a frozen dataclass. The supervised part sees the images where `penalised`, and the adversarial
    examples elsewhere; inside Lightning it is the module's own `training_step`.

    Attributes:
        penalised: Whether a penalty compares the logits of images and adversarial examples.
    """

    penalised: ClassVar[bool] = False

    @abstractmethod
    def examples(self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Attack a batch, in evaluation mode.

        Args:
            model: Maps images to logits; its modes are as before at the end, and no gradient is left.
            x: Images (N, ...) in [0, 1].
            y: Labels (N,).
            generator: Of the random start, on the device of `x`.

        Returns:
            Adversarial examples of the shape of `x`.
        """

    def penalty(self, clean: Tensor, adversarial: Tensor) -> Tensor:
        """Compare the logits of images and of their adversarial examples.

        Args:
            clean: Logits (N, classes) of the images.
            adversarial: Logits (N, classes) of their adversarial examples.

        Returns:
            What is added to the supervised loss, a mean over the batch.
        """
        return torch.zeros((), dtype=clean.dtype, device=clean.device)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, adversarial: Tensor) -> Tensor:
        """Return the loss, in the model's present mode.

        Args:
            model: Maps images to logits.
            x: Images (N, ...).
            y: Labels (N,).
            adversarial: Their adversarial examples, from `examples`.

        Returns:
            A mean over the batch.
        """
        if not self.penalised:
            return cross_entropy(model(adversarial), y)
        logits = model(x)
        return cross_entropy(logits, y) + self.penalty(logits, model(adversarial))


@dataclass(frozen=True)
class TRADES(RobustLoss):
    """Cross-entropy of the images, and `beta` times the divergence of the adversarial examples' predictions from theirs.

    L = CE(f(x), y) + beta KL(p(x) || p(x')), where x' maximises the same divergence by projected gradient steps.

    Args:
        eps: Radius of the attack.
        step_size: Length of its steps, at most `eps`.
        steps: Number of its steps.
        beta: Weight of the divergence.
        norm: "linf" or "l2".

    Source:
        Zhang et al., Theoretically principled trade-off between robustness and accuracy, equation 5 and algorithm 1. The
        divergence is a mean over the batch and gradients flow through both of its arguments, as in the authors' code. Divergences, none
        of which changes a value: p(x) is computed once for all steps of the attack and once for the loss, where the authors'
        code computes it in every step and twice in the loss; so batch norms see the images once a step (the
        authors: twice), and dropout draws the same for the loss and the divergence. In l2 the attack is
        projected ascent, where the authors' code runs an optimizer.
    """

    eps: float = 8 / 255
    step_size: float = 2 / 255
    steps: int = 10
    beta: float = 6.0
    norm: Literal["linf", "l2"] = "linf"
    penalised: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_step(self.eps, self.step_size, self.norm, longest=1)
        check_count("steps", self.steps)
        if not 0 <= self.beta < float("inf"):
            raise PruneError(f"Expected beta of 0 or more; found {self.beta!r}. The paper uses 6.")

    def examples(self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Attack a batch: ascend the divergence from what the model says of the images.

        Args:
            model: Maps images to logits.
            x: Images (N, ...) in [0, 1].
            y: Labels (N,); they are checked, and have no influence.
            generator: Of the random start, on the device of `x`.

        Returns:
            Adversarial examples of the shape of `x`.
        """
        highest = check_inputs(x, y)
        with evaluating(model):
            clean = log_softmax(logits_of(model, x, highest).detach(), 1)

            def divergence(moved: Tensor) -> Tensor:
                return kl_div(log_softmax(model(moved), 1), clean, reduction="sum", log_target=True)

            attack = PGD(self.eps, self.step_size, self.steps, self.norm, start="noise")
            return attack.ascend(divergence, x, generator)

    def penalty(self, clean: Tensor, adversarial: Tensor) -> Tensor:
        """Return `beta` times the divergence.

        Args:
            clean: Logits (N, classes) of the images.
            adversarial: Logits (N, classes) of their adversarial examples.

        Returns:
            A mean over the batch.
        """
        clean, adversarial = log_softmax(clean, 1), log_softmax(adversarial, 1)
        return self.beta * kl_div(adversarial, clean, reduction="batchmean", log_target=True)


@dataclass(frozen=True)
class PGDAT(RobustLoss):
    """The supervised loss of adversarial examples that projected gradient steps find.

    Args:
        eps: Radius of the attack.
        step_size: Length of its steps, at most `eps`.
        steps: Number of its steps.
        norm: "linf" or "l2".

    Source:
        Madry et al., Towards deep learning models resistant to adversarial attacks, equation 2.1. Divergence: the attack runs in
        evaluation mode, as that of TRADES.
    """

    eps: float = 8 / 255
    step_size: float = 2 / 255
    steps: int = 10
    norm: Literal["linf", "l2"] = "linf"

    def __post_init__(self) -> None:
        check_step(self.eps, self.step_size, self.norm, longest=1)
        check_count("steps", self.steps)

    def examples(self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Attack a batch by cross-entropy, from a random start in the ball.

        Args:
            model: Maps images to logits.
            x: Images (N, ...) in [0, 1].
            y: Labels (N,).
            generator: Of the random start, on the device of `x`.

        Returns:
            Adversarial examples of the shape of `x`.
        """
        return PGD(self.eps, self.step_size, self.steps, self.norm)(model, x, y, generator)


@dataclass(frozen=True)
class FastAT(RobustLoss):
    """The supervised loss of adversarial examples that one long step from a random start finds.

    Args:
        eps: Radius of the attack.
        step_size: Length of the step, at most 2 `eps`; 1.25 `eps` in the paper.
        norm: "linf" or "l2".

    Source:
        Wong, Rice and Kolter, Fast is better than free, algorithm 3. Divergence: the step is taken in evaluation mode. It
        can overfit to the single step all at once ("catastrophic overfitting"): watch the accuracy under PGD.
    """

    eps: float = 8 / 255
    step_size: float = 10 / 255
    norm: Literal["linf", "l2"] = "linf"

    def __post_init__(self) -> None:
        check_step(self.eps, self.step_size, self.norm, longest=2)

    def examples(self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Attack a batch by one step.

        Args:
            model: Maps images to logits.
            x: Images (N, ...) in [0, 1].
            y: Labels (N,).
            generator: Of the random start, on the device of `x`.

        Returns:
            Adversarial examples of the shape of `x`.
        """
        highest = check_inputs(x, y)
        start = (x.detach() + random_in_ball(x, self.eps, self.norm, generator)).clamp_(0, 1)
        with evaluating(model):
            return ascend(
                lambda moved: cross_entropy(logits_of(model, moved, highest), y, reduction="sum"),
                *(x, start, self.eps, self.step_size, 1, self.norm),
            )


@dataclass(frozen=True)
class CrossEntropy(RobustLoss):
    """The supervised loss of the images alone: the baseline without an attack."""

    def examples(self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return the images.

        Args:
            model: Without influence.
            x: Images (N, ...) in [0, 1].
            y: Labels (N,).
            generator: Without influence.

        Returns:
            The images themselves.
        """
        check_inputs(x, y)
        return x
