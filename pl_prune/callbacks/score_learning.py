"""`ScoreLearning`: masks that are learned over weights that stand still."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from pl_prune.adversarial.score_state import Scored
from pl_prune.adversarial.scored import ScoredWeights
from pl_prune.adversarial.scored_units import ScoredUnits
from pl_prune.adversarial.scores import HYDRA, ScoreLearner, neutral_norms
from pl_prune.callbacks.best_scores import BestScores, batch_loss, held_out_accuracy, refuse_stepping, standing_still
from pl_prune.callbacks.bridge import Bridge
from pl_prune.callbacks.channels import Channels
from pl_prune.callbacks.learned_masks import LearnedMasks
from pl_prune.callbacks.report import run_folder
from pl_prune.core.masks import MaskSet
from pl_prune.core.select import Select
from pl_prune.core.types import check_choice, check_sparsity, check_type, describe, plain

Best = Literal["last", "held_out", "batch_loss"]


class ScoreLearning(LearnedMasks):
    """Learn which weights of a trained network to keep, by the module's own loss and optimizer.

    The selected weights hold w0 * M(s) and do not move; around each step the optimizer finds the scores s in their place, so learning
    rate, momentum and weight decay are those of the scores. Norms go on training (with `RLTH` they do not), everything
    else stands still. At the end the module holds the pruned network; `PruneAtInit(masks=...)` fine-tunes it.

    Beside `AdversarialTraining` the loss is the robust one; without it this is clean pruning.

    Args:
        sparsity: Fraction of the selected parameters to prune, in [0, 1).
        learner: How scores begin and how many weights each layer keeps.
        select: Which parameters have scores; first and output layer too by default, as in the papers.
        channels: Score whole channels, hidden units and heads in the place of weights; None: weights. `select` is of no
            meaning then.
        best: Which scores are taken in the end: the "last"; those of highest `val/robust_acc` ("held_out", which
            `RobustnessEvaluation(every_n_epochs=1)` logs); or those with which a batch's loss was lowest ("batch_loss"; in S2AP
            that of the moved network). The last two also write the network to `best.ckpt` in the run's folder.
        seed: Of what the learner draws.
        name: Tells several callbacks of this class apart.

    Attributes:
        scored: Weights and scores; None outside a fit.
        groups: The units that have scores, with `channels`; None before they are traced.

    Raises:
        PruneError: If an argument is not of its kind.

    Source:
        See `HYDRA`, `HARP` and `RLTH`; `best="batch_loss"` is S2AP, algorithm 1, lines 12 to 14.
    """

    normalize_update = False  # S2AP may

    def __init__(
        self,
        sparsity: float = 0.9,
        learner: ScoreLearner = HYDRA(),
        select: Select = Select(output_layer=True),
        channels: Channels | None = None,
        best: Best = "last",
        seed: int = 0,
        name: str | None = None,
    ) -> None:
        super().__init__(select, name)
        if channels is not None:
            check_type("channels", channels, Channels, "for example pl_prune.Channels(target='macs')")
        check_sparsity(sparsity)
        check_type("learner", learner, ScoreLearner, "for example pl_prune.HYDRA()")
        check_choice("best", best, ("last", "held_out", "batch_loss"))
        self.sparsity, self.learner, self.best, self.seed = sparsity, learner, best, seed
        self.channels = channels
        self._finished = False

    @property
    def method(self) -> str:
        """Learner and sparsity."""
        best = "" if self.best == "last" else f", best by {self.best}"
        of = f" of {self.channels.target}, {describe(self.channels)}" if self.channels else ""
        return f"{describe(self.learner)} at sparsity {self.sparsity}{of}{best}, seed {self.seed}"

    def make_masks(self, bridge: Bridge) -> MaskSet:
        """Begin: scores, and the masks that they make.

        Args:
            bridge: The module, its data and its loss.

        Returns:
            The same masks on every rank.
        """
        self._kept, self._best = None, BestScores()
        self.groups = self.channels.trace(bridge) if self.channels else None
        with bridge.undone_on_error(weights=True):
            scored = self._begin(bridge, bridge.selected())
            if not self.learner.trains_norms:
                neutral_norms(bridge.pl_module)
        self._kept = scored.state_dict()
        masks = scored.masks()
        kept = f"{sum(scored.counts.values()):,} of {sum(s.numel() for s in scored.scores.values()):,}"
        rank_zero_info(f"{self.state_key}: {self.method}: {kept} kept.")
        return masks

    def _begin(self, bridge: Bridge, names: Iterable[str]) -> Scored:
        params = {plain(name): p for name, p in bridge.pl_module.named_parameters()}
        if self.channels is not None:
            assert self.groups is not None
            return self.channels.begin(self.groups, params, self.learner, self.sparsity, self._kept)
        selected = {plain(name): params[plain(name)] for name in names}
        return ScoredWeights(selected, self.learner, self.sparsity, self.seed, self._kept)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Tell the scores of a new epoch.

        Args:
            trainer: The trainer.
            pl_module: The module.
            batch: The batch to come.
            batch_idx: Its number.
        """
        assert self.scored is not None
        if batch_idx == 0:
            self.scored.begin_epoch(trainer.current_epoch)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Let the optimizer see scores and their gradients, before they are clipped.

        Args:
            trainer: The trainer.
            pl_module: The module.
            optimizer: The optimizer about to step.
        """
        assert self.scored is not None
        for p in self._frozen:
            p.grad = None
        self.scored.enter(optimizer, self.normalize_update)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Look whether the scores of this batch are the best.

        Args:
            trainer: The trainer.
            pl_module: The module.
            loss: The loss of the batch.
        """
        if self.best == "batch_loss" and self.scored is not None:
            self._best.compare(-batch_loss(loss), self.scored, pl_module, trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Put w0 * M(s) back where it is not: a step was skipped, or is still to come.

        Args:
            trainer: The trainer.
            pl_module: The module.
            outputs: What the step returned.
            batch: The batch.
            batch_idx: Its number.
        """
        assert self.scored is not None
        self.scored.undo()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put w0 * M(s) back where an epoch has ended before its last batch.

        Args:
            trainer: The trainer.
            pl_module: The module.
        """
        assert self.scored is not None
        self.scored.undo()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look whether these scores are the best.

        Args:
            trainer: The trainer.
            pl_module: The module.
        """
        if self.best == "held_out" and not trainer.sanity_checking and self.scored is not None:
            accuracy = held_out_accuracy(trainer)
            if accuracy is not None:
                self._best.compare(accuracy, self.scored, pl_module, trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the best scores, with the norms that they had.

        Args:
            trainer: The trainer.
            pl_module: The module.
        """
        self._finish(pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the network of the best scores, and the smaller one.

        Args:
            trainer: The trainer.
            pl_module: The module.
        """
        self._finish(pl_module)  # of a fit that was resumed when nothing was left to train
        if self._best.held and trainer.logger is not None and not trainer.fast_dev_run:
            trainer.save_checkpoint(run_folder(trainer) / "best.ckpt", weights_only=True)
        if self.channels and self.groups and self._masks and self._settled:
            self.channels.write(trainer, pl_module, self._masks, self.groups)

    def _finish(self, pl_module: LightningModule) -> None:
        if self._finished or self.scored is None:
            return
        self._finished = True
        if self._best.held:
            step = self._best.held["step"]
            rank_zero_info(f"{self.state_key}: scores of step {step} are taken, the best by {self.best}.")
            self._best.take(self.scored, pl_module)
        elif self.best != "last":
            rank_zero_warn(
                f"{self.state_key}: nobody measured what best={self.best!r} decides by; the last scores are taken."
            )
        self.scored.check_finite()
        if self.channels and self.groups and isinstance(self.scored, ScoredUnits):
            self._masks, self._settled = self.channels.finish(self.scored, pl_module), True
            rank_zero_info(f"\n{self.groups.report(self.scored.keep())}")
            return
        rank_zero_info(f"{self.state_key}: {self.method}: sparsity {self.scored.masks().sparsity():.6f}.")
        if self.keep_scores is not None:
            scores = {self._names[name]: s.abs() for name, s in self.scored.scores.items()}
            about = {"rounds": 1, "layerwise_only": True, "select": self.select, "source": "the training"}
            self.keep_scores(scores, {"method": self.method, "criterion": self.learner, **about})

    def _put_in_force(self, bridge: Bridge, masks: MaskSet, fresh: bool) -> None:
        """Step scores from now on."""
        trainer, pl_module = bridge.trainer, bridge.pl_module
        self._let_go()
        self._settled = self._finished = False
        self._names = {plain(name): name for name, _ in pl_module.named_parameters()}
        self.scored = scored = self._begin(bridge, masks)
        self._kept = self._masks = None  # `scored` has them
        refuse_stepping(trainer, scored.params, self.channels is not None)
        self._frozen = standing_still(pl_module, scored.params.values(), self.learner)
        for optimizer in trainer.optimizers:
            self._handles.append(optimizer.register_step_post_hook(lambda stepped, *_: scored.leave(stepped)))
