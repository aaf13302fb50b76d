"""`AdversarialTraining`: a classifier that knows nothing of attacks, trained against them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from pl_prune.adversarial.attacks import alike
from pl_prune.adversarial.batch import examples_of
from pl_prune.adversarial.losses import TRADES, RobustLoss
from pl_prune.callbacks.refusals import refuse_other_lightning
from pl_prune.core import sync
from pl_prune.core.seeds import seed_of
from pl_prune.core.types import PruneError, check_type
from pl_prune.core.warmup import uncounted


class AdversarialTraining(Callback):
    """Train an unmodified classification module by a robust loss.

    During a fit, `training_step` is the module's own with another batch or another loss:

    * PGDAT, FastAT: it gets the adversarial examples in place of the images, so its own loss, logs and metrics are those
      of the adversarial examples;
    * TRADES: it gets the images, and the divergence of the adversarial examples' logits is added to its loss. The logits of the
      images are those that it computes itself, by `self(x)`.

    The module needs a `forward` that maps images in [0, 1] to logits, and batches `(images, labels, ...)`. Attacks run in
    evaluation mode, in the precision of the training, leave no gradient, and draw from their own random stream: that of seed,
    epoch, batch and rank, so the module's is as without them, and a resumed run goes on with the same attacks.
    `adversarial/loss` and `adversarial/acc` (accuracy on the batch's adversarial examples) are logged. Whatever else asks for the
    module's training loss during the fit, scoring by a criterion say, gets the robust one: there, in evaluation mode, batches are
    attacked anew each time they are asked for, since weights change between, and all images start from the same draw, so
    neither batch size nor ranks have an influence.

    Args:
        loss: How the batch is attacked and what is minimised.
        seed: Of the random starts.
    """

    def __init__(self, loss: RobustLoss = TRADES(), seed: int = 0) -> None:
        check_type("loss", loss, RobustLoss, "AdversarialTraining(loss=TRADES(eps=8/255))")
        self.loss = loss
        self.seed = seed
        self._module: LightningModule | None = None
        self._own: tuple[Any, ...] = ()
        self._warned = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the place of `training_step` for a fit.

        Args:
            trainer: The trainer.
            pl_module: The module.
            stage: fit, validate, test or predict.
        """
        refuse_other_lightning(trainer)
        self._detach()
        if stage != "fit":
            return
        self._refuse(trainer, pl_module)
        own = pl_module.training_step

        @functools.wraps(own)
        def training_step(batch: Any, *args: Any, **kwargs: Any) -> Any:
            return self._step(trainer, pl_module, own, batch, args, kwargs)

        self._own = (vars(pl_module)["training_step"],) if "training_step" in vars(pl_module) else ()
        self._module = pl_module
        pl_module.training_step = training_step  # type: ignore[method-assign]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Let the batch's adversarial examples go.

        Args:
            trainer: The trainer.
            pl_module: The module.
            outputs: Of the step.
            batch: The batch.
            batch_idx: Its number in the epoch.
        """
        examples_of(pl_module).forget()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the module its `training_step` back.

        Args:
            trainer: The trainer.
            pl_module: The module.
            exception: What was raised.
        """
        self._detach()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the module its `training_step` back.

        Args:
            trainer: The trainer.
            pl_module: The module.
            stage: fit, validate, test or predict.
        """
        self._detach()

    def examples(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> Tensor:
        """Attack the batch in training, once for all who ask.

        Args:
            trainer: The trainer.
            pl_module: The module.
            batch: Images in [0, 1] and labels, on the module's device.

        Returns:
            Adversarial examples of the images.
        """
        x, y = _images_and_labels(batch)
        when = (trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_idx)
        if not pl_module.training:  # scoring
            with alike(), uncounted():
                return self.loss.examples(pl_module, x, y, self._generator(when, x.device, "scoring"))

        def attack() -> Tensor:
            with trainer.precision_plugin.forward_context():  # also where a callback asks first
                return self.loss.examples(pl_module, x, y, self._generator(when, x.device))

        return examples_of(pl_module).of(x, when, attack)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_module": None, "_own": ()}

    def _step(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        own: Callable[..., Any],
        batch: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        x, y = _images_and_labels(batch)
        adversarial = self.examples(trainer, pl_module, batch)
        if not self.loss.penalised:
            with _logits(pl_module, adversarial) as seen:
                output = own(_with_images(batch, adversarial), *args, **kwargs)
            logits, total = seen[-1] if seen else None, output
            if output is not None and not seen and adversarial is not x:
                self._warn(pl_module, "the attack, which is on forward, may be on something else")
        else:
            with _logits(pl_module, x) as seen:
                output = own(batch, *args, **kwargs)
            if output is None:
                return None
            clean = seen[-1] if seen else self._clean_logits(pl_module, x)
            logits = pl_module(adversarial)
            total = _plus(output, self.loss.penalty(clean, logits))
        loss = total.get("loss") if isinstance(total, Mapping) else total
        if loss is not None:
            log = functools.partial(pl_module.log, on_step=False, on_epoch=True, batch_size=len(x))
            log("adversarial/loss", loss.detach())
            if logits is not None:
                log("adversarial/acc", (logits.detach().argmax(1) == y).float().mean())
        return total

    def _clean_logits(self, pl_module: LightningModule, x: Tensor) -> Tensor:
        self._warn(pl_module, "TRADES runs the images once more for their logits, and batch norms see them twice")
        return pl_module(x)  # type: ignore[no-any-return]

    def _warn(self, pl_module: LightningModule, so: str) -> None:
        if not self._warned:
            self._warned = True
            name = type(pl_module).__name__
            rank_zero_warn(f"{name}.training_step does not call self(images), so {so}. Call self(images) there.")

    def _generator(self, when: tuple[int, int], device: torch.device, who: str = "") -> torch.Generator:
        return torch.Generator(device).manual_seed(seed_of(self.seed, f"{when} {who or sync.rank_and_size()[0]}"))

    def _refuse(self, trainer: Trainer, pl_module: LightningModule) -> None:
        kind = type(pl_module).__name__
        if trainer.strategy.restore_checkpoint_after_setup:
            raise PruneError(
                f"Expected a strategy that keeps whole parameters (single device, DDP); found {type(trainer.strategy).__name__}, "
                "which shards them. Train with strategy='ddp'."
            )
        if sum(isinstance(cb, AdversarialTraining) for cb in trainer.callbacks) > 1:  # type: ignore[attr-defined]
            raise PruneError("Expected one AdversarialTraining; found several. Remove all but one.")
        if "dataloader_iter" in inspect.signature(pl_module.training_step).parameters:
            raise PruneError(
                f"Expected {kind}.training_step(batch, batch_idx); found one that takes dataloader_iter. Let it take a batch."
            )
        if self.loss.penalised and not pl_module.automatic_optimization:
            raise PruneError(
                f"Expected automatic optimization, to add a penalty to the loss; found that {kind} optimizes manually. "
                "Use PGDAT or FastAT, which change the batch alone."
            )

    def _detach(self) -> None:
        if self._module is None:
            return
        examples_of(self._module).forget()
        vars(self._module).pop("training_step", None)
        if self._own:
            self._module.training_step = self._own[0]  # type: ignore[method-assign]
        self._module, self._own = None, ()


def _images_and_labels(batch: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(batch, (tuple, list)) or len(batch) < 2:
        raise PruneError(
            f"Expected batches (images, labels); found {type(batch).__name__}. Let the loader's collate_fn return a tuple of both."
        )
    return batch[0], batch[1]


def _with_images(batch: Any, images: Tensor) -> Any:
    parts = [images, *batch[1:]]
    return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)


@contextmanager
def _logits(module: nn.Module, x: Tensor) -> Iterator[list[Tensor]]:
    """Collect what a module returns for these images while the body runs; refuse a body that standardises them itself."""
    seen: list[Tensor] = []
    others: list[Tensor] = []

    def note(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        given = next(iter([*inputs, *named.values()]), None)
        if given is x and isinstance(output, Tensor):
            seen.append(output)
        elif isinstance(given, Tensor) and given.shape == x.shape and given.is_floating_point():
            others.append(given.detach())

    handle = module.register_forward_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()
    if not seen and others:
        low, high = (float(end) for end in others[-1].aminmax())
        if not (low >= 0 and high <= 1):
            raise PruneError(
                f"Expected {type(module).__name__}.training_step to call self(images) on the images in [0, 1]; found that it makes values "
                f"from {low:.4g} to {high:.4g} of them first, which no attack sees. Put the normalisation into the model, as "
                "NormalizedModel(network, mean, std)."
            )


def _plus(output: Any, penalty: Tensor) -> Any:
    if isinstance(output, Mapping):
        return {**output, "loss": output["loss"] + penalty}
    return output + penalty
