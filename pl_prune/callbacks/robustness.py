"""`RobustnessEvaluation`: accuracy under attack, at the end of a test or while a network trains."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm

from pl_prune.adversarial.chunk import Protocol
from pl_prune.adversarial.evaluate import evaluate
from pl_prune.adversarial.statistics import RobustAccuracy
from pl_prune.callbacks.refusals import refuse_other_lightning
from pl_prune.callbacks.report import run_folder
from pl_prune.core.samples import Samples
from pl_prune.core.types import PruneError, check_count


class RobustnessEvaluation(Callback):
    """Measure clean and robust accuracy on the test set, and on the validation set while training if asked to.

    `Trainer.test` ends with an evaluation: `test/clean_acc` and `test/robust_acc` are logged, and `robustness.json` goes into
    `folder`, beside one file for each chunk, so that an interrupted evaluation goes on where it stopped. Ranks share the
    chunks; the result is the same at any number of them. The module's `forward` maps images in [0, 1] to logits.

    Args:
        eps: Radius of the attacks on images in [0, 1].
        preset: "standard" is AutoAttack; "fast" its APGD-CE and targeted APGD; "untargeted" APGD-CE, FAB and Square, for two
            or three classes; "pgd" 20 projected gradient steps, an optimistic measure for use while training.
        norm: "linf" or "l2".
        images: Attack only so many images, in a fixed random order; None takes all.
        seed: Of the order and of the random starts.
        chunk_size: Images attacked at a time.
        every_n_epochs: Evaluate after every so many validations' epochs of a fit too, and log `val/clean_acc` and
            `val/robust_acc`, which `ModelCheckpoint` can monitor; None: never.
        folder: Where files go; None: the run's folder where there is a logger, else no file is written.

    Attributes:
        result: What the last evaluation found.
    """

    def __init__(
        self,
        eps: float = 8 / 255,
        preset: Literal["fast", "standard", "untargeted", "pgd"] = "fast",
        norm: Literal["linf", "l2"] = "linf",
        images: int | None = None,
        seed: int = 0,
        chunk_size: int = 250,
        every_n_epochs: int | None = None,
        folder: str | None = None,
    ) -> None:
        self.protocol = Protocol(eps, preset, norm, seed, chunk_size)
        if not eps:
            raise PruneError("Expected an eps above 0; found 0. Leave the callback out for clean accuracy alone.")
        for name, value in (("images", images), ("every_n_epochs", every_n_epochs)):
            if value is not None:
                check_count(name, value)
        self.images = images
        self.every_n_epochs = every_n_epochs
        self.folder = folder
        self.result: RobustAccuracy | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a place in the list of callbacks where averaged weights have been put away already.

        Args:
            trainer: The trainer.
            pl_module: The module.
            stage: fit, validate, test or predict.

        Raises:
            PruneError: If a callback that averages weights comes first.
        """
        refuse_other_lightning(trainer)
        if stage == "fit" and self.every_n_epochs is not None:
            before = trainer.callbacks[: trainer.callbacks.index(self)]  # type: ignore[attr-defined]
            for other in before:
                if isinstance(other, WeightAveraging):
                    raise PruneError(
                        f"Expected RobustnessEvaluation(every_n_epochs=...) before {type(other).__name__} among the callbacks; found it "
                        "after, where the averaged weights that were validated are put away already. Swap the two."
                    )

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse data that cannot be attacked, before the test.

        Args:
            trainer: The trainer.
            pl_module: The module.
        """
        _data_set(trainer.test_dataloaders, "test")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate on the test set.

        Args:
            trainer: The trainer.
            pl_module: The module.
        """
        folder = self._folder(trainer)
        result = self._evaluate(trainer, pl_module, trainer.test_dataloaders, "test", folder)
        rank_zero_info("\n" + result.text())
        if folder and trainer.is_global_zero:
            part = folder / "robustness.json.part"
            folder.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(result.to_dict(), indent=1))
            part.replace(folder / "robustness.json")

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate on the validation set, where it is due.

        Args:
            trainer: The trainer.
            pl_module: The module.
        """
        if self.every_n_epochs is None or trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        if (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._evaluate(trainer, pl_module, trainer.val_dataloaders, "val", None)

    def _folder(self, trainer: Trainer) -> Path | None:
        if self.folder:
            return Path(self.folder)
        return run_folder(trainer) if trainer.logger is not None else None

    def _evaluate(
        self, trainer: Trainer, pl_module: LightningModule, loader: Any, stage: str, folder: Path | None
    ) -> RobustAccuracy:
        loader = _one(loader)
        data = _data_set(loader, stage)
        chosen = list(range(len(data)))
        if self.images is not None:
            chosen = Samples(total=self.images, seed=self.protocol.seed).indices(data)

        def read(part: slice) -> tuple[Tensor, Tensor]:
            batch = loader.collate_fn([data[i] for i in chosen[part]])
            batch = trainer.precision_plugin.convert_input(batch)
            batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
            batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
            if not isinstance(batch, (tuple, list)) or len(batch) < 2:
                raise PruneError(
                    f"Expected batches (images, labels); found {type(batch).__name__}. Let the collate_fn return a tuple of both."
                )
            return batch[0], batch[1]

        def track(items: Iterable[Any], label: str) -> Iterable[Any]:
            shown = trainer.is_global_zero and trainer.progress_bar_callback is not None
            return tqdm(items, desc=f"pl_prune: {label}", delay=1.0, leave=False, disable=not shown)

        chunks = folder / "robustness" if folder else None
        self.result = evaluate(pl_module, self.protocol, len(chosen), read, chunks, track)
        pl_module.log(f"{stage}/clean_acc", self.result.clean)
        pl_module.log(f"{stage}/robust_acc", self.result.robust, prog_bar=True)
        return self.result


def _one(loader: Any) -> Any:
    return loader[0] if isinstance(loader, list) and len(loader) == 1 else loader


def _data_set(loader: Any, stage: str) -> Any:
    """Return the data set of a loader."""
    loader = _one(loader)
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        several = f"{type(loader).__name__} of {len(loader)}" if isinstance(loader, list) else type(loader).__name__
        raise PruneError(
            f"Expected one DataLoader over a data set with a length, to attack it in fixed chunks; found {several}. "
            f"Give the {stage} set alone."
        )
    return loader.dataset
