"""A recipe's module and data where a fit would begin, and no training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from pl_prune.callbacks.group_bridge import GroupBridge
from pl_prune.callbacks.structured import StructuredPruning
from pl_prune.cli import Inspect
from pl_prune.core.samples import Samples
from pl_prune.core.select import Select
from pl_prune.core.types import PruneError


class Recipe(Inspect):
    """Parse a recipe for `fit`, build what it names, and hand it to a function in the place of training.

    Callbacks of the recipe do nothing; one process is used.

    Args:
        words: Arguments of `fit`.
        look: Called where a fit would begin, with the recipe's `StructuredPruning` if it has one.

    """

    def __init__(self, words: Sequence[str], look: Callable[[RealInputs, StructuredPruning | None], None]) -> None:
        self._look = look
        super().__init__(args=["fit", *words])

    def before_instantiate_classes(self) -> None:
        """Switch off what would leave files or start processes."""
        super().before_instantiate_classes()
        trainer = self.config.fit.trainer
        devices = trainer.devices
        trainer.devices = devices[:1] if isinstance(devices, list) else 1
        trainer.num_nodes, trainer.strategy = 1, "auto"

    def fit(self, model: Any, **kwargs: Any) -> None:
        """Run the fit up to its first step.

        Args:
            model: The module.
            **kwargs: The other arguments of `Trainer.fit`.
        """
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        structured = next((cb for cb in callbacks if isinstance(cb, StructuredPruning)), None)
        self.trainer.callbacks = [_AtStart(partial(self._look, structured=structured))]  # type: ignore[attr-defined]
        self.trainer.fit_loop.epoch_loop.max_steps = 0
        self.trainer.num_sanity_val_steps = 0
        self.trainer.fit(model, **kwargs)


class RealInputs(GroupBridge):
    """A module, its groups, and inputs from its data."""

    def inputs(self, count: int) -> Any:
        """Return what the module's forward takes, and note in `source` where it is from.

        Args:
            count: How many samples.

        Returns:
            Samples of the scoring data, or `example_input_array` where that is not one tensor or the data are of another form.

        Raises:
            PruneError: If neither is what the forward takes.
        """
        loader, module = self.find_loader(), self.pl_module
        example = module.example_input_array
        with self.quiet():
            self._example = self._read(loader, replace(self.samples, total=count, batch_size=count), share=False)[0]
            self.source = f"{type(module).__name__}.example_input_array"
            if example is not None and not isinstance(example, Tensor):
                return self._inputs()
            module.example_input_array = None
            try:
                found = self._inputs()
            except PruneError:
                if example is None:
                    raise
                return self._to_device(example)
            finally:
                module.example_input_array = example
            self.source = self._from
            return found


class _AtStart(Callback):
    def __init__(self, look: Callable[[RealInputs], None]) -> None:
        self.look = look

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.look(RealInputs(trainer, pl_module, Select(), Samples()))


def recipe_words(files: Sequence[str] | None, checkpoint: str) -> list[str]:
    """Return the words that name a recipe.

    Args:
        files: Recipes that were named.
        checkpoint: A checkpoint, whose run's config.yaml is taken where none was named.

    Returns:
        `--config`, a file, and so on.

    Raises:
        PruneError: If none was named and the run has none.
    """
    if files:
        return [word for file in files for word in ("--config", file)]
    folder = Path(checkpoint).parent
    recipe = (folder.parent if folder.name == "checkpoints" else folder) / "config.yaml"
    if not recipe.is_file():
        raise PruneError(
            f"Expected the run's config.yaml at {str(recipe)!r}; found none. Name the recipe that {checkpoint!r} was trained by: "
            "--config recipe.yaml."
        )
    return ["--config", str(recipe)]
