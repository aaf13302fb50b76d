"""One step of score learning on a CIFAR ResNet-18 at sparsity 0.9 under TRADES with PGD-10, against HYDRA's step as published.

The published step has scores as parameters behind a straight-through estimator that sorts them in every forward pass, runs the images
anew in each of the ten attack steps, and twice more in the loss. Sorting takes most of it on a CPU, so the same step that sorts once
stands beside it, without a limit. Ours are steps inside a Trainer, every hook of Lightning included. Limits
of ours / published: HYDRA 0.75, S2AP 0.92, S2AP with reuse 0.78 (maxima; S2AP of the paper is 1.21). Beside them, without a limit:
HARP, and fine-tuning with AWP / without.

Bytes held beside the model, by selected weight: at most 9 for scores, weights and marks, 13 with reuse.

    python benchmarks/adversarial.py [--device cuda] [--repeats 5] [--batch 8] [--cpu-time]
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable
from math import sqrt
from typing import Any

import timing
import torch
from adversarial_training import published_step as trades_step
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import pl_prune as plp
from pl_prune.models import ResNet

LOSS = plp.TRADES()
SPARSITY = 0.9
STEPS = 3  # of each fit; the first is not counted


class Sorted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, density: float, made: Tensor | None) -> Tensor:
        if made is not None:
            return made.clone()
        out = scores.clone()
        _, order = scores.flatten().sort()
        cut = int((1 - density) * scores.numel())
        flat = out.flatten()
        flat[order[:cut]] = 0
        flat[order[cut:]] = 1
        return flat.view_as(scores)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient, None, None


class Scored(nn.Module):
    """A layer whose scores are parameters."""

    made: Tensor | None = None

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        weight = layer.weight.detach()
        del layer.weight
        self.layer, self.weight = layer, weight
        self.scores = nn.Parameter(weight * sqrt(6 / weight[0].numel()) / weight.abs().max())

    def forward(self, x: Tensor) -> Tensor:
        self.layer.weight = self.weight * Sorted.apply(self.scores.abs(), 1 - SPARSITY, self.made)  # type: ignore[no-untyped-call]
        return self.layer(x)  # type: ignore[no-any-return]


def network(device: str) -> nn.Module:
    torch.manual_seed(0)
    return ResNet(18).to(device)


def scored(model: nn.Module) -> nn.Module:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, (nn.Conv2d, nn.Linear)):
                setattr(module, name, Scored(child))
    return model


def published_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, once: bool = False
) -> None:
    layers = [module for module in model.modules() if isinstance(module, Scored)]
    for layer in layers:
        layer.made = None
        if once:
            layer.made = Sorted.apply(layer.scores.detach().abs(), 1 - SPARSITY, None)  # type: ignore[no-untyped-call]
    trades_step(model, optimizer, x, y)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 0.1, momentum=0.9, weight_decay=1e-4)


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = network("cpu")

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return sgd(self.parameters())


class Clock(Callback):
    """From the end of a batch to the end of the next one."""

    def __init__(self, device: str, times: list[float]) -> None:
        self.device, self.times, self.before = device, times, 0.0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        now = timing.now(self.device)
        if self.before:
            self.times.append(now - self.before)
        self.before = now


class Held(Callback):
    """Bytes of scores, weights and marks by selected weight."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, plp.ScoreLearning) and (found := callback.scored):
                held = [*found.weights.values(), *found.scores.values(), *found._marks.values()]
                if isinstance(callback, plp.S2AP):
                    held += [*(callback._gradient or {}).values(), *(callback._z or {}).values()]
                size = sum(p.numel() for p in found.params.values())
                self.bytes = sum(t.numel() * t.element_size() for t in held) / size


def fit(device: str, x: Tensor, y: Tensor, times: list[float], *callbacks: Callback) -> None:
    data = DataLoader(TensorDataset(x.cpu().repeat(STEPS, 1, 1, 1), y.cpu().repeat(STEPS)), len(x))
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    kind = "gpu" if torch.device(device).type == "cuda" else "cpu"
    used = [*callbacks, plp.AdversarialTraining(LOSS), Clock(device, times)]
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(accelerator=kind, devices=1, max_epochs=1, callbacks=used, default_root_dir=folder, **quiet)
        trainer.fit(Module(), data)


def main() -> None:
    options = timing.parse(__doc__, repeats=5, batch=8)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    device = options.device
    torch.manual_seed(1)
    x, y = torch.rand(options.batch, 3, 32, 32, device=device), torch.arange(options.batch, device=device) % 10
    held = {name: Held() for name in ("HYDRA", "S2AP", "S2AP reuse")}
    arms: dict[str, Callable[[], list[Callback]]] = {
        "HYDRA": lambda: [plp.ScoreLearning(SPARSITY), held["HYDRA"]],
        "S2AP": lambda: [plp.S2AP(SPARSITY, warmup_epochs=0), held["S2AP"]],
        "S2AP reuse": lambda: [plp.S2AP(SPARSITY, warmup_epochs=0, perturbation="reuse"), held["S2AP reuse"]],
        "HARP": lambda: [plp.ScoreLearning(SPARSITY, plp.HARP())],
        "fine-tuning": lambda: [plp.PruneAtInit(plp.Magnitude(), SPARSITY)],
        "AWP": lambda: [plp.PruneAtInit(plp.Magnitude(), SPARSITY), plp.AWP()],
    }
    theirs = scored(network(device))
    optimizer = sgd(theirs.parameters())
    published = {"published HYDRA": False, "published, sorted once": True}
    times: timing.Times = {name: [] for name in (*published, *arms)}
    for round_ in range(options.repeats):
        for name in list(times) if round_ % 2 else reversed(list(times)):
            if name in arms:
                fit(device, x, y, times[name], *arms[name]())
                continue
            for step in range(STEPS):
                start = timing.now(device)
                published_step(theirs, optimizer, x, y, published[name])
                if step:
                    times[name].append(timing.now(device) - start)
    timing.ratio(times, "HYDRA", "published HYDRA", "0.75", "one HYDRA step: ours / published")
    timing.ratio(times, "S2AP", "published HYDRA", "0.92", "one S2AP step / HYDRA as published")
    timing.ratio(times, "S2AP reuse", "published HYDRA", "0.78", "one S2AP step with reuse / HYDRA as published")
    for name in ("HYDRA", "S2AP", "S2AP reuse"):
        timing.ratio(times, name, "published, sorted once", "", f"one {name} step / HYDRA as published but sorted once")
    timing.ratio(times, "HARP", "published HYDRA", "", "one HARP step: ours / HYDRA as published")
    timing.ratio(times, "AWP", "fine-tuning", "", "one fine-tuning step with AWP / without")
    for name, found in held.items():
        print(
            f"{name}: {found.bytes:.3f} bytes beside the model by selected weight (limit {13 if 'reuse' in name else 9})"
        )


if __name__ == "__main__":
    main()
