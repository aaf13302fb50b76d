"""Which scores are the best, what stands still beside them, and what a trainer that learns them must not be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import nn
from torch.optim import LBFGS

from pl_prune.adversarial.score_state import Scored
from pl_prune.adversarial.scores import ScoreLearner
from pl_prune.core.neutral import is_norm
from pl_prune.core.types import PruneError, plain


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
        if self.held is None or value > self.held["value"]:
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


def held_out_accuracy(trainer: Trainer) -> float:
    """Return what was measured on the validation set.

    Args:
        trainer: The trainer, after a validation.

    Returns:
        Accuracy under attack.

    Raises:
        PruneError: If nobody measured it.
    """
    if "val/robust_acc" not in trainer.callback_metrics:
        raise PruneError(
            f"Expected val/robust_acc, by which best='held_out' decides; found {sorted(trainer.callback_metrics)}. "
            "Add RobustnessEvaluation(preset='pgd', every_n_epochs=1) to the callbacks."
        )
    return float(trainer.callback_metrics["val/robust_acc"])


def refuse_steps(trainer: Trainer, params: Mapping[str, nn.Parameter]) -> None:
    """Raise where scores could not be stepped in the place of weights.

    Args:
        trainer: The trainer.
        params: The parameters that have scores.

    Raises:
        PruneError: If weights are averaged, an optimizer moves weights within its steps, or a parameter is stepped by none.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, (WeightAveraging, StochasticWeightAveraging)):
            raise PruneError(
                f"Expected no averaging of weights while scores are learned, since weights stand still; found {type(callback).__name__}. "
                "Use it in fine-tuning."
            )
    for optimizer in trainer.optimizers:
        if isinstance(optimizer, LBFGS):
            raise PruneError(
                "Expected an optimizer that evaluates the loss once a step; found LBFGS, which moves weights within its steps. "
                "Use SGD or Adam."
            )
    stepped = {id(p) for o in trainer.optimizers for group in o.param_groups for p in group["params"]}
    idle = [name for name, p in params.items() if id(p) not in stepped or not p.requires_grad]
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
