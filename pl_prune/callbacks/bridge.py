"""`Bridge`: what the core needs, taken from a Trainer and its module."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from pl_prune.core import sync
from pl_prune.core.allocate import Allocation
from pl_prune.core.archive import hash_batches
from pl_prune.core.batch import batch_size
from pl_prune.core.criterion import Criterion
from pl_prune.core.initialise import Init, initialise_
from pl_prune.core.iterate import iterate
from pl_prune.core.masks import MaskSet
from pl_prune.core.probe import Probe
from pl_prune.core.samples import Samples
from pl_prune.core.sandbox import attributes_of, untouched
from pl_prune.core.select import Select
from pl_prune.core.types import Params, PruneError, Scores
from pl_prune.core.warmup import pooled_moments, set_statistics, tracking_norms


class Bridge:
    """A module, its scoring data and its loss.

    The loss is what `training_step` returns (or `scoring_step(batch, batch_idx)`, where the module has one), run on
    the bare module in evaluation mode, in the parameters' own precision. Data comes from `scoring_dataloader()` of the
    datamodule or the module where there is one, else from the train set.

    Args:
        trainer: A trainer that has reached `on_fit_start`.
        pl_module: Its module.
        select: Which parameters are prunable.
        samples: Which samples to read.

    Attributes:
        source: Where the samples of the last scores came from, in words.
        hashing: Whether to hash them.
        data: Their hash, if they were hashed.
    """

    def __init__(self, trainer: Trainer, pl_module: LightningModule, select: Select, samples: Samples) -> None:
        self.trainer = trainer
        self.pl_module = pl_module
        self.select = select
        self.samples = samples
        self.source = "no data"
        self.hashing = False
        self.data: str | None = None
        self._from = ""
        self._loader: DataLoader[Any] | None = None
        self._example: Any = None
        self._again: Callable[[], None] = lambda: None

    def prune(
        self, criterion: Criterion, allocation: Allocation, sparsity: float, within: MaskSet | None = None
    ) -> tuple[MaskSet, Scores]:
        """Score and select over all ranks, and leave no trace.

        Args:
            criterion: How to score.
            allocation: Where the kept entries go.
            sparsity: Fraction of the selected parameters to prune.
            within: The masks in force, whose parameters are the selected ones; None before there are any.

        Returns:
            The same masks on every rank, and the scores of the last round.
        """
        loader = self.find_loader()
        with self.quiet():
            sync.copy_of_rank_zero_(self.pl_module.buffers())  # as DDP does before each forward pass
            batches = self._scoring_batches(loader, criterion.needs_data, criterion.needs_loss)
            params = self.prunable() if within is None else self._learning(within)
            probe = Probe(self.pl_module, params, self.loss, batches, self._track)
            return iterate(criterion, probe, allocation, sparsity, within)

    def _scoring_batches(self, loader: Any, needs_data: bool, needs_loss: bool) -> list[Any]:
        """Read what a criterion scores on, and note where it is from."""
        if not needs_loss:
            return [self.example()] if needs_data else []
        batches = self._read(loader, self.samples)
        share = " on this rank" if sync.rank_and_size()[1] > 1 else ""
        self.source = f"{sum(map(batch_size, batches))} samples{share} of {self._from}"
        self.data = hash_batches(batches) if self.hashing else None
        return batches

    @contextmanager
    def undone_on_error(self, weights: bool) -> Iterator[None]:
        """Put the module's buffers back if the body fails.

        Args:
            weights: Put its parameters back too.

        Yields:
            None.
        """
        tensors = [*self.pl_module.buffers(), *(self.pl_module.parameters() if weights else ())]
        before = [(tensor, tensor.detach().clone()) for tensor in tensors]
        try:
            yield
        except BaseException:
            with torch.no_grad():
                for tensor, value in before:
                    tensor.copy_(value)
            raise

    def initialise(self, kind: Init) -> None:
        """Draw the prunable weights anew, by the samples' seed.

        Args:
            kind: The distribution.
        """
        initialise_(self.selected(), kind, self.samples.seed)

    def warm_up_norms(self, batches: int) -> str:
        """Set the running statistics of every batch norm to those of the data, and change nothing else.

        Args:
            batches: How many batches of the loader's size to read, over all ranks.

        Returns:
            What was done, in words.
        """
        if not tracking_norms(self.pl_module):
            rank_zero_warn(
                f"Expected batch norms with running statistics to warm up; found none in {type(self.pl_module).__name__}. "
                "Set bn_warmup='never', or look at the initialisation instead (init='kaiming')."
            )
            return "no batch norm to warm up"
        loader = self.find_loader()
        size = loader.batch_size or self.samples.batch_size
        samples = replace(self.samples, total=batches * size, batch_size=size)
        with self.quiet():
            data = self._read(loader, samples, whole=True)
            moments, done = pooled_moments(
                self.pl_module, self._track(data, "batch norms"), lambda batch: self.loss(self.pl_module, batch)
            )
        set_statistics(self.pl_module, moments, done)
        return f"batch norms warmed up on {done} batches of {self._from}"

    def example(self) -> Any:
        """Return a small batch on the module's device, to see how the network runs; read inside `quiet`.

        Returns:
            Two samples, the same on every rank (of an iterable data set, the first two that the rank sees).
        """
        if self._example is None:
            self._example = self._read(self.find_loader(), replace(self.samples, total=2), share=False)[0]
        return self._example

    def selected(self) -> Params:
        """Return the selected parameters as they are.

        Returns:
            Parameters by name.
        """
        self.find_loader()
        with self.quiet():
            return self.prunable()

    def prunable(self) -> Params:
        """Return the selected parameters, the output layer found by running one batch inside `quiet`.

        Returns:
            Parameters by name.
        """
        every = self.select.output_layer and self.select.first_layer  # where the order of execution decides nothing
        run = None if every else lambda: self.loss(self.pl_module, self.example())
        return self._learning(sync.agreed(lambda: self.select(self.pl_module, run)))

    def _learning(self, names: Iterable[str]) -> Params:
        """Let parameters have gradients, which `quiet` takes back from those that are frozen."""
        params = {name: p for name, p in self.pl_module.named_parameters() if name in set(names)}
        for p in params.values():
            p.requires_grad_()
        return params

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Run the module's step on one batch.

        Args:
            model: The module itself; the step is bound to it.
            batch: A batch on its device.

        Returns:
            The loss of the batch.

        Raises:
            PruneError: If the step fails or returns no loss.
            OutOfMemoryError: If there is not enough memory.
        """
        step = self._step()
        name = f"{type(self.pl_module).__name__}.{step.__name__}"
        arguments = inspect.signature(step).parameters.values()
        takes_index = len(arguments) > 1 or any(a.kind is a.VAR_POSITIONAL for a in arguments)
        self._again()
        try:
            output = step(batch, 0) if takes_index else step(batch)
        except (PruneError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise PruneError(
                f"Expected {name} to run in evaluation mode, on any number of samples; found {type(error).__name__}: {error}. "
                "Look whether it takes these data; if so, define `scoring_step(self, batch, batch_idx)` that returns the loss to score by."
            ) from error
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if loss is None:
            raise PruneError(
                f"Expected {name} to return a loss in evaluation mode; found {output!r}. Define `scoring_step(self, batch, batch_idx)`."
            )
        return loss

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Leave the module, the random state and the loggers as they are.

        Yields:
            None.
        """
        loggers = self.trainer.loggers
        with self.trainer.precision_plugin.forward_context(), untouched(self.pl_module, seed=self.samples.seed):
            self._again = attributes_of(self.pl_module)
            self.pl_module.__dict__["log"] = lambda *_, **__: None  # `untouched` takes it away again
            self.trainer.loggers = [DummyLogger() for _ in loggers]
            try:
                yield
            finally:
                self.trainer.loggers = loggers
                self._again = lambda: None  # what it notes need not live on

    def _step(self) -> Any:
        step = getattr(self.pl_module, "scoring_step", None)
        if step is not None:
            return step
        if not self.pl_module.automatic_optimization:
            raise PruneError(
                f"Expected a loss without optimizer steps, to score by and to see which layer runs last (the output layer, which "
                f"stays dense); found that {type(self.pl_module).__name__} optimizes manually. "
                "Define `scoring_step(self, batch, batch_idx)` that returns one."
            )
        if "dataloader_iter" in inspect.signature(self.pl_module.training_step).parameters:
            raise PruneError(
                "Expected training_step(batch, batch_idx); found one that takes dataloader_iter. "
                "Define `scoring_step(self, batch, batch_idx)`."
            )
        return self.pl_module.training_step

    def find_loader(self) -> DataLoader[Any]:
        """Find where the samples come from.

        Call it outside `quiet` first: the train loader draws its seed from the global random state, now instead of
        later.

        Returns:
            The loader, not iterated.

        Raises:
            PruneError: If there is not exactly one DataLoader.
        """
        if self._loader is None:
            for owner in (getattr(self.trainer, "datamodule", None), self.pl_module):
                if owner is not None and hasattr(owner, "scoring_dataloader"):
                    self._loader = owner.scoring_dataloader()
                    self._from = f"{type(owner).__name__}.scoring_dataloader()"
                    break
            else:
                self.trainer.fit_loop.setup_data()
                self._loader, self._from = self.trainer.train_dataloader, "the train set"
        if not isinstance(self._loader, DataLoader):
            raise PruneError(
                f"Expected one DataLoader to score on; found {type(self._loader).__name__} from {self._from}. "
                "Define `scoring_dataloader()` on the "
                "module or the datamodule."
            )
        return self._loader

    def _read(self, loader: DataLoader[Any], samples: Samples, whole: bool = False, share: bool = True) -> list[Any]:
        read = samples.batches
        return sync.agreed(lambda: [self._to_device(batch) for batch in read(loader, self._track, whole, share)])

    def _to_device(self, batch: Any) -> Any:
        batch = self.trainer.precision_plugin.convert_input(batch)
        batch = self.pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
        return self.trainer.strategy.batch_to_device(batch, dataloader_idx=0)

    def _track(self, items: Iterable[Any], label: str) -> Iterable[Any]:
        shown = self.trainer.is_global_zero and self.trainer.progress_bar_callback is not None
        return tqdm(items, desc=f"pl_prune: {label}", delay=1.0, leave=False, disable=not shown)
