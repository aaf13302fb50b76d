"""`BatchNormWarmup`: batch-norm statistics from data before training starts."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from pl_prune.callbacks.bridge import Bridge
from pl_prune.core.samples import Samples
from pl_prune.core.select import Select
from pl_prune.core.types import PruneError


class BatchNormWarmup(Callback):
    """Set batch-norm statistics to those of the data before the first step, and change nothing else.

    One pass of seeded training batches with frozen weights; means and variances are pooled over batches and ranks.
    `PruneAtInit` does this by
    itself (`bn_warmup`); this callback is for fits without it. List it before callbacks that look at the network in
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
        if not trainer.ckpt_path:
            done = Bridge(trainer, pl_module, Select(), Samples(seed=self.seed)).warm_up_norms(self.batches)
            rank_zero_info(f"BatchNormWarmup: {done}.")
