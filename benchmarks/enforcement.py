"""What masks cost in training: a CIFAR ResNet-18 (11.2 million parameters), batch 128, SGD with momentum and decay.

* time inside pl_prune's enforcement (gradients before the step, weights after it) over the whole step: limit 0.01;
* a step under `pl_prune.attach_masks` over the same step under `torch.nn.utils.prune`, one mask on every
  convolution: limit below 1. The dense step stands beside it, and so do the two ways of masking without the rest of
  the step, since the difference of the steps is of the size of a busy machine's noise;
* bytes of mask in memory per selected parameter: limit 1; bits per selected parameter in a checkpoint: about 1.

    python benchmarks/enforcement.py [--device cuda] [--batch 128] [--repeats 5] [--cpu-time]
"""

from __future__ import annotations

import gc
import io
from collections.abc import Callable

import timing
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.optim import SGD

import pl_prune
from pl_prune.optim.attach import Enforcement

SPARSITY = 0.9


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


def resnet18(device: str) -> nn.Module:
    torch.manual_seed(0)
    blocks, channels = [], 64
    for width, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        blocks += [Block(channels, width, stride), Block(width, width, 1)]
        channels = width
    stem = (nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10)).to(device)


class TimedEnforcement(Enforcement):
    """The enforcement of the callbacks, with a clock around everything it does in a step."""

    spent = 0.0

    def zero_weights(self) -> None:
        self._timed(super().zero_weights)

    def zero_grads(self) -> None:
        self._timed(super().zero_grads)

    def _timed(self, action: Callable[[], None]) -> None:
        device = str(next(iter(self.params.values())).device)
        start = timing.now(device)
        action()
        self.spent += timing.now(device) - start


def as_callbacks_do(model: nn.Module, optimizer: SGD, masks: pl_prune.MaskSet) -> TimedEnforcement:
    live = dict(model.named_parameters())
    enforcement = TimedEnforcement({name: live[name] for name in masks}, masks)
    enforcement.attach([optimizer], gradient_hooks=False)
    optimizer.register_step_pre_hook(lambda *_: enforcement.zero_grads())
    return enforcement


def reparametrize(model: nn.Module, masks: pl_prune.MaskSet) -> list[nn.Module]:
    """The peer; `weight_orig` is the parameter object that the optimizer has."""
    layers = [model.get_submodule(name.removesuffix(".weight")) for name in masks]
    for layer, mask in zip(layers, masks.values(), strict=True):
        prune.custom_from_mask(layer, "weight", mask)
    return layers


class Training:
    def __init__(self, device: str, batch: int) -> None:
        self.model = resnet18(device)
        self.optimizer = SGD(self.model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        torch.manual_seed(1)
        self.inputs, self.targets = torch.randn(batch, 3, 32, 32, device=device), torch.randint(10, (batch,)).to(device)

    def step(self) -> None:
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(self.inputs), self.targets).backward()
        self.optimizer.step()


def product(layers: list[nn.Module]) -> None:
    """What `torch.nn.utils.prune` adds to a step: the product with the mask, forwards and backwards."""
    weights = [layer.weight_orig * layer.weight_mask for layer in layers]
    torch.autograd.grad(weights, [layer.weight_orig for layer in layers], [layer.weight_orig.grad for layer in layers])


def mask_bytes() -> int:
    """Bytes of all boolean tensors that are alive, each storage once."""
    gc.collect()
    alive = (o for o in gc.get_objects() if type(o) is Tensor and o.dtype == torch.bool)
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in alive}.values())


def main() -> None:
    options = timing.parse(__doc__, repeats=5, batch=128)
    dense, ours, timed, peer = (Training(options.device, options.batch) for _ in range(4))
    before = mask_bytes()
    masks = pl_prune.Global()(pl_prune.score(dense.model, pl_prune.Magnitude()), SPARSITY)
    selected = sum(total for _, total in masks.counts().values())
    print(
        f"ResNet-18, {sum(p.numel() for p in dense.model.parameters()):,} parameters, {selected:,} selected, "
        f"sparsity {SPARSITY}; batch {options.batch}\n"
    )

    timing.line("bytes per selected parameter: MaskSet", f"{(mask_bytes() - before) / selected:.3f}", "1")
    enforcement = as_callbacks_do(timed.model, timed.optimizer, masks)
    timing.line(
        "bytes per selected parameter: enforced as callbacks do", f"{(mask_bytes() - before) / selected:.3f}", "1"
    )
    pl_prune.attach_masks(ours.optimizer, ours.model, masks)
    timing.line("bytes per selected parameter: after attach_masks", f"{(mask_bytes() - before) / selected:.3f}", "1")
    layers = reparametrize(peer.model, masks)
    added = sum(layer.weight_mask.nbytes + layer.weight.nbytes for layer in layers)
    timing.line("bytes per selected parameter: torch.nn.utils.prune", f"{added / selected:.3f}")
    file = io.BytesIO()
    torch.save(masks.state_dict(), file)
    timing.line("bits per selected parameter in a checkpoint", f"{8 * file.tell() / selected:.4f}", "about 1")

    inside: list[float] = []

    def timed_step() -> None:
        enforcement.spent = 0.0
        timed.step()
        inside.append(enforcement.spent)

    times = timing.interleaved(
        {
            "dense": dense.step,
            "attach_masks": ours.step,
            "timed": timed_step,
            "torch.nn.utils.prune": peer.step,
        },
        options.repeats,
        options.device,
    )
    times["inside"] = inside[1:]
    timing.ratio(times, "inside", "timed", "0.01", "time inside the enforcement / whole step")
    timing.ratio(times, "attach_masks", "torch.nn.utils.prune", "below 1", "step: attach_masks / torch.nn.utils.prune")
    timing.ratio(times, "attach_masks", "dense", what="step: attach_masks / dense")
    timing.ratio(times, "torch.nn.utils.prune", "dense", what="step: torch.nn.utils.prune / dense")

    def fill() -> None:
        enforcement.zero_grads()
        enforcement.zero_weights()

    alone = timing.interleaved({"fill": fill, "product": lambda: product(layers)}, 5 * options.repeats, options.device)
    timing.ratio(alone, "fill", "product", "below 1", "masking alone: pl_prune / torch.nn.utils.prune")


if __name__ == "__main__":
    main()
