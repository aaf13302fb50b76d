"""`BatchNormWarmup`: batch-norm statistics from data before training starts."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from pl_prune.callbacks.bridge import Bridge
from pl_prune.callbacks.refusals import refuse_other_lightning
from pl_prune.core.samples import Samples
from pl_prune.core.select import Select
from pl_prune.core.types import PruneError, check_choice
from pl_prune.core.warmup import never_ran

When: TypeAlias = Literal["auto", "always", "never"]


def check_warmup(when: str, batches: int) -> None:
    """Raise unless a warm-up before scoring is asked for properly.

    Args:
        when: The value of `bn_warmup`.
        batches: That of `warmup_batches`.

    Raises:
        PruneError: If one of them is out of range.
    """
    check_choice("bn_warmup", when, get_args(When))
    if batches < 1:
        raise PruneError(f"Expected warmup_batches of 1 or more; found {batches}. Set bn_warmup='never' to skip it.")


def warm_up(bridge: Bridge, when: When, batches: int, scoring: bool) -> str:
    """Warm the batch norms up before scoring, if that is asked for.

    Args:
        bridge: The module and its data.
        when: "auto" does so when the loss is needed and no batch norm has seen a batch yet.
        batches: How many batches to read.
        scoring: Whether the loss is needed.

    Returns:
        What was done, in words that end in a comma; "" if nothing was.
    """
    if when == "always" or (when == "auto" and scoring and never_ran(bridge.pl_module)):
        return bridge.warm_up_norms(batches) + ", "
    return ""


class BatchNormWarmup(Callback):
    """Set batch-norm statistics to those of the data before the first step, and change nothing else.

    One pass of seeded training batches with frozen weights; means and variances are pooled over batches and ranks.
    `PruneAtInit` and `StructuredPruning` do this by
    themselves (`bn_warmup`); this callback is for fits without it. List it before callbacks that look at the network in
    `on_fit_start`. A
    resumed fit is left alone.

    Args:
        batches: Batches to read, of the loader's own size, over all ranks.
        seed: Seed of the choice of samples.

    Raises:
        PruneError: If `batches` is less than one.
    """

    def __init__(self, batches: int = 20, seed: int = 0) -> None:
        if batches < 1:
            raise PruneError(
                f"Expected at least one batch; found batches={batches}. Leave the callback out to skip the warm-up."
            )
        self.batches = batches
        self.seed = seed

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warm up.

        Args:
            trainer: The trainer.
            pl_module: The module.
        """
        refuse_other_lightning(trainer)
        if not trainer.ckpt_path:
            done = Bridge(trainer, pl_module, Select(), Samples(seed=self.seed)).warm_up_norms(self.batches)
            rank_zero_info(f"BatchNormWarmup: {done}.")
