"""`AWP`: weights that are trained where small changes of them do not hurt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch import Tensor, nn
from torch.optim import Optimizer

from pl_prune.adversarial.perturb import Mode, check_perturbation, learning_rates, perturbation
from pl_prune.callbacks.around_steps import AroundSteps
from pl_prune.callbacks.aside import batch_gradient, refuse_steps, write_into
from pl_prune.callbacks.base import pruning_callbacks
from pl_prune.callbacks.gradual import GradualPruning
from pl_prune.callbacks.refusals import refuse_other_lightning
from pl_prune.callbacks.score_learning import ScoreLearning
from pl_prune.core.masks import MaskSet
from pl_prune.core.types import PruneError, plain


class AWP(Callback):
    """Train weights by their gradient at the worst point nearby: adversarial weight perturbation, on kept weights alone.

    Before a batch is trained on, every parameter of two or more dimensions is moved up the gradient of the batch's loss, at
    most `gamma` times its norm; the step's own passes run there, and the optimizer steps the weights from where they were. Pruned
    weights stay zero. Where gradients are accumulated, the first batch of a window gives the perturbation for all of it. Batch
    norms, metrics, logs and random numbers see the step alone; beside `AdversarialTraining`, adversarial examples are made once for
    both passes.

    Args:
        gamma: Bound of the perturbation, as a fraction of each layer's norm; 0 is training without this callback, bit for bit.
        mode: "project" (S2AP's fine-tuning) or "scale" (AWP as published); see `pl_prune.adversarial.perturb.perturbation`.
        warmup_epochs: Epochs without perturbation.

    Raises:
        PruneError: If an argument is not of its kind.

    Source:
        S2AP, algorithm 2; Wu et al., Adversarial weight perturbation helps robust generalization, algorithm 1. Divergences: weights are
        put back before the optimizer steps, so that weight decay acts on them and not on the perturbed ones; the perturbation starts
        from zero at each step.
    """

    def __init__(self, gamma: float = 0.001, mode: Mode = "project", warmup_epochs: int = 0) -> None:
        check_perturbation(gamma, mode, warmup_epochs)
        self.gamma, self.mode, self.warmup_epochs = gamma, mode, warmup_epochs
        self._held: dict[str, Tensor] = {}  # weights, while perturbed ones are in their place
        self._moved: dict[str, Tensor] = {}  # perturbed ones, between two batches of a step
        self._params: dict[str, nn.Parameter] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what would be scored or learned at perturbed weights.

        Args:
            trainer: The trainer.
            pl_module: The module.

        Raises:
            PruneError: If scores are learned, or masks change behind this callback's back.
        """
        refuse_other_lightning(trainer)
        refuse_steps(pl_module, "AWP")
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        for other in pruning_callbacks(trainer):
            if isinstance(other, ScoreLearning):
                raise PruneError(
                    f"Expected weights that train, under AWP; found {type(other).__name__}, under which they stand still. "
                    "Use S2AP(gamma=...) to learn scores, and AWP in fine-tuning."
                )
            if isinstance(other, AroundSteps):
                raise PruneError(
                    f"Expected weights that nothing else moves around the optimizer's steps, under AWP; found {type(other).__name__}. "
                    "Use AWP in fine-tuning, with PruneAtInit(masks=...)."
                )
            if isinstance(other, GradualPruning) and callbacks.index(other) > callbacks.index(self):
                raise PruneError(
                    "Expected GradualPruning before AWP among the callbacks; found it after, where it would score perturbed weights. "
                    "Swap the two (on a command line, both go into trainer.callbacks)."
                )
        if any(isinstance(other, StochasticWeightAveraging) for other in callbacks):
            raise PruneError(
                "Expected no StochasticWeightAveraging beside AWP; found it, and it renews running statistics by passes that AWP would "
                "take for training. Use EMAWeightAveraging."
            )
        self._held, self._moved = {}, {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Move the weights before the first batch of a step.

        Args:
            trainer: The trainer.
            pl_module: The module.
            batch: The batch to come.
            batch_idx: Its number.
        """
        if not self.gamma or trainer.current_epoch < self.warmup_epochs:
            return
        if self._moved:
            self._held, self._moved = self._exchange(self._moved), {}
            return
        self._params = {plain(name): p for name, p in pl_module.named_parameters() if p.requires_grad and p.ndim > 1}
        gradient = batch_gradient(trainer, pl_module, batch, batch_idx, self._params)
        self._masks(trainer).apply_(gradient)
        values = {name: p.detach() for name, p in self._params.items()}
        moves = perturbation(gradient, values, self.gamma, self.mode, learning_rates(trainer.optimizers, self._params))
        self._held = self._exchange({name: values[name] + moves[name] for name in moves})

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Put the weights back; their gradients are those of the perturbed ones.

        Args:
            trainer: The trainer.
            pl_module: The module.
            optimizer: The optimizer about to step.
        """
        self._put_back()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Put the weights back where the step is still to come.

        Args:
            trainer: The trainer.
            pl_module: The module.
            outputs: What the step returned.
            batch: The batch.
            batch_idx: Its number.
        """
        if self._held:
            self._held, self._moved = {}, self._exchange(self._held)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the weights back where an epoch has ended before its last batch.

        Args:
            trainer: The trainer.
            pl_module: The module.
        """
        self._put_back()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write the weights into the checkpoint, also between two batches of a step.

        Args:
            trainer: The trainer.
            pl_module: The module.
            checkpoint: The whole checkpoint.
        """
        write_into(checkpoint, pl_module, self._held)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Put the weights back.

        Args:
            trainer: The trainer.
            pl_module: The module.
            exception: What was raised.
        """
        self._put_back()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put the weights back.

        Args:
            trainer: The trainer.
            pl_module: The module.
            stage: fit, validate, test or predict.
        """
        self._put_back()
        self._moved, self._params = {}, {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": {}, "_moved": {}, "_params": {}}

    def _masks(self, trainer: Trainer) -> MaskSet:
        found = MaskSet({})
        for callback in pruning_callbacks(trainer):
            if callback.masks is not None:
                found = found.intersect(MaskSet({plain(name): mask for name, mask in callback.masks.items()}))
        return found.subset([name for name in found if name in self._params])

    def _put_back(self) -> None:
        self._exchange(self._held)
        self._held = {}

    @torch.no_grad()
    def _exchange(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Put values in place, and return those that were there."""
        before = {name: self._params[name].detach().clone() for name in values}
        for name, value in values.items():
            self._params[name].copy_(value)
        return before
