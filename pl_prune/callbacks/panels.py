"""`PredictionPanels`: pictures of what a network makes of validation samples, in the run's folder."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from pl_prune.callbacks.loggers import log_picture
from pl_prune.callbacks.refusals import refuse_other_lightning
from pl_prune.callbacks.report import run_folder
from pl_prune.core.batch import batch_size, cut
from pl_prune.core.types import PruneError, check_count
from pl_prune.report.attached import save_figure
from pl_prune.report.images import image_panels


class PredictionPanels(Callback):
    """Draw the first validation samples beside what the network predicts of them, anew at each validation.

    The picture goes to `figures/predictions.png` in the run's folder, where `pl-prune report` finds it, and to wandb and TensorBoard
    as `predictions`. Without a logger, and in `fast_dev_run`, nothing is drawn.

    The module has a method `panels(batch)` that returns arguments of `image_panels`: the columns, and boxes where there are
    some. `SemanticSegmenter`, `SuperResolution` and `Detector` have one.

    Args:
        samples: How many samples to draw, of the first batch.

    Raises:
        PruneError: If that is not a whole number of 1 or more.
    """

    def __init__(self, samples: int = 3) -> None:
        check_count("samples", samples)
        self.samples = samples

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """See that the module can be drawn.

        Args:
            trainer: The trainer.
            pl_module: The module.
            stage: fit, validate, test or predict.

        Raises:
            PruneError: If it has no method `panels`.
        """
        refuse_other_lightning(trainer)
        if not hasattr(pl_module, "panels"):
            raise PruneError(
                f"Expected {type(pl_module).__name__} to have a method panels(batch), which returns images to draw; found none. "
                "Define it, or leave PredictionPanels out."
            )

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw the first batch.

        Args:
            trainer: The trainer.
            pl_module: The module, in evaluation mode.
            outputs: What the validation step returned.
            batch: The batch.
            batch_idx: Its number.
            dataloader_idx: That of its loader.
        """
        nowhere = trainer.logger is None or trainer.fast_dev_run or not trainer.is_global_zero
        if nowhere or batch_idx or dataloader_idx:
            return
        shown = cut(batch, batch_size(batch), 0, self.samples)
        caption = f"The first validation samples and predictions after {trainer.global_step:,} steps."
        picture = image_panels("predictions", "Predictions", caption, **pl_module.panels(shown))
        save_figure(run_folder(trainer), picture)
        log_picture(trainer, "predictions", picture)
