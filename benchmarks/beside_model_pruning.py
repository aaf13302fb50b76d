"""Eight cases in which masks get lost, through Lightning's `ModelPruning` and through pl_prune, measured in one run.

Both tools get the same module, data, optimizer and seed, and both are asked to prune half of the weights once, after the
first epoch, by magnitude (under DDP: at random), and to set what is left back to its initial values, as `ModelPruning`
does by default:

* `ModelPruning("l1_unstructured", amount=0.5, apply_pruning=first_epoch)`;
* `pl_prune.GradualPruning(Magnitude(), OneShot(0.5, start=BATCHES), rewind_to=0)`.

The case of an amount that is given for every epoch has neither `apply_pruning` nor `OneShot`, but `Cubic`. Everything else
is at its default. Sparsity is the fraction of zeros among the parameters that a tool prunes by default: all weights and
biases for `ModelPruning`, the weights without the output layer for pl_prune. Where the order of callbacks may matter, both
orders are run. Under DDP, ranks train on different samples and have the same seed, or, as where augmentation is to
differ between ranks, one each.

    python benchmarks/beside_model_pruning.py
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pl_prune as plp

ASKED = 0.5
BATCHES = 4  # optimizer steps in an epoch
SEED = 1
Found = dict[str, Any]  # what was measured -> sparsity, or what happened
Make = Callable[..., Callback]


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-2)


class NetWithMask(Net):
    """A module of a user who has a mask of his own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("attention_mask", torch.ones(4, 4).tril())


def loader(ranks: int) -> DataLoader:
    generator = torch.Generator().manual_seed(SEED)
    n = 16 * BATCHES * ranks
    return DataLoader(TensorDataset(torch.randn(n, 16, generator=generator), torch.arange(n) % 4), batch_size=16)


def first_epoch(epoch: int) -> bool:
    return epoch == 0


def model_pruning(**settings: Any) -> ModelPruning:
    return ModelPruning(**{
        "pruning_fn": "l1_unstructured",
        "amount": ASKED,
        "apply_pruning": first_epoch,
        **settings,
    })


def ours(**settings: Any) -> plp.GradualPruning:
    once = plp.OneShot(ASKED, start=BATCHES)
    return plp.GradualPruning(**{"criterion": plp.Magnitude(), "schedule": once, "rewind_to": 0, **settings})


def fit(
    *callbacks: Callback, folder: Path, epochs: int = 2, net: type[Net] = Net, ranks: int = 1, resume: Any = None
) -> Net:
    seed_everything(SEED, verbose=False)
    module = net()
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        logger=False,
        enable_checkpointing=saves,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=list(callbacks),
    )
    trainer.fit(module, loader(ranks), ckpt_path=resume)
    return module


def fit_and_save(pruner: Callback, folder: Path, net: type[Net] = Net) -> tuple[Net, dict[str, Tensor]]:
    """Return the module after two epochs, and the `state_dict` of the last checkpoint."""
    module = fit(pruner, ModelCheckpoint(folder, "last"), folder=folder, net=net)
    return module, torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]


def prunable(pruner: Callback) -> list[str]:
    """Name what a tool prunes: all parameters, or those with a mask."""
    return list(pruner.masks) if isinstance(pruner, plp.GradualPruning) else [n for n, _ in Net().named_parameters()]


def zero_fraction(tensors: Iterable[Tensor]) -> float:
    zeros = torch.cat([tensor.detach().flatten() == 0 for tensor in tensors])
    return zeros.double().mean().item()


def sparsity(pruner: Callback, module: Net) -> float:
    return zero_fraction(module.get_parameter(name) for name in prunable(pruner))


def outcome(action: Callable[[], Any]) -> Any:
    """What an action returns, or the error that ends it."""
    try:
        return action()
    except plp.PruneError as error:
        return f"refused: {one_line(error)}"
    except Exception as error:
        return f"{type(error).__name__}: {one_line(error)}"


def one_line(error: Exception, most: int = 120) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= most else text[:most] + "..."


def resume(make: Make, folder: Path) -> Found:
    whole, first, second = make(), make(), make()
    uninterrupted = sparsity(whole, fit(whole, folder=folder, epochs=3))
    _, saved = fit_and_save(first, folder)
    resumed = outcome(
        lambda: sparsity(second, fit(second, folder=folder, epochs=3, resume=folder / "last.ckpt"))
    )
    return {
        "in the checkpoint": zero_fraction(saved[name] for name in prunable(first)),
        "after the resume": resumed,
        "uninterrupted": uninterrupted,
    }


def load_strictly(make: Make, folder: Path) -> Found:
    _, saved = fit_and_save(make(), folder)
    return {"": outcome(lambda: Net().load_state_dict(saved, strict=True) and "loads")}


def load_strictly_model_pruning(_: Make, folder: Path) -> Found:
    found = {}
    for permanent in (False, True):
        how = f"make_pruning_permanent={permanent}"
        make = lambda: model_pruning(make_pruning_permanent=permanent)  # noqa: B023, E731
        found[how] = load_strictly(make, folder / how)[""]
    return found
