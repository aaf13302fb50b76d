"""What HESSO costs in training: a CIFAR ResNet-18 (11.2 million parameters, 2,880 units), SGD with momentum and decay.

* time inside HESSO's hooks over the whole step: before pruning (limit 0), while units shrink (limit 0.05, periods of 40 steps, the
  choice and the commit counted in), after the last one is zero (limit 0.01);
* bytes that it adds per parameter: limit 1 and a few vectors of one number per unit;
* a step of CRIC over the same step, which is not limited: its hooks copy all weights four times.

    python benchmarks/hesso.py [--device cuda] [--batch 128] [--repeats 5] [--cpu-time]
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import timing
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Optimizer

import pl_prune
from pl_prune.models import ResNet
from pl_prune.optim.hesso import Hesso
from pl_prune.optim.pace import Budget, Pace
from pl_prune.optim.saliency import Saliency
from pl_prune.optim.units import Units

LENGTH = 40  # steps of a period: CIFAR-10 for 100 epochs at batch 128, a tenth of them in 10 periods, has 390


class TimedHesso(Hesso):
    """HESSO, with a clock around everything that it does in a step."""

    spent = 0.0

    def before_step(self, optimizer: Optimizer) -> None:
        self._timed(lambda: (self.enforcement.zero_grads(), super(TimedHesso, self).before_step(optimizer)))

    def after_step(self, optimizer: Optimizer) -> None:
        self._timed(lambda: (self.enforcement.zero_weights(), super(TimedHesso, self).after_step(optimizer)))

    def _timed(self, action: Callable[[], Any]) -> None:
        start = timing.now(str(self.units.device))
        action()
        self.spent += timing.now(str(self.units.device)) - start


class Training:
    def __init__(
        self, device: str, batch: int, cric: pl_prune.CRIC | None = None, start: int = 0, periods: int = 10
    ) -> None:
        torch.manual_seed(0)
        self.model = ResNet(18).to(device)
        self.optimizer = SGD(self.model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        self.inputs, self.targets = torch.randn(batch, 3, 32, 32, device=device), torch.randint(10, (batch,)).to(device)
        live = dict(self.model.named_parameters())
        groups = pl_prune.trace_groups(self.model, self.inputs[:1])
        budget = Budget(Units(groups, live), 0.7, "groups", 1)
        pace = Pace(start, (LENGTH,) * periods)
        self.hesso = TimedHesso(live, [self.optimizer], budget, pace, Saliency(), cric)

    def step(self) -> None:
        self.hesso.enter()
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(self.inputs), self.targets).backward()
        self.hesso.before_step(self.optimizer)
        self.optimizer.step()
        self.hesso.after_step(self.optimizer)

    def skip(self, steps: int) -> None:
        """Let HESSO pass some steps without training between them."""
        for p in self.model.parameters():
            p.grad = torch.randn_like(p)
        for _ in range(steps):
            self.hesso.before_step(self.optimizer)
            self.hesso.after_step(self.optimizer)


def inside(training: Training, repeats: int, device: str) -> timing.Times:
    times: timing.Times = {"inside": [], "step": []}
    for round_ in range(repeats + 1):
        training.hesso.spent = 0.0
        start = timing.now(device)
        training.step()
        if round_:
            times["inside"].append(training.hesso.spent)
            times["step"].append(timing.now(device) - start)
    return times


def tensor_bytes() -> int:
    """Bytes of all tensors that are alive, each storage once."""
    gc.collect()
    alive = (o for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter))
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in alive}.values())


def main() -> None:
    options = timing.parse(__doc__, repeats=5, batch=128)
    device, repeats = options.device, options.repeats
    training = Training(device, options.batch, start=repeats + 2)
    size = sum(p.numel() for p in training.model.parameters())
    print(f"ResNet-18, {size:,} parameters, {training.hesso.units.size:,} units, 70 % of them; batch {options.batch}\n")
    timing.ratio(inside(training, repeats, device), "inside", "step", "0", "hooks / step: before pruning")

    training.optimizer.zero_grad()
    training.hesso.pace = Pace(0, training.hesso.pace.lengths)
    bytes_before = tensor_bytes()
    shrinking = inside(training, repeats, device)
    events: timing.Times = {"inside": [], "step": shrinking["step"]}
    for _ in range(repeats):  # one whole period of hooks, with its choice and its commit
        training.hesso.spent = 0.0
        training.skip(LENGTH)
        events["inside"].append(training.hesso.spent / LENGTH)
    timing.ratio(shrinking, "inside", "step", "", "hooks / step: while units shrink, a step in the middle of a period")
    timing.ratio(events, "inside", "step", "0.05", "hooks / step: while units shrink, mean over whole periods")

    while not training.hesso.finished:
        training.skip(LENGTH)
    timing.ratio(
        inside(training, repeats, device), "inside", "step", "0.01", "hooks / step: after the last unit is zero"
    )
    training.optimizer.zero_grad()
    added = tensor_bytes() - bytes_before  # the optimizer's momenta were there before
    timing.line("bytes added per parameter, of 4 for its weight", f"{added / size:.3f}", "1")

    trial = Training(device, options.batch, pl_prune.CRIC(), periods=1)
    times = inside(trial, repeats, device)
    plain = inside(Training(device, options.batch, start=10**6), repeats, device)
    times["plain"] = plain["step"]
    timing.ratio(times, "step", "plain", what="a step of CRIC / a plain step")


if __name__ == "__main__":
    main()
