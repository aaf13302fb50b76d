"""The gradient of a batch's loss, taken before the batch is trained on, without a trace."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn

from pl_prune.callbacks.adversarial import AdversarialTraining
from pl_prune.core import sync
from pl_prune.core.sandbox import aside
from pl_prune.core.types import PruneError, plain


def batch_gradient(
    trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, params: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """Differentiate what `training_step` will return for a batch, with the random numbers it will draw.

    Modes are those of training. Buffers (running statistics), metrics, logs, `.grad` and the random state are as before at
    the end.

    Args:
        trainer: The trainer.
        pl_module: Its module.
        batch: The batch, on its device.
        batch_idx: Its number.
        params: With respect to what, by name.

    Returns:
        Gradients by name, the mean over all ranks; zeros where the step returned no loss.
    """
    takes_index = len(inspect.signature(pl_module.training_step).parameters) > 1
    with _quietly(trainer, pl_module), torch.enable_grad():
        with trainer.precision_plugin.forward_context():
            output = pl_module.training_step(batch, batch_idx) if takes_index else pl_module.training_step(batch)
        loss = output.get("loss") if isinstance(output, Mapping) else output
        learning = [name for name, p in params.items() if p.requires_grad and loss is not None]
        found = torch.autograd.grad(loss, [params[name] for name in learning], allow_unused=True) if learning else ()
    made = dict(zip(learning, found, strict=True))
    gradients = [torch.zeros_like(p) if made.get(name) is None else made[name] for name, p in params.items()]
    size = sync.rank_and_size()[1]
    if size > 1:
        flat = torch.cat([g.reshape(-1) for g in gradients]).div_(size)
        sync.sum_([flat])
        parts = flat.split([g.numel() for g in gradients])
        gradients = [part.view_as(g) for part, g in zip(parts, gradients, strict=True)]
    return dict(zip(params, gradients, strict=True))


def attack(trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
    """Make the adversarial examples that a batch will be trained on now, if it will be.

    Args:
        trainer: The trainer.
        pl_module: Its module.
        batch: The batch, on its device.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, AdversarialTraining):
            callback.examples(trainer, pl_module, batch)


def refuse_steps(pl_module: LightningModule, who: str) -> None:
    """Raise unless a module's loss can be had before its step.

    Args:
        pl_module: The module.
        who: The callback that asks.

    Raises:
        PruneError: If the step takes the loader's iterator, or the module optimizes manually.
    """
    kind = type(pl_module).__name__
    if "dataloader_iter" in inspect.signature(pl_module.training_step).parameters:
        raise PruneError(
            f"Expected {kind}.training_step(batch, batch_idx), which {who} runs twice on a batch; found one that takes dataloader_iter. "
            "Let it take a batch."
        )
    if not pl_module.automatic_optimization:
        raise PruneError(
            f"Expected automatic optimization, since {who} needs the loss that training_step returns; found that {kind} optimizes "
            "manually. Leave the callback out, or let training_step return its loss."
        )


def write_into(checkpoint: dict[str, Any], pl_module: LightningModule, held: Mapping[str, Tensor]) -> None:
    """Put values into a checkpoint in the place of those that parameters hold at the moment, under all names of theirs.

    Args:
        checkpoint: The whole checkpoint.
        pl_module: The module.
        held: Values by parameter name (`plain`).
    """
    values = {id(p): held[plain(name)] for name, p in pl_module.named_parameters() if plain(name) in held}
    state = checkpoint.get("current_model_state", checkpoint["state_dict"])  # beside an average, where there is one
    for name, p in pl_module.named_parameters(remove_duplicate=False):
        if name in state and id(p) in values:
            state[name] = values[id(p)].clone()


@contextmanager
def _quietly(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    loggers = trainer.loggers
    with aside(pl_module):
        pl_module.__dict__["log"] = lambda *_, **__: None  # `aside` takes it away again
        trainer.loggers = [DummyLogger() for _ in loggers]
        try:
            yield
        finally:
            trainer.loggers = loggers
