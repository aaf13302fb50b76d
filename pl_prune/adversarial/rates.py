"""`Rates`: the densities of layers that HARP learns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pl_prune.adversarial.scores import HARP

_MOMENTUM = 0.9


class Rates:
    """One learned density for each layer.

    Args:
        learner: Its settings.
        start: Density of each layer at first.
        costs: What each layer costs whole, as the budget counts it: its entries, or its multiply-accumulates.
        carriers: The parameter of each layer, whose optimizer says learning rate and weight decay.

    Attributes:
        raw: r, (layers,) of float64 on the CPU.
        density: k, that of the whole network.
        growing: Whether the factor of the budget's term still grows with the epochs.

    Source:
        HARP, equations 3 to 6; see `pl_prune.HARP`.
    """

    def __init__(
        self,
        learner: HARP,
        start: Mapping[str, float],
        costs: Mapping[str, float],
        carriers: Mapping[str, nn.Parameter],
    ) -> None:
        self._learner = learner
        self._carriers = carriers
        self._costs = torch.tensor([costs[name] for name in carriers], dtype=torch.float64)
        k = torch.tensor([start[name] for name in carriers], dtype=torch.float64)
        self.density = float((self._costs * k).sum() / self._costs.sum())
        least = learner.least * self.density
        self.raw = torch.logit(((k.clamp(max=0.99) - least) / (1 - least)).clamp_(min=1e-6))
        self.raw.requires_grad_()
        self._momentum: Tensor | None = None
        self.growing, self._factor = True, learner.weight

    def densities(self) -> Tensor:
        """Return k, (layers,), in the order of the parameters."""
        least = self._learner.least * self.density
        return torch.sigmoid(self.raw) * (1 - least) + least

    def by_layer(self) -> dict[str, float]:
        """Return the densities by layer."""
        return dict(zip(self._carriers, self.densities().detach().tolist(), strict=True))

    def excess(self) -> Tensor:
        """Return by which fraction the learned densities, as they are, exceed the budget; 0 within it."""
        return ((self._costs * self.densities()).sum() / (self.density * self._costs.sum()) - 1).clamp(min=0)

    def step(self, gradients: Mapping[str, Tensor | None], optimizer: Optimizer) -> None:
        """Step the densities.

        Args:
            gradients: dL/dk of the loss alone, by layer: the sum of dL/dM over its mask.
            optimizer: Whose learning rate and weight decay to use, those of each layer's group.
        """
        order = list(self._carriers)
        found = [(i, g) for i, name in enumerate(order) if (g := gradients.get(name)) is not None]
        if not found:
            return
        slope = torch.zeros(len(order), dtype=torch.float64)
        slope[[i for i, _ in found]] = torch.stack([g for _, g in found]).cpu().double()
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        mine = [groups.get(id(p), {}) for p in self._carriers.values()]
        rates, decay = (
            torch.tensor([float(group.get(key, 0)) for group in mine], dtype=torch.float64)
            for key in ("lr", "weight_decay")
        )
        with torch.enable_grad():
            loss = (self.densities() * slope).sum() + self._factor * self.excess()
            (gradient,) = torch.autograd.grad(loss, [self.raw])
        with torch.no_grad():
            gradient += decay * self.raw
            self._momentum = gradient if self._momentum is None else _MOMENTUM * self._momentum + gradient
            self.raw.sub_(rates * self._momentum)

    def begin_epoch(self, epoch: int) -> None:
        """Let the factor grow, unless the budget held at an epoch's end.

        Args:
            epoch: The number of the epoch that begins, from 0.
        """
        if epoch and round(float(self.excess().detach()), 4) == 0:
            self.growing = False
        if self.growing:
            self._factor = (epoch + 1) * self._learner.weight

    def state_dict(self) -> dict[str, Any]:
        """Return densities and their momentum.

        Returns:
            Tensors and plain containers only.
        """
        return {
            "raw": self.raw.detach().clone(),
            "momentum": None if self._momentum is None else self._momentum.clone(),
            "growing": self.growing,
            "factor": self._factor,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them back.

        Args:
            state: What `state_dict` returned.
        """
        with torch.no_grad():
            self.raw.copy_(state["raw"])
        self._momentum = None if state["momentum"] is None else state["momentum"].clone()
        self.growing, self._factor = bool(state["growing"]), float(state["factor"])
