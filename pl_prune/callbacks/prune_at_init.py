"""`PruneAtInit`: score once before the first step, prune, train the rest."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, get_args

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from pl_prune.callbacks.base import PruningCallback
from pl_prune.callbacks.bn_warmup import When, check_warmup, warm_up
from pl_prune.callbacks.bridge import Bridge
from pl_prune.core import sync
from pl_prune.core.allocate import Allocation, Global
from pl_prune.core.controls import Control, inverted, reinitialise_
from pl_prune.core.criterion import Criterion
from pl_prune.core.initialise import Init
from pl_prune.core.masks import MaskSet
from pl_prune.core.samples import Samples
from pl_prune.core.select import Select
from pl_prune.core.store import check_use, load_masks, load_scores, read_header
from pl_prune.core.types import PruneError, Scores, check_choice, check_sparsity, check_type, describe, prune_count
from pl_prune.criteria.gradient import SNIP
from pl_prune.report.collapse import find_path
from pl_prune.report.sparsity import layer_sparsity


class PruneAtInit(PruningCallback):
    """Prune a network before its first training step, and train what is left.

    Masks are made in `on_fit_start`, from the weights as they are then (loaded ones too), before the sanity check.
    Scoring leaves the module, the random state and the order of the training batches as they were.

    Args:
        criterion: How to score; of no meaning beside `scores` or `masks`.
        sparsity: Fraction of the selected parameters to prune, in [0, 1). None: 0.9, or that of `masks`.
        allocation: Where the kept entries go; of no meaning beside `masks`.
        select: Which parameters are prunable.
        samples: Which samples the scores see, for criteria that need data.
        on_layer_collapse: What to do when a layer loses everything, or no input reaches the output: "warn", "raise",
            or "repair" (allocate again with one entry kept in each layer, at the same exact count).
        bn_warmup: Whether batch-norm statistics are set to those of the data before scoring: "auto" does so when the
            criterion needs the loss and no batch norm has seen a batch yet.
        warmup_batches: Batches of the loader's own size that the warm-up reads.
        init: Draw the selected weights anew first; None keeps the module's own.
        scores: A file of scores (`save_scores`, `pl-prune score`, a run's scores.safetensors) to use in place of a
            criterion; it must be of the selected parameters.
        masks: A file of masks (`save_masks`, `pl-prune mask`, a run's masks.safetensors) to use as they are: of the selected
            parameters, or of a run that pruned whole units, whatever is selected.
        control: What of the score to destroy, to see whether it mattered, at the same layer densities: "shuffle" permutes
            each layer's mask, "reinitialise" draws the selected weights anew once the masks are made (by `init`, else from
            a normal distribution of each layer's own mean and standard deviation), "invert" keeps each layer's lowest
            scores (for a criterion of several rounds, those of its first).
        control_seed: Seed of the control, which no other random number depends on.
        name: Tells several callbacks of this class apart.

    Raises:
        PruneError: If the sparsity is outside [0, 1), another argument is not of its kind, or two exclude each other.

    Source:
        The controls: Su et al., Sanity-Checking Pruning Methods (shuffle), and Frankle et al., Pruning Neural Networks at
        Initialization: Why Are We Missing the Mark? (all three; there, inversion also moves the layer densities).
    """

    def __init__(
        self,
        criterion: Criterion = SNIP(),
        sparsity: float | None = None,
        allocation: Allocation = Global(),
        select: Select = Select(),
        samples: Samples = Samples(),
        on_layer_collapse: Literal["warn", "raise", "repair"] = "warn",
        bn_warmup: When = "auto",
        warmup_batches: int = 20,
        init: Init | None = None,
        scores: str | None = None,
        masks: str | None = None,
        control: Control | None = None,
        control_seed: int = 0,
        name: str | None = None,
    ) -> None:
        super().__init__(select, samples, name)
        check_type("criterion", criterion, Criterion, "for example pl_prune.SNIP()")
        check_type("allocation", allocation, Allocation, "for example pl_prune.ERK()")
        check_sparsity(0.9 if sparsity is None else sparsity)
        check_choice("on_layer_collapse", on_layer_collapse, ("warn", "raise", "repair"))
        check_warmup(bn_warmup, warmup_batches)
        check_choice("init", init, (None, *get_args(Init)))
        check_choice("control", control, (None, *get_args(Control)))
        for excluded, value in (("scores", scores), ("on_layer_collapse", on_layer_collapse), ("control", control)):
            if masks is not None and value not in (None, "warn", "raise", "shuffle", "reinitialise"):
                raise PruneError(
                    f"Expected masks={masks!r} to be used as they are; found {excluded}={value!r}, which needs scores. "
                    "Leave out one of the two."
                )
        self.criterion = criterion
        self.sparsity = 0.9 if sparsity is None else sparsity
        self.allocation = allocation
        self.on_layer_collapse = on_layer_collapse
        self.bn_warmup = bn_warmup
        self.warmup_batches = warmup_batches
        self.init = init
        self.scores_file = scores
        self.masks_file = masks
        self.control = control
        self.control_seed = control_seed
        self._asked = sparsity
        self._header: dict[str, Any] = {}

    @property
    def method(self) -> str:
        """Criterion, or digest of the file in its place, allocation, sparsity and control."""
        digest = self._header.get("digest", "")[:12]
        control = f", control {self.control} (seed {self.control_seed})" if self.control else ""
        if self.masks_file is not None:
            return f"masks of file {digest} at sparsity {self.sparsity:.6g}{control}"
        source = describe(self.criterion) if self.scores_file is None else f"scores of file {digest}"
        return f"{source} at sparsity {self.sparsity}, {describe(self.allocation)}{control}"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot be pruned honestly, a file of scores or masks included, before any work.

        Args:
            trainer: The trainer.
            pl_module: The module.
            stage: fit, validate, test or predict.
        """
        super().setup(trainer, pl_module, stage)
        path = self._path
        if stage == "fit" and path is not None:
            self._header = sync.agreed(lambda: self._read(path))
            sync.check_alike(
                f"{self._header['kind']} in {path!r}", self._header["digest"], "Copy one file to all nodes."
            )

    @property
    def _path(self) -> str | None:
        return self.scores_file if self.masks_file is None else self.masks_file

    def _read(self, path: str) -> dict[str, Any]:
        if self.masks_file is None:
            header = read_header(path, "scores")
            check_use(path, header, self.allocation, self.sparsity)
            rounds = header["meta"].get("rounds")
            if self.control == "invert" and isinstance(rounds, int) and rounds > 1:
                raise PruneError(
                    f"Expected scores of one round in {path!r}, to invert them; found those of the last of {rounds}. "
                    "Invert the criterion itself, without `scores`."
                )
            return header
        header = read_header(path, "masks")
        pruned = header["selected"] - header["kept"]
        if self._asked is not None and prune_count(self._asked, header["selected"]) != pruned:
            raise PruneError(
                f"Expected the sparsity of the masks in {path!r}, {header['sparsity']:.6g}; found sparsity={self._asked}. "
                "Leave it out (--prune.sparsity=null), or name masks of that sparsity."
            )
        if header["meta"].get("units") and self.control == "shuffle":
            raise PruneError(
                f"Expected masks of single weights in {path!r}, to shuffle them; found those of whole units. Leave `control` out."
            )
        self.sparsity = header["sparsity"]
        return header

    def make_masks(self, bridge: Bridge) -> MaskSet:
        """Score and select, or read what was.

        Args:
            bridge: The module, its data and its loss.

        Returns:
            The same masks on every rank.

        Raises:
            PruneError: If scoring fails, a file does not fit, or a layer collapses under `on_layer_collapse="raise"`.
        """
        redrawn = self.init is not None or self.control == "reinitialise"
        with bridge.undone_on_error(weights=redrawn):
            return self._make_masks(bridge)

    def _make_masks(self, bridge: Bridge) -> MaskSet:
        prepared = self._prepare(bridge)
        masks = self._select(bridge, self.allocation)
        problem = self._collapse(bridge, masks)
        if problem and self.on_layer_collapse == "repair":
            floor = replace(self.allocation, min_per_layer=max(1, self.allocation.min_per_layer))
            masks = self._select(bridge, floor)
            problem = self._collapse(bridge, masks)
        if problem:
            repair = "" if self.on_layer_collapse == "repair" else " or set on_layer_collapse='repair',"
            advice = f"Lower the sparsity,{repair} or use ERK or Layerwise allocation."
            message = f"{self.method}: expected a signal path through every layer; found {problem}. {advice}"
            if self.on_layer_collapse == "raise":
                raise PruneError(message)
            rank_zero_warn(message)
        if self.control == "reinitialise":
            reinitialise_(bridge.selected(), self.init, self.control_seed)
        kept, total = (sum(column) for column in zip(*masks.counts().values(), strict=True))
        source = f"read from {self._path}" if self._path else f"scored on {bridge.source}"
        rank_zero_info(f"{self.state_key}: {self.method}, {prepared}{source}: {kept:,} of {total:,} kept.")
        return masks

    def _select(self, bridge: Bridge, allocation: Allocation) -> MaskSet:
        """Make the masks, or those of the control, and hand the scores over."""
        device, seed = bridge.pl_module.device, self.control_seed
        if self.masks_file is not None:
            path, units = self.masks_file, self._header["meta"].get("units")
            fitted = bridge.pl_module if units else bridge.selected()
            masks = sync.agreed(lambda: load_masks(path, fitted)).to(device)
            return masks.shuffled(seed) if self.control == "shuffle" else masks
        masks, scores = self._scored(bridge, allocation)
        if self.control == "shuffle":
            return masks.shuffled(seed)
        if self.control == "invert":
            if self.scores_file is None and self.criterion.rounds > 1:
                _, scores = bridge.prune(replace(self.criterion, rounds=1), allocation, self.sparsity)  # type: ignore[type-var]
            return sync.masks_of_rank_zero(lambda: inverted(masks, scores), device)
        return masks

    def _scored(self, bridge: Bridge, allocation: Allocation) -> tuple[MaskSet, Scores]:
        if self.scores_file is not None:
            path, params = self.scores_file, bridge.selected()
            scores = sync.agreed(lambda: load_scores(path, params))
            masks = sync.masks_of_rank_zero(lambda: allocation(scores, self.sparsity), bridge.pl_module.device)
            if self.keep_scores is not None:
                self.keep_scores(
                    scores, {**self._header["meta"], "method": self.method, "file": self._header["digest"]}
                )
            return masks, scores
        masks, scores = bridge.prune(self.criterion, allocation, self.sparsity)
        blind = [name for name, score in scores.items() if not score.any()]
        if blind and self.criterion.rounds == 1:
            rank_zero_warn(
                f"{self.method}: every score is zero in {len(blind)} of {len(scores)} layers ({', '.join(blind[:5])}), "
                "so ties decide there. "
                "Look for a zero-initialised head, branch or norm scale, or for units that no sample activates."
            )
        self._hand_over(bridge, scores, self.criterion, sparsity=self.sparsity, allocation=allocation)
        return masks, scores

    def _prepare(self, bridge: Bridge) -> str:
        done = ""
        if self.init is not None:
            bridge.initialise(self.init)
            done += f"weights drawn anew ({self.init}), "
        scoring = self._path is None and self.criterion.needs_loss
        return done + warm_up(bridge, self.bn_warmup, self.warmup_batches, scoring)

    def _collapse(self, bridge: Bridge, masks: MaskSet) -> str:
        empty = [layer.name for layer in layer_sparsity(masks) if layer.collapsed]
        with bridge.quiet():
            path = find_path(bridge.pl_module, masks, bridge.loss, bridge.example())
        path = sync.of_rank_zero(path)
        found = [f"{len(empty)} empty layers ({', '.join(empty[:5])})"] if empty else []
        return " and ".join(found + (["no path from input to output"] if path is False else []))
