"""`PruneAtInit`: score once before the first step, prune, train the rest."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from pl_prune.callbacks.base import PruningCallback
from pl_prune.callbacks.bridge import Bridge
from pl_prune.core import sync
from pl_prune.core.allocate import Allocation, Global
from pl_prune.core.criterion import Criterion
from pl_prune.core.initialise import Init
from pl_prune.core.masks import MaskSet
from pl_prune.core.samples import Samples
from pl_prune.core.select import Select
from pl_prune.core.types import PruneError, check_choice, check_sparsity, check_type, describe
from pl_prune.core.warmup import never_ran
from pl_prune.criteria.gradient import SNIP
from pl_prune.report.collapse import find_path
from pl_prune.report.sparsity import layer_sparsity


class PruneAtInit(PruningCallback):
    """Prune a network before its first training step, and train what is left.

    Masks are made in `on_fit_start`, from the weights as they are then (loaded ones too), before the sanity check.
    Scoring leaves the module, the random state and the order of the training batches as they were.

    Args:
        criterion: How to score.
        sparsity: Fraction of the selected parameters to prune, in [0, 1).
        allocation: Where the kept entries go.
        select: Which parameters are prunable.
        samples: Which samples the scores see, for criteria that need data.
        on_layer_collapse: What to do when a layer loses everything, or no input reaches the output: "warn", "raise",
            or "repair" (allocate
            again with one entry kept in each layer, at the same exact count).
        bn_warmup: Whether batch-norm statistics are set to those of the data before scoring: "auto" does so when the
            criterion needs the loss and no batch norm has seen a batch yet.
        warmup_batches: Batches of the loader's own size that the warm-up reads.
        init: Draw the selected weights anew first; None keeps the module's own.
        name: Tells several callbacks of this class apart.

    Raises:
        PruneError: If the sparsity is outside [0, 1), or another argument is not of its kind.
    """

    def __init__(
        self,
        criterion: Criterion = SNIP(),
        sparsity: float = 0.9,
        allocation: Allocation = Global(),
        select: Select = Select(),
        samples: Samples = Samples(),
        on_layer_collapse: Literal["warn", "raise", "repair"] = "warn",
        bn_warmup: Literal["auto", "always", "never"] = "auto",
        warmup_batches: int = 20,
        init: Init | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(select, samples, name)
        check_type("criterion", criterion, Criterion, "for example pl_prune.SNIP()")
        check_type("allocation", allocation, Allocation, "for example pl_prune.ERK()")
        check_type("select", select, Select, "for example pl_prune.Select(exclude=['head'])")
        check_type("samples", samples, Samples, "for example pl_prune.Samples(per_class=10)")
        check_sparsity(sparsity)
        check_choice("on_layer_collapse", on_layer_collapse, ("warn", "raise", "repair"))
        check_choice("bn_warmup", bn_warmup, ("auto", "always", "never"))
        check_choice("init", init, (None, *get_args(Init)))
        self.criterion = criterion
        self.sparsity = sparsity
        self.allocation = allocation
        self.on_layer_collapse = on_layer_collapse
        if warmup_batches < 1:
            raise PruneError(
                f"Expected warmup_batches of 1 or more; found {warmup_batches}. Set bn_warmup='never' to skip it."
            )
        self.bn_warmup = bn_warmup
        self.warmup_batches = warmup_batches
        self.init = init

    @property
    def method(self) -> str:
        """Criterion, allocation and sparsity."""
        return f"{describe(self.criterion)} at sparsity {self.sparsity}, {describe(self.allocation)}"

    def make_masks(self, bridge: Bridge) -> MaskSet:
        """Score and select.

        Args:
            bridge: The module, its data and its loss.

        Returns:
            The same masks on every rank.

        Raises:
            PruneError: If scoring fails, or a layer collapses under `on_layer_collapse="raise"`.
        """
        with bridge.undone_on_error(weights=self.init is not None):
            return self._make_masks(bridge)

    def _make_masks(self, bridge: Bridge) -> MaskSet:
        prepared = self._prepare(bridge)
        masks, scores = bridge.prune(self.criterion, self.allocation, self.sparsity)
        blind = [name for name, score in scores.items() if not score.any()]
        if blind and self.criterion.rounds == 1:
            rank_zero_warn(
                f"{self.method}: every score is zero in {len(blind)} of {len(scores)} layers ({', '.join(blind[:5])}), "
                "so ties decide there. "
                "Look for a zero-initialised head, branch or norm scale, or for units that no sample activates."
            )
        problem = self._collapse(bridge, masks)
        if problem and self.on_layer_collapse == "repair":
            floor = replace(self.allocation, min_per_layer=max(1, self.allocation.min_per_layer))
            masks, _ = bridge.prune(self.criterion, floor, self.sparsity)
            problem = self._collapse(bridge, masks)
        if problem:
            repair = "" if self.on_layer_collapse == "repair" else " or set on_layer_collapse='repair',"
            advice = f"Lower the sparsity,{repair} or use ERK or Layerwise allocation."
            message = f"{self.method}: expected a signal path through every layer; found {problem}. {advice}"
            if self.on_layer_collapse == "raise":
                raise PruneError(message)
            rank_zero_warn(message)
        kept, total = (sum(column) for column in zip(*masks.counts().values(), strict=True))
        rank_zero_info(
            f"{self.state_key}: {self.method}, {prepared}scored on {bridge.source}: {kept:,} of {total:,} kept."
        )
        return masks

    def _prepare(self, bridge: Bridge) -> str:
        done = ""
        if self.init is not None:
            bridge.initialise(self.init)
            done += f"weights drawn anew ({self.init}), "
        fresh = self.criterion.needs_loss and never_ran(bridge.pl_module)
        if self.bn_warmup == "always" or (self.bn_warmup == "auto" and fresh):
            done += bridge.warm_up_norms(self.warmup_batches) + ", "
        return done

    def _collapse(self, bridge: Bridge, masks: MaskSet) -> str:
        empty = [layer.name for layer in layer_sparsity(masks) if layer.collapsed]
        with bridge.quiet():
            path = find_path(bridge.pl_module, masks, bridge.loss, bridge.example())
        path = sync.of_rank_zero(path)
        found = [f"{len(empty)} empty layers ({', '.join(empty[:5])})"] if empty else []
        return " and ".join(found + (["no path from input to output"] if path is False else []))
