"""`S2AP`: scores that are learned where small changes of them do not hurt."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from pl_prune.adversarial.perturb import Mode, check_perturbation, learning_rates, perturbation
from pl_prune.adversarial.score_state import Scored
from pl_prune.adversarial.scores import HYDRA, ScoreLearner
from pl_prune.callbacks.aside import attack, batch_gradient, refuse_steps
from pl_prune.callbacks.best_scores import refuse_stepping
from pl_prune.callbacks.channels import Channels
from pl_prune.callbacks.score_learning import Best, ScoreLearning
from pl_prune.core.select import Select
from pl_prune.core.types import PruneError, check_choice


class S2AP(ScoreLearning):
    """Learn scores by their gradient at the worst point nearby: score-space sharpness-aware pruning.

    Before a batch is trained on, the scores are moved up the gradient of its loss by z, of each layer at most `gamma` times the
    norm of its scores; the step's own forward and backward pass then runs on w0 * M(s + z), and s is stepped by its gradient. Where
    gradients are accumulated, the first batch of a window gives z for all of it. Batch norms, metrics, logs and random numbers see the step
    alone; adversarial examples are made once, for both passes.

    Args:
        sparsity: Fraction of the selected parameters to prune, in [0, 1).
        learner: How scores begin and how many weights each layer keeps; densities that `HARP` learns are not moved.
        gamma: Bound of z, as a fraction of each layer's norm of scores; 0 is plain `ScoreLearning`, bit for bit.
        mode: "project" (as published) or "scale" (each layer exactly at its bound); see
            `pl_prune.adversarial.perturb.perturbation`.
        warmup_epochs: Epochs without perturbation; 5 of 20 in the paper.
        perturbation: "gradient" takes a pass of its own for z; "reuse" takes the gradient of the step before, which costs none.
        perturb: What is moved: "scores", or the "weights" that are kept.
        z_persistent: Go on from the z of the step before, as the published algorithm literally does.
        normalize_update: Bring the gradient of the update to length one, as the published algorithm literally does.
        select: Which parameters have scores; first and output layer too by default, as in the paper.
        channels: Score whole channels in the place of weights; see `Channels`.
        best: Which scores are taken in the end; see `ScoreLearning`.
        seed: Of what the learner draws.
        name: Tells several callbacks of this class apart.

    Raises:
        PruneError: If an argument is not of its kind.

    Source:
        S2AP, algorithm 1; table 12 (`perturb="weights"`). Divergences: z starts from zero at each step (`z_persistent`), the update's
        gradient keeps its length (`normalize_update`), the last scores are taken (`best`), all three as the methods that it
        wraps do; line 11 subtracts z from scores that it was never added to, read as s - eta grad L(s + z). `perturbation="reuse"` is not
        in the paper.
    """

    def __init__(
        self,
        sparsity: float = 0.9,
        learner: ScoreLearner = HYDRA(),
        gamma: float = 0.001,
        mode: Mode = "project",
        warmup_epochs: int = 5,
        perturbation: Literal["gradient", "reuse"] = "gradient",
        perturb: Literal["scores", "weights"] = "scores",
        z_persistent: bool = False,
        normalize_update: bool = False,
        select: Select = Select(output_layer=True),
        channels: Channels | None = None,
        best: Best = "last",
        seed: int = 0,
        name: str | None = None,
    ) -> None:
        super().__init__(sparsity, learner, select, channels, best, seed, name)
        check_perturbation(gamma, mode, warmup_epochs)
        check_choice("perturbation", perturbation, ("gradient", "reuse"))
        check_choice("perturb", perturb, ("scores", "weights"))
        if z_persistent and mode == "scale":
            raise PruneError(
                "Expected z_persistent with mode='project'; found mode='scale', where z is the gradient's direction alone. Leave one out."
            )
        self.gamma, self.mode, self.warmup_epochs = gamma, mode, warmup_epochs
        self.perturbation, self.perturb = perturbation, perturb
        self.z_persistent, self.normalize_update = z_persistent, normalize_update
        self._gradient: dict[str, Tensor] | None = None  # of the step before, where it is used again
        self._z: dict[str, Tensor] | None = None  # of the step before, where it persists
        self._window: dict[str, Tensor] | None = None  # of a step that is still to come

    @property
    def method(self) -> str:
        """Learner, sparsity and perturbation."""
        how = (
            f"{self.perturb} moved by {self.gamma} ({self.mode}, {self.perturbation}) after {self.warmup_epochs} epochs"
        )
        more = [name for name in ("z_persistent", "normalize_update") if getattr(self, name)]
        return ", ".join([super().method, f"S2AP: {how}", *more])

    def progress(self) -> dict[str, Any]:
        """Return weights, scores, and what the next perturbation starts from.

        Returns:
            Tensors and plain containers only.
        """
        return {**super().progress(), "gradient": self._gradient, "z": self._z, "window": self._window}

    def resume(self, state: dict[str, Any]) -> None:
        """Take them back.

        Args:
            state: The whole state of this callback.
        """
        super().resume(state)
        self._gradient, self._z, self._window = state["gradient"], state["z"], state["window"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a module whose loss cannot be had before its step; begin, and warn of a fit that ends with the warm-up.

        Args:
            trainer: The trainer.
            pl_module: The module.
        """
        if self.gamma and self.perturbation == "gradient":
            refuse_steps(pl_module, type(self).__name__)
        if not self._restored:
            self._gradient = self._z = self._window = None
        super().on_fit_start(trainer, pl_module)
        if self.perturbation == "reuse" and self.scored is not None:
            refuse_stepping(trainer, self.scored.params, True)
        for held in (self._gradient, self._z, self._window):
            if held is not None:
                held.update({name: t.to(pl_module.device) for name, t in held.items()})
        epochs = trainer.max_epochs
        if self.gamma and epochs and 0 < epochs <= self.warmup_epochs and not trainer.fast_dev_run:
            rank_zero_warn(
                f"{self.state_key} perturbs nothing: the fit has {epochs} epochs, and warmup_epochs is {self.warmup_epochs}. Lower "
                "it, train longer, or use ScoreLearning."
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Move the scores before the first batch of a step.

        Args:
            trainer: The trainer.
            pl_module: The module.
            batch: The batch to come.
            batch_idx: Its number.
        """
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        scored = self.scored
        assert scored is not None
        if not self.gamma or trainer.current_epoch < self.warmup_epochs:
            return
        if self._window is not None:
            self._put(scored, self._window)
        elif self.perturbation == "gradient":
            gradient = batch_gradient(trainer, pl_module, batch, batch_idx, scored.params)
            if self.perturb == "scores":
                gradient = scored.score_gradients(gradient)
            self._move(trainer, pl_module, scored, gradient)
        elif self._gradient is not None:
            attack(trainer, pl_module, batch)  # the network that is not moved, as in the other case
            self._move(trainer, pl_module, scored, self._gradient)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Let the optimizer see scores and their gradients, and keep these where the next step uses them again.

        Args:
            trainer: The trainer.
            pl_module: The module.
            optimizer: The optimizer about to step.
        """
        scored = self.scored
        assert scored is not None
        self._window = None
        if self.gamma and self.perturbation == "reuse":
            found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in scored.params.items()}
            scores = self.perturb == "scores"
            self._gradient = scored.score_gradients(found) if scores else {n: g.clone() for n, g in found.items()}
        super().on_before_optimizer_step(trainer, pl_module, optimizer)

    def _move(self, trainer: Trainer, pl_module: LightningModule, scored: Scored, gradient: dict[str, Tensor]) -> None:
        rates = learning_rates(trainer.optimizers, scored.carriers if self.perturb == "scores" else scored.params)
        values = scored.scores if self.perturb == "scores" else {n: p.detach() for n, p in scored.params.items()}
        if self.perturb == "weights":
            gradient = {name: g.masked_fill(~scored.kept(name), 0) for name, g in gradient.items()}
        z = perturbation(gradient, values, self.gamma, self.mode, rates, self._z)
        self._z = z if self.z_persistent else None
        self._window = z if trainer.accumulate_grad_batches > 1 or not pl_module.automatic_optimization else None
        self._put(scored, z)

    def _put(self, scored: Scored, z: dict[str, Tensor]) -> None:
        scored.put(z) if self.perturb == "scores" else scored.shift(z)
