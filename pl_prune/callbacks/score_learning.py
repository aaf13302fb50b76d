"""`ScoreLearning`: masks that are learned over weights that stand still."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from pl_prune.adversarial.score_state import Scored
from pl_prune.adversarial.scored import ScoredWeights
from pl_prune.adversarial.scored_units import ScoredUnits
from pl_prune.adversarial.scores import HYDRA, ScoreLearner, neutral_norms
from pl_prune.callbacks.base import PruningCallback
from pl_prune.callbacks.best_scores import BestScores, held_out_accuracy, refuse_steps, standing_still
from pl_prune.callbacks.bridge import Bridge
from pl_prune.callbacks.channels import Channels
from pl_prune.callbacks.report import run_folder
from pl_prune.callbacks.state import renamed
from pl_prune.core.groups import ParameterGroups
from pl_prune.core.masks import MaskSet
from pl_prune.core.samples import Samples
from pl_prune.core.select import Select
from pl_prune.core.types import check_choice, check_sparsity, check_type, describe, plain

Best = Literal["last", "held_out", "batch_loss"]


class ScoreLearning(PruningCallback):
    """Learn which weights of a trained network to keep, by the module's own loss and optimizer.

    The selected weights hold w0 * M(s) and do not move; around each step the optimizer finds the scores s in their place, so learning
    rate, momentum and weight decay are those of the scores. Norms go on training (with `RLTH` they do not), everything
    else stands still. At the end the module holds the pruned network; `PruneAtInit(masks=...)` fine-tunes it.

    Beside `AdversarialTraining` the loss is the robust one; without it this is clean pruning.

    Args:
        sparsity: Fraction of the selected parameters to prune, in [0, 1).
        learner: How scores begin and how many weights each layer keeps.
        select: Which parameters have scores; first and output layer too by default, as in the papers.
        channels: Score whole channels, hidden units and heads in the place of weights; None: weights. `select` is of no meaning then.
        best: Which scores are taken in the end: the "last"; those of highest `val/robust_acc` ("held_out", which
            `RobustnessEvaluation(every_n_epochs=1)` logs); or those of the lowest loss of a batch ("batch_loss"). The last two also
            write the network to `best.ckpt` in the run's folder.
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
        super().__init__(select, Samples(), name)
        if channels is not None:
            check_type("channels", channels, Channels, "for example pl_prune.Channels(target='macs')")
        check_sparsity(sparsity)
        check_type("learner", learner, ScoreLearner, "for example pl_prune.HYDRA()")
        check_choice("best", best, ("last", "held_out", "batch_loss"))
        self.sparsity, self.learner, self.best, self.seed = sparsity, learner, best, seed
        self.channels = channels
        self.groups: ParameterGroups | None = None
        self.scored: Scored | None = None
        self._kept: dict[str, Any] | None = None  # the state of `scored` between fits
        self._best = BestScores()
        self._frozen: list[torch.nn.Parameter] = []
        self._names: dict[str, str] = {}
        self._handles: list[RemovableHandle] = []
        self._settled = False  # units that are out are zero, and masks say so

    @property
    def method(self) -> str:
        """Learner and sparsity."""
        best = "" if self.best == "last" else f", best by {self.best}"
        of = f" of {self.channels.target}, {describe(self.channels)}" if self.channels else ""
        return f"{describe(self.learner)} at sparsity {self.sparsity}{of}{best}, seed {self.seed}"

    @property
    def units(self) -> tuple[ParameterGroups, MaskSet] | None:
        """The groups, and which of their units are left, where units have scores."""
        if self.groups is None or self._masks is None:
            return None
        kept = self.scored.keep() if isinstance(self.scored, ScoredUnits) else self.groups.collapse(self._masks)
        return self.groups, MaskSet({root: mask.cpu() for root, mask in kept.items()})

    @property
    def masks(self) -> MaskSet | None:
        """M(s) as it is now; None before the fit."""
        if self.scored is None or self._settled:
            return self._masks
        return renamed(self.scored.masks(), self._names.__getitem__)

    @masks.setter
    def masks(self, masks: MaskSet | None) -> None:
        self._masks = masks

    def progress(self) -> dict[str, Any]:
        """Return weights, scores and what is best so far.

        Returns:
            Tensors and plain containers only.
        """
        scored = self._kept if self.scored is None else self.scored.state_dict()
        groups = None if self.groups is None else self.groups.state_dict()
        return {"scored": scored, "best": self._best.held, "groups": groups}

    def resume(self, state: dict[str, Any]) -> None:
        """Take them back.

        Args:
            state: The whole state of this callback.
        """
        self._kept, self._best = dict(state["scored"]), BestScores(state["best"])
        self.groups = None if state["groups"] is None else ParameterGroups.from_state_dict(state["groups"])

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

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Put weights back where a step was skipped, and look whether this batch is the best.

        Args:
            trainer: The trainer.
            pl_module: The module.
            outputs: What the step returned.
            batch: The batch.
            batch_idx: Its number.
        """
        assert self.scored is not None
        if self.scored.entered:
            self.scored.undo()
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if self.best == "batch_loss" and isinstance(loss, Tensor):
            self._best.compare(-float(loss.detach()), self.scored, pl_module, trainer.global_step)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look whether these scores are the best.

        Args:
            trainer: The trainer.
            pl_module: The module.
        """
        if self.best == "held_out" and not trainer.sanity_checking and self.scored is not None:
            self._best.compare(held_out_accuracy(trainer), self.scored, pl_module, trainer.global_step)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write w0 * M(s) into the checkpoint, whatever the module holds at the moment.

        Args:
            trainer: The trainer.
            pl_module: The module.
            checkpoint: The whole checkpoint.
        """
        if self.scored is not None and (self.scored.moved or self.scored.entered):
            held = self.scored.kept_weights()
            state = checkpoint["state_dict"]
            state.update({name: held[plain(name)] for name in state if plain(name) in held})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the best scores, with the norms that they had.

        Args:
            trainer: The trainer.
            pl_module: The module.
        """
        assert self.scored is not None
        self.scored.check_finite()
        if self._best.held:
            step = self._best.held["step"]
            rank_zero_info(f"{self.state_key}: scores of step {step} are taken, the best by {self.best}.")
            self._best.take(self.scored, pl_module)
        if self.channels and self.groups and isinstance(self.scored, ScoredUnits):
            self._masks, self._settled = self.channels.finish(self.scored, pl_module), True
            rank_zero_info(f"\n{self.groups.report(self.scored.keep())}")
            return
        rank_zero_info(f"{self.state_key}: {self.method}: sparsity {self.scored.masks().sparsity():.6f}.")
        if self.keep_scores is not None:
            scores = {self._names[name]: s.abs() for name, s in self.scored.scores.items()}
            about = {"rounds": 1, "layerwise_only": True, "select": self.select, "source": "the training"}
            self.keep_scores(scores, {"method": self.method, "criterion": self.learner, **about})

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the network of the best scores.

        Args:
            trainer: The trainer.
            pl_module: The module.
        """
        if self._best.held and trainer.logger is not None and not trainer.fast_dev_run:
            trainer.save_checkpoint(run_folder(trainer) / "best.ckpt", weights_only=True)
        if self.channels and self.groups and self._masks and self._settled:
            self.channels.write(trainer, pl_module, self._masks, self.groups)

    def __getstate__(self) -> dict[str, Any]:
        kept = self._kept if self.scored is None else self.scored.state_dict()
        gone = {"scored": None, "_handles": [], "_frozen": []}
        return {**super().__getstate__(), **gone, "_kept": kept, "_masks": self.masks}

    def _put_in_force(self, bridge: Bridge, masks: MaskSet, fresh: bool) -> None:
        """Step scores from now on."""
        trainer, pl_module = bridge.trainer, bridge.pl_module
        self._let_go()
        self._settled = False
        self._names = {plain(name): name for name, _ in pl_module.named_parameters()}
        self.scored = scored = self._begin(bridge, masks)
        refuse_steps(trainer, scored.params)
        self._frozen = standing_still(pl_module, scored.params.values(), self.learner)
        for optimizer in trainer.optimizers:
            self._handles.append(optimizer.register_step_post_hook(lambda stepped, *_: scored.leave(stepped)))

    def _let_go(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _detach(self) -> None:
        if self.scored is not None:
            if not self._settled:
                self.scored.undo()
            self._kept, self._masks = self.scored.state_dict(), self.masks
        self.scored = None
        self._let_go()
        super()._detach()
