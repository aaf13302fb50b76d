"""`Hesso`: units that shrink to zero while any optimizer trains the others."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pl_prune.core import sync
from pl_prune.core.masks import MaskSet
from pl_prune.core.types import PruneError, plain
from pl_prune.optim.attach import Enforcement
from pl_prune.optim.cric import CRIC, Walk
from pl_prune.optim.pace import Budget, Pace
from pl_prune.optim.saliency import Saliency, gather
from pl_prune.optim.units import Rows, stepped

_NUMBERS = ("steps", "period", "done", "running", "share")


class Hesso:
    """HESSO around an optimizer's steps: choose units, shrink them linearly to zero, and keep them there.

    At the start of each period the units of lowest saliency are chosen among those left. After the t-th of the period's T steps their
    norm is (T - t)/T of what it was, whatever the optimizer did to them; after the last they are zero. All other weights
    are the optimizer's own business.

    Args:
        params: All parameters of the network by name (`plain`), on one device.
        optimizers: The optimizers that step them.
        budget: How many units go.
        pace: When.
        saliency: How they are scored.
        cric: How they are looked at again before they go, all at once; the pace has one period then.

    Attributes:
        steps: Real steps so far of the last optimizer that steps units; steps on trial do not count.
        period: The number of the period to come, or that is running.
        done: Steps of it so far.
        running: Whether units are shrinking.
        share: Which fraction of the saliency of the units that were left the last choice held.
        status: 0 for units that stay so far, 1 for those that are shrinking, 2 for those that are zero, (size,) of uint8.
        enforcement: What keeps them there.
        committed: What to call when more units are zero.

    Raises:
        PruneError: If the parameters of a unit are stepped by two optimizers, or CRIC meets two.

    Source:
        HESSO, algorithms 1 and 3. Divergences: K and the steps are split over periods to whole numbers that differ by one at
        most; projections start from the norm at the time of choice, which is the same as the product of the paper's ratios; zeros are
        written, not multiplied, and kept, and optimizers forget the momenta of units that are zero.
    """

    def __init__(
        self,
        params: Mapping[str, nn.Parameter],
        optimizers: Iterable[Optimizer],
        budget: Budget,
        pace: Pace,
        saliency: Saliency,
        cric: CRIC | None = None,
    ) -> None:
        self.params, self.optimizers = params, list(optimizers)
        self.units, self.budget, self.pace, self.saliency, self.cric = budget.units, budget, pace, saliency, cric
        families = stepped(params, self.optimizers)
        self._names = {i: families[i] for i in self.units.owners(families) if i is not None}
        self._lead = max(self._names, default=None)
        if cric is not None and len(self.optimizers) > 1:
            raise PruneError(
                f"Expected one optimizer with CRIC, since all gradients are withheld from it on trial; found {len(self.optimizers)}. "
                "Leave CRIC out, or choose units beforehand by `pl_prune.cric`."
            )
        self.status = torch.zeros(self.units.size, dtype=torch.uint8)
        self.steps = self.period = self.done = 0
        self.running, self.share = False, 0.0
        self._norms = torch.zeros(self.units.size, dtype=self.units.dtype, device=self.units.device)
        self._seen: dict[int, Tensor] = {}  # statistics by optimizer, until all have given theirs
        self._withheld = False
        self._inside = False
        self.walk: Walk | None = None
        self.enforcement = Enforcement({name: params[name] for name in self.units.names}, MaskSet({}))
        self.committed: Callable[[], None] = lambda: None
        self._take()

    @property
    def due(self) -> bool:
        """Whether units are to be chosen at the next step."""
        left = self.period < len(self.pace.lengths) and self.budget.removal > 0
        return left and not self.running and self.steps >= self.pace.start

    @property
    def finished(self) -> bool:
        """Whether all units that are to go are zero."""
        return self.period >= len(self.pace.lengths) or not self.budget.removal

    def keep(self) -> dict[str, Tensor]:
        """Return which units are not zero yet, (size,) of bool by root."""
        return self.units.by_root(self.status != 2)

    def masks(self) -> MaskSet:
        """Return masks over parameters that keep every unit that is not zero yet."""
        masks = self.units.groups.expand(self.keep())
        return MaskSet({plain(name): mask for name, mask in masks.items()})

    def norm_left(self) -> float:
        """Return the norm of shrinking units as a fraction of that at their choice; 0 where none shrinks."""
        length = self.pace.lengths[self.period] if self.running else 1
        return (length - self.done) / length if self.running else 0.0

    def before_step(self, optimizer: Optimizer) -> None:
        """Choose units if they are due; gradients are there.

        Args:
            optimizer: The optimizer about to step.
        """
        self._withheld = False
        number = self._number(optimizer)
        if number is None or not self.due:
            return
        grads = self._grads(number)
        if self.cric is not None:
            self._sample(optimizer, grads)
            return
        self._seen[number] = gather(self.units, self.params, grads, self._names[number])
        if self._seen.keys() == self._names.keys():
            statistics = torch.stack(list(self._seen.values())).sum(0)
            self._seen = {}
            self._begin(self.saliency.score(statistics, self.units.entries, self.status == 0))

    def after_step(self, optimizer: Optimizer) -> None:
        """Bring units that are shrinking to their norm.

        Args:
            optimizer: The optimizer that has stepped.
        """
        number = self._number(optimizer)
        if number is None or self._withheld:
            return
        if number == self._lead:
            self.steps += 1
            self.done += self.running
        if not self.running:
            return
        if self.done < self.pace.lengths[self.period]:
            self._rows.scale_to_(self.params, self._goal * self.norm_left())
            return
        self._rows.fill_(self.params)
        self.running, self.done, self.period = False, 0, self.period + 1
        if bool((self.status == 1).any()):
            self.status[self.status == 1] = 2
            self.enforcement.change(self.masks(), self.optimizers)
        self.committed()

    def held(self, optimizer: Optimizer) -> float:
        """Say which share of all saliency the shrinking units hold now: it goes over to the others as they shrink.

        Args:
            optimizer: The optimizer about to step, by whose gradients units are scored; another's count as zero.

        Returns:
            In [0, 1]; NaN where scores are not finite, or sum up to zero.
        """
        number = self._number(optimizer)
        if number is None or not self.running:
            return 0.0
        there = self.status < 2
        scores = self.saliency.score(gather(self.units, self.params, self._grads(number)), self.units.entries, there)
        return float("nan") if scores is None else float(scores[self.status == 1].sum() / scores[there].sum())

    def enter(self) -> bool:
        """Put the point of CRIC in place of the weights, where it is due.

        Returns:
            Whether it is there now.
        """
        if self.cric is not None and self.due and not self._inside:
            if self.walk is None:
                self.walk = self._start_walk()
            self.walk.swap()
            self._inside = True
        return self._inside

    def leave(self) -> None:
        """Put the weights back, if the point of CRIC is in their place."""
        if self._inside and self.walk is not None:
            self.walk.swap()
        self._inside = False

    def weights(self) -> Mapping[str, Tensor]:
        """Return the weights whose place is taken by the point of CRIC now, by name."""
        return self.walk.point if self._inside and self.walk is not None else {}

    def state_dict(self) -> dict[str, Any]:
        """Return tensors, numbers and plain containers.

        Returns:
            What `load_state_dict` takes.
        """
        return {
            **{name: getattr(self, name) for name in _NUMBERS},
            "pace": [self.pace.start, *self.pace.lengths],
            "status": self.status.clone(),
            "norms": self._norms.cpu(),
            "seen": {number: tensor.cpu() for number, tensor in self._seen.items()},
            "walk": None if self.walk is None else self.walk.state_dict(self._inside),
            "fingerprint": self._fingerprint(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another run stopped; its weights and optimizer states are loaded by others.

        Args:
            state: What `state_dict` returned.

        Raises:
            PruneError: If the state is that of other groups.
        """
        if state["fingerprint"] != self._fingerprint():
            raise PruneError(
                f"Expected the state of these {len(self.units.groups)} groups ({self.units.size} units); found that of others. "
                "Trace the network with the same `include` and `exclude`, or start anew."
            )
        for name in _NUMBERS:
            setattr(self, name, type(getattr(self, name))(state[name]))
        self.pace = Pace(int(state["pace"][0]), tuple(map(int, state["pace"][1:])))
        self.status = state["status"].clone()
        self._norms = state["norms"].to(self.units.device)
        self._seen = {int(number): tensor.to(self.units.device) for number, tensor in state["seen"].items()}
        self._take()
        if state["walk"] is not None:
            self.walk = self._start_walk()
            self.walk.load_state_dict(state["walk"])
        if bool((self.status == 2).any()):
            self.enforcement.change(self.masks(), self.optimizers)

    def _number(self, optimizer: Optimizer) -> int | None:
        return next((i for i in self._names if self.optimizers[i] is optimizer), None)

    def _grads(self, number: int) -> dict[str, Tensor]:
        return {n: p.grad for n in self._names[number] if (p := self.params[n]).grad is not None}

    def _begin(self, scores: Tensor | None) -> None:
        """Start a period with the units that rank 0 calls the lowest; without finite scores, try again at the next step."""
        here = self.status == 0
        choice = None
        if scores is not None:
            chosen = self.budget.lowest(scores, ~here, self.period, len(self.pace.lengths))
            total = float(scores[here].sum())
            choice = chosen, float(scores[chosen].sum()) / total if total else 0.0
        choice = sync.of_rank_zero(choice)
        if choice is None:
            return
        chosen, self.share = choice
        self.status[chosen] = 1
        self._norms = self.units.sums(self.params, self.params).sqrt()
        self.running, self.done = True, 0
        self._take()

    def _take(self) -> None:
        chosen = (self.status == 1).nonzero()[:, 0]
        self._rows, self._goal = Rows(self.units, chosen), self._norms[chosen.to(self._norms.device)]

    def _start_walk(self) -> Walk:
        assert self.cric is not None
        moving = {n: self.params[n] for n in stepped(self.params, self.optimizers)[0]}
        return Walk(moving, self.units, self.saliency, self.budget, self.cric)

    def _sample(self, optimizer: Optimizer, grads: Mapping[str, Tensor]) -> None:
        """Give CRIC the gradients, and the optimizer none."""
        self.leave()
        assert self.walk is not None
        rates = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
        self.walk.sample(grads, {name: rates[id(self.params[name])] for name in grads})
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = None
        self._withheld = True
        if self.walk.cycle.finished:
            scores, self.walk = self.walk.cycle.scores, None
            self._begin(scores)

    def _fingerprint(self) -> str:
        groups = self.units.groups
        members = [(m.name, m.dim, groups.shapes[m.name]) for g in groups for m in g.members if m.kind == "out"]
        return hashlib.sha256(repr((groups.sizes, members)).replace("_orig_mod.", "").encode()).hexdigest()
