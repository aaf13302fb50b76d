"""`LearnedMasks`: scores, weights and masks that travel through checkpoints."""

from __future__ import annotations

from abc import ABC
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.hooks import RemovableHandle

from pl_prune.adversarial.score_state import Scored
from pl_prune.adversarial.scored_units import ScoredUnits
from pl_prune.callbacks.aside import write_into
from pl_prune.callbacks.base import PruningCallback
from pl_prune.callbacks.best_scores import BestScores
from pl_prune.callbacks.state import renamed
from pl_prune.core.groups import ParameterGroups
from pl_prune.core.masks import MaskSet
from pl_prune.core.samples import Samples
from pl_prune.core.select import Select
from pl_prune.core.types import PruneError, check_type, plain


class LearnedMasks(PruningCallback, ABC):
    """Carry scores through checkpoints and from one fit to the next.

    Args:
        select: Which parameters have scores.
        name: Tells several callbacks of this class apart.

    Attributes:
        scored: Weights and scores; None outside a fit.
        groups: The units that have scores, where units have; None before they are traced.
    """

    def __init__(self, select: Select, name: str | None) -> None:
        check_type("select", select, Select, "for example pl_prune.Select(output_layer=True)")
        super().__init__(select, Samples(), name)
        self.groups: ParameterGroups | None = None
        self.scored: Scored | None = None
        self._kept: dict[str, Any] | None = None  # the state of `scored` between fits
        self._best = BestScores()
        self._frozen: list[nn.Parameter] = []
        self._names: dict[str, str] = {}
        self._handles: list[RemovableHandle] = []
        self._settled = False  # units that are out are zero, and masks say so

    @property
    def units(self) -> tuple[ParameterGroups, MaskSet] | None:
        """The groups, and which of their units are left, where units have scores."""
        if self.groups is None or self.masks is None:
            return None
        kept = self.scored.keep() if isinstance(self.scored, ScoredUnits) else self.groups.collapse(self.masks)
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
        return {"scored": scored, "best": self._best.held, "groups": groups, "settled": self._settled}

    def resume(self, state: dict[str, Any]) -> None:
        """Take them back.

        Args:
            state: The whole state of this callback.
        """
        self._kept, self._best = dict(state["scored"]), BestScores(state["best"])
        self.groups = None if state["groups"] is None else ParameterGroups.from_state_dict(state["groups"])
        self._settled = bool(state["settled"])

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on where a checkpoint or the fit before ended, or begin.

        Args:
            trainer: The trainer.
            pl_module: The module.

        Raises:
            PruneError: If a checkpoint is of a fit that has ended, with units that are out zeroed for good.
        """
        if self._restored and self._settled:
            raise PruneError(
                f"Expected a checkpoint from within the fit that {self.state_key} learned in; found one that was saved when it had ended, "
                "with the units that are out zeroed for good. Resume from an earlier one, or fine-tune with PruneAtInit(masks=...)."
            )
        if not self._restored:
            if not self._goes_on(pl_module):
                self.masks = None
            self._best = BestScores()
        super().on_fit_start(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write w0 * M(s) into the checkpoint, whatever the module holds at the moment.

        Args:
            trainer: The trainer.
            pl_module: The module.
            checkpoint: The whole checkpoint.
        """
        if self.scored is not None and (self.scored.moved or self.scored.entered):
            write_into(checkpoint, pl_module, self.scored.kept_weights())

    def __getstate__(self) -> dict[str, Any]:
        kept = self._kept if self.scored is None else self.scored.state_dict()
        gone = {"scored": None, "_handles": [], "_frozen": []}
        return {**super().__getstate__(), **gone, "_kept": kept, "_masks": self.masks}

    def _goes_on(self, pl_module: LightningModule) -> bool:
        """Say whether the module still holds what the fit before left."""
        if self._masks is None or self._kept is None or self._settled:
            return False
        live = {plain(name): p for name, p in pl_module.named_parameters()}
        masks = {plain(name): mask for name, mask in self._masks.items()}
        return all(
            name in live and torch.equal(live[name].detach().cpu(), w0.masked_fill(~masks[name].to(w0.device), 0).cpu())
            for name, w0 in self._kept["weights"].items()
        )

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
