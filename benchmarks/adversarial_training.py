"""One TRADES step of a CIFAR ResNet-18, against the step written plainly as published.

Both attack by ten projected gradient steps, run the loss forwards and backwards, and step SGD, each on a network of its own
with the same weights and the same images. The published step runs the images anew in each of the ten steps, and twice more in
the loss; ours runs them once for the attack and once for the loss. Limit of ours / published: 0.75 (a maximum). Counted in
forward passes, with a backward pass to the images as one and to the weights as two, it is 27 / 39 = 0.69.

Beside it, without a limit: PGD-AT and Fast adversarial training of the same batch, a plain training step, and the whole
`AdversarialTraining` inside a Trainer / the same steps by hand.

    python benchmarks/adversarial_training.py [--device cuda] [--repeats 5] [--batch 16] [--cpu-time]
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable

import timing
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax, softmax
from torch.utils.data import DataLoader, TensorDataset

import pl_prune as plp
from pl_prune.models import ResNet

LOSS = plp.TRADES()
STEPS = 4  # of the Trainer


def network(device: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = ResNet(18).to(device)
    return model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)


def published_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    model.eval()
    moved = x + 0.001 * torch.randn_like(x)
    for _ in range(LOSS.steps):
        moved = moved.detach().requires_grad_()
        divergence = kl_div(log_softmax(model(moved), 1), softmax(model(x), 1), reduction="sum")
        (gradient,) = torch.autograd.grad(divergence, moved)
        moved = moved.detach() + LOSS.step_size * gradient.sign()
        moved = torch.clamp(torch.min(torch.max(moved, x - LOSS.eps), x + LOSS.eps), 0, 1)
    model.train()
    optimizer.zero_grad()
    natural = cross_entropy(model(x), y)
    robust = kl_div(log_softmax(model(moved.detach()), 1), softmax(model(x), 1), reduction="batchmean")
    (natural + LOSS.beta * robust).backward()
    optimizer.step()


def our_step(loss: plp.RobustLoss, model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    model.train()
    moved = loss.examples(model, x, y)
    optimizer.zero_grad()
    loss(model, x, y, moved).backward()
    optimizer.step()


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net, _ = network("cpu")

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)


def trained(device: str, x: Tensor, y: Tensor) -> Callable[[], None]:
    data = DataLoader(TensorDataset(x.cpu().repeat(STEPS, 1, 1, 1), y.cpu().repeat(STEPS)), len(x))
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")

    def run() -> None:
        with tempfile.TemporaryDirectory() as folder:
            kind = "gpu" if torch.device(device).type == "cuda" else "cpu"
            callbacks = [plp.AdversarialTraining(LOSS)]
            trainer = Trainer(
                accelerator=kind, devices=1, max_epochs=1, callbacks=callbacks, default_root_dir=folder, **quiet
            )
            trainer.fit(Module(), data)

    return run


def main() -> None:
    options = timing.parse(__doc__, repeats=5, batch=16)
    device = options.device
    torch.manual_seed(1)
    x, y = torch.rand(options.batch, 3, 32, 32, device=device), torch.arange(options.batch, device=device) % 10
    steps: dict[str, Callable[[], object]] = {}
    theirs = network(device)
    steps["published TRADES"] = lambda: published_step(*theirs, x, y)
    for name, loss in {
        "TRADES": LOSS,
        "PGD-AT": plp.PGDAT(),
        "Fast": plp.FastAT(),
        "plain": plp.CrossEntropy(),
    }.items():
        ours = network(device)
        steps[name] = lambda loss=loss, ours=ours: our_step(loss, *ours, x, y)  # type: ignore[misc]
    times = timing.interleaved(steps, options.repeats, device)
    timing.ratio(times, "TRADES", "published TRADES", "0.75", "one TRADES step: ours / published")
    timing.ratio(times, "PGD-AT", "TRADES", "", "PGD-AT / TRADES")
    timing.ratio(times, "Fast", "TRADES", "", "Fast adversarial training / TRADES")
    timing.ratio(times, "TRADES", "plain", "", "TRADES / plain training step")
    by_hand = network(device)

    def four_steps() -> None:
        for _ in range(STEPS):
            our_step(LOSS, *by_hand, x, y)

    times = timing.interleaved({"Trainer": trained(device, x, y), "by hand": four_steps}, max(2, options.repeats // 2))
    timing.ratio(times, "Trainer", "by hand", "", f"{STEPS} TRADES steps: fit with AdversarialTraining / by hand")


if __name__ == "__main__":
    main()
