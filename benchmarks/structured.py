"""Structured pruning: tracing, scoring, training a sliced network, and running it.

* `trace_groups` of torchvision's ResNet-50 and ViT-B/16 on one image of 224 pixels: limit 10 s each;
* PROscore of a CIFAR ResNet-56 / a plain forward and backward pass over the same samples, to all parameters: limit 1.15. Its
  filters are the scales and shifts of batch norms, so that it needs no gradient of a convolution; of rows of weights: the same
  limit. Beside them, without one, the form that the paper describes, which puts two scales for each filter into the network and
  differentiates by them; its scores are compared with ours;
* an epoch of that ResNet-56 once `StructuredPruning` has sliced half of the channels off every group, residual ones included / an
  epoch of the dense network, both inside a Trainer: limit 0.6;
* latency of torchvision's ResNet-18 with half of its channels sliced off / of the dense one, at batch 64, over the same ratio of
  multiply-accumulates: limit 1.5. Masked: without a limit.

    python benchmarks/structured.py [--repeats 3] [--samples 64] [--steps 3] [--pixels 112] [--cpu-time]
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import timing
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, relu
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, TensorDataset

import pl_prune as plp
from pl_prune.models import ResNet
from pl_prune.structure.probe import masked_copy

Batch = tuple[Tensor, Tensor]
HALF = plp.Layerwise()
NORM = plp.ByGroup(plp.Magnitude(), "l2")


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1])


def resnet56() -> nn.Module:
    """A network whose batch norms have seen data."""
    torch.manual_seed(0)
    model = ResNet(56)
    with torch.no_grad():
        model.train()(torch.randn(32, 3, 32, 32))
    return model.eval()


def tracing() -> None:
    import torchvision

    plp.trace_groups(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), torch.randn(1, 2))
    for name in ("resnet50", "vit_b_16"):
        torch.manual_seed(0)
        model, image = torchvision.models.get_model(name, weights=None).eval(), torch.randn(1, 3, 224, 224)
        start = timing.now()
        groups = plp.trace_groups(model, image)
        taken = timing.now() - start
        note = f"{len(groups)} groups, {sum(groups.sizes.values())} units"
        timing.line(f"trace_groups: {name}", timing.seconds(taken), "10 s", note)


class Scales(TorchFunctionMode):
    """D x - D' x + sigma(x) in the place of sigma(x), behind every batch norm, at D = D' = |(scale, shift)|."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.norms = {n: m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
        self.d = {
            n: torch.stack([m.weight, m.bias]).detach().norm(dim=0)[:, None, None].requires_grad_()
            for n, m in self.norms.items()
        }
        self.d_prime = {n: d.detach().clone().requires_grad_() for n, d in self.d.items()}
        self.before_relu: dict[int, tuple[str, Tensor]] = {}

    def __enter__(self) -> Scales:
        self.handles = [m.register_forward_hook(self.hook(n)) for n, m in self.norms.items()]
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for handle in self.handles:
            handle.remove()

    def hook(self, name: str) -> Callable[[nn.Module, Any, Tensor], Tensor | None]:
        def after(_: nn.Module, __: Any, out: Tensor) -> Tensor | None:
            if name.endswith("bn1"):
                self.before_relu[id(out)] = name, out
                return None
            return self.relaxed(name, out, out)

        return after

    def relaxed(self, name: str, x: Tensor, sigma: Tensor) -> Tensor:
        return self.d[name] * x - self.d_prime[name] * x + sigma

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is relu and id(args[0]) in self.before_relu:
            name, x = self.before_relu.pop(id(args[0]))
            return self.relaxed(name, x, out)
        return out


def injected(model: nn.Module, batches: list[Batch], lam: float) -> dict[str, Tensor]:
    """PROscore of every batch norm's channels, with the scales in the network."""
    model.zero_grad()
    samples = sum(len(y) for _, y in batches)
    with Scales(model) as scales:
        for x, y in batches:
            (loss(model, (x, y)) * len(y) / samples).backward()
    scores = {}
    for name, norm in scales.norms.items():
        filters = torch.stack([norm.weight, norm.bias], 1).detach()
        moved = filters - lam * torch.stack([norm.weight.grad, norm.bias.grad], 1)
        d, grad = scales.d[name].detach().flatten(), scales.d[name].grad.flatten()
        scores[name] = moved.norm(dim=1) / (d - lam * grad).abs()
    return scores


def plain(model: nn.Module, batches: list[Batch]) -> None:
    model.zero_grad()
    for batch in batches:
        loss(model, batch).backward()


def scoring(samples: int, repeats: int) -> None:
    model, x, y = resnet56(), torch.randn(samples, 3, 32, 32), torch.arange(samples) % 10
    with torch.no_grad():
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.bias.normal_(0, 0.1)
    size = plp.Samples().batch_size
    batches = list(zip(x.split(size), y.split(size), strict=True))
    groups = plp.trace_groups(model, x[:1])
    theirs = injected(model, batches, 1.0)
    ours = plp.score_groups(model, plp.PROscore(lam=1.0), groups, batches, loss)
    inner = [root for root in groups.sizes if root.endswith(".conv1")]  # with one norm each, and a ReLU behind it
    for root in inner:
        torch.testing.assert_close(ours[root], theirs[root.replace("conv1", "bn1")].double(), rtol=1e-3, atol=1e-4)
    times = timing.interleaved(
        {
            "plain": lambda: plain(model, batches),
            "PROscore": lambda: plp.score_groups(model, plp.PROscore(), groups, batches, loss),
            "rows": lambda: plp.score_groups(model, plp.PROscore(target="weight"), groups, batches, loss),
            "injected": lambda: injected(model, batches, 0.01),
        },
        repeats,
    )
    timing.ratio(times, "PROscore", "plain", "1.15", "PROscore / plain forward and backward, ResNet-56")
    timing.ratio(times, "rows", "plain", "1.15", "PROscore of rows of weights / plain")
    timing.ratio(times, "injected", "plain", "", "two scales for each filter put in / plain")


class Fit(LightningModule):
    def __init__(self, x: Tensor, y: Tensor, batch: int) -> None:
        super().__init__()
        self.network, self.data, self.batch = resnet56(), TensorDataset(x, y), batch

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch: Batch, _: int) -> Tensor:
        return loss(self, batch)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.data, self.batch, shuffle=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)


class Clock(Callback):
    """Seconds of the last epoch."""

    def on_train_epoch_start(self, *_: Any) -> None:
        self.start = timing.now()

    def on_train_epoch_end(self, *_: Any) -> None:
        self.seconds = timing.now() - self.start


def training(steps: int, repeats: int) -> None:
    x, y = torch.randn(steps * 128, 3, 32, 32), torch.arange(steps * 128) % 10
    times: timing.Times = {"dense": [], "sliced": []}
    channels = {}
    for round_ in range(repeats):
        for kind in sorted(times, reverse=bool(round_ % 2)):
            pruner, clock, module = plp.StructuredPruning(NORM, 0.5, allocation=HALF), Clock(), Fit(x, y, 128)
            with tempfile.TemporaryDirectory() as folder:
                callbacks = [clock] if kind == "dense" else [pruner, clock]
                Trainer(
                    max_epochs=2, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
                    enable_model_summary=False, enable_checkpointing=False, callbacks=callbacks, default_root_dir=folder,
                ).fit(module)  # fmt: skip
            times[kind].append(clock.seconds)  # of the second epoch
            channels[kind] = sum(len(m.weight) for m in module.modules() if isinstance(m, nn.Conv2d))
    share = channels["sliced"] / channels["dense"]
    timing.ratio(times, "sliced", "dense", "0.6", f"an epoch with {share:.0%} of ResNet-56's channels / with all")


def latency(pixels: int, repeats: int) -> None:
    import torchvision

    torch.manual_seed(0)
    model, images = torchvision.models.resnet18(weights=None).eval(), torch.randn(64, 3, pixels, pixels)
    groups = plp.trace_groups(model, images[:1])
    keep = plp.select_units(plp.score_groups(model, NORM, groups), groups, 0.5, allocation=HALF)
    masks = groups.expand(keep)
    small, masked = plp.shrink(model, masks, images[:1], groups), masked_copy(model, masks)
    left = groups.cost(keep)[1] / groups.cost({})[1]
    with torch.no_grad():
        times = timing.interleaved(
            {"dense": lambda: model(images), "masked": lambda: masked(images), "sliced": lambda: small(images)},
            repeats,
        )
    ratios = [a / b / left for a, b in zip(times["sliced"], times["dense"], strict=True)]
    middle = sorted(ratios)[len(ratios) // 2]
    note = f"{left:.3f} of the MACs; rounds {min(ratios):.3g} .. {max(ratios):.3g}"
    timing.line("ResNet-18, batch 64: latency ratio over MACs ratio", f"{middle:.3g}", "1.5", note)
    timing.ratio(times, "sliced", "dense", "", "the latencies: sliced / dense")
    timing.ratio(times, "masked", "dense", "", "the latencies: masked / dense")


def main() -> None:
    options = timing.parse(__doc__, repeats=3, samples=64, steps=3, pixels=112)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    tracing()
    scoring(options.samples, options.repeats)
    training(options.steps, options.repeats)
    latency(options.pixels, options.repeats)


if __name__ == "__main__":
    main()
