"""Which scores are the best, what stands still beside them, and what a trainer that learns them must not be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import isfinite
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn
from torch.optim import LBFGS

from pl_prune.adversarial.score_state import Scored
from pl_prune.adversarial.scores import ScoreLearner
from pl_prune.callbacks.robustness import RobustnessEvaluation
from pl_prune.core import sync
from pl_prune.core.neutral import is_norm
from pl_prune.core.types import PruneError, plain
from pl_prune.optim.units import stepped


class BestScores:
    """Keep the best scores so far, and the norms and buffers that were trained beside them.

    Args:
        held: What an earlier one held; None: nothing yet.

    Attributes:
        held: Value, step, scores and the rest of the module; None: nothing yet.
    """

    def __init__(self, held: dict[str, Any] | None = None) -> None:
        self.held = held

    def compare(self, value: float, scored: Scored, pl_module: LightningModule, step: int) -> None:
        """Keep these scores if they are better than those held.

        Args:
            value: How good they are.
            scored: The scores.
            pl_module: Their module.
            step: When.
        """
        if isfinite(value) and (self.held is None or value > self.held["value"]):
            module = {n: t.clone() for n, t in pl_module.state_dict().items() if plain(n) not in scored.params}
            self.held = {"value": value, "step": step, "scored": scored.snapshot(), "module": module}

    def take(self, scored: Scored, pl_module: LightningModule) -> None:
        """Put what is held back in place.

        Args:
            scored: The scores.
            pl_module: Their module.
        """
        assert self.held is not None
        pl_module.load_state_dict(self.held["module"], strict=False)
        scored.restore(self.held["scored"])


def held_out_accuracy(trainer: Trainer) -> float | None:
    """Return what was measured on the validation set.

    Args:
        trainer: The trainer, after a validation.

    Returns:
        Accuracy under attack; None where it is measured, but not this time.

    Raises:
        PruneError: If nobody measures it.
    """
    if "val/robust_acc" in trainer.callback_metrics:
        return float(trainer.callback_metrics["val/robust_acc"])
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if any(isinstance(cb, RobustnessEvaluation) and cb.every_n_epochs for cb in callbacks):
        return None
    raise PruneError(
        f"Expected val/robust_acc, by which best='held_out' decides; found {sorted(trainer.callback_metrics)}. "
        "Add RobustnessEvaluation(preset='pgd', every_n_epochs=1) to the callbacks."
    )


def batch_loss(loss: Tensor) -> float:
    """Return the loss of a batch.

    Args:
        loss: That of this rank.

    Returns:
        The mean over ranks.
    """
    total = loss.detach().clone()
    sync.sum_([total])
    return float(total) / sync.rank_and_size()[1]


def refuse_stepping(trainer: Trainer, params: Mapping[str, nn.Parameter], alone: bool) -> None:
    """Raise where scores could not be stepped in the place of weights.

    Args:
        trainer: The trainer.
        params: The parameters that have scores.
        alone: Whether one optimizer has to step all of them.

    Raises:
        PruneError: If weights are averaged, an optimizer moves weights within its steps or unscales gradients there, or a
            parameter is stepped by none, or by others than the rest where all need one.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, (WeightAveraging, StochasticWeightAveraging)):
            raise PruneError(
                f"Expected no averaging of weights while scores are learned, since weights stand still; found {type(callback).__name__}. "
                "Use it in fine-tuning."
            )
    scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
    for optimizer in trainer.optimizers:
        if scaled and getattr(optimizer, "_step_supports_amp_scaling", False):
            raise PruneError(
                f"Expected an optimizer whose gradients are unscaled before its step; found a fused {type(optimizer).__name__} under a "
                "GradScaler. Set fused=False, or train with precision 'bf16-mixed'."
            )
        if isinstance(optimizer, LBFGS):
            raise PruneError(
                "Expected an optimizer that evaluates the loss once a step; found LBFGS, which moves weights within its steps. "
                "Use SGD or Adam."
            )
    if alone and len(found := stepped(params, trainer.optimizers)) > 1 and sum(map(bool, found)) > 1:
        raise PruneError(
            f"Expected one optimizer for all parameters that have scores; found {sum(map(bool, found))}. Give them to one, score weights "
            "in the place of channels, or take perturbation='gradient'."
        )
    held = {id(p) for o in trainer.optimizers for group in o.param_groups for p in group["params"]}
    idle = [name for name, p in params.items() if id(p) not in held or not p.requires_grad]
    if idle and trainer.optimizers:
        raise PruneError(
            f"Expected optimizers that step every parameter that has scores; found none for {idle[:5]} ({len(idle)} in all). "
            "Give them to the optimizer, let them train, or leave them out with select.exclude."
        )


def standing_still(pl_module: nn.Module, params: Iterable[nn.Parameter], learner: ScoreLearner) -> list[nn.Parameter]:
    """Return the parameters that do not train while scores are learned.

    Args:
        pl_module: The module.
        params: Its parameters that scores are stepped in the place of.
        learner: Says whether norms train.

    Returns:
        All others.
    """
    training = {id(p) for p in params}
    if learner.trains_norms:
        training |= {id(p) for m in pl_module.modules() if is_norm(m) for p in m.parameters(recurse=False)}
    return [p for p in pl_module.parameters() if id(p) not in training]
