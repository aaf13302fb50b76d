"""`Scored`: scores that an optimizer steps in the place of parameters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pl_prune.adversarial.rates import Rates
from pl_prune.core.masks import MaskSet
from pl_prune.core.types import PruneError


class Scored(ABC):
    """Scores that an optimizer learns in the place of parameters.

    Around an optimizer's step, gradients become those of scores and values become scores (`enter`); behind it the scores are read
    and w0 * M(s) is put back (`leave`).

    Args:
        params: The parameters, by name.
        weights: w0 by name; of norms that train, their values where they are masked too.
        scores: s by layer.
        seen: What `state_dict` returned, to go on from there; None: begin.

    Attributes:
        params: The parameters.
        weights: w0.
        scores: s.
        rates: The densities that HARP learns; None for other learners.
        moved: Whether parameters hold a moved network now.

    Raises:
        PruneError: If a parameter is of low precision, or the state is of other parameters.
    """

    rates: Rates | None

    def __init__(
        self,
        params: Mapping[str, nn.Parameter],
        weights: dict[str, Tensor],
        scores: dict[str, Tensor],
        seen: Mapping[str, Any] | None,
    ) -> None:
        self.params, self.weights, self.scores = params, weights, scores
        self._entered: dict[str, Tensor | None] = {}  # gradients of densities, of layers that hold scores now
        self.moved = False
        if seen is not None:
            self._check(seen)
            for held, found in ((weights, seen["weights"]), (scores, seen["scores"])):
                held.update({name: found[name].to(t, copy=True) for name, t in held.items()})
            if self.rates is not None:
                self.rates.load_state_dict(seen["rates"])
        self.put()

    @property
    @abstractmethod
    def counts(self) -> dict[str, int]:
        """How many each layer keeps now."""

    @property
    @abstractmethod
    def carriers(self) -> Mapping[str, nn.Parameter]:
        """The parameter in whose place each layer's scores are stepped."""

    @abstractmethod
    def masks(self) -> MaskSet:
        """Return masks over parameters for s, whatever the parameters hold at the moment."""

    @abstractmethod
    def kept(self, name: str) -> Tensor:
        """Return which entries of a parameter are in the network as it is.

        Args:
            name: Its name.

        Returns:
            A mask of its shape.
        """

    @abstractmethod
    def put(self, moves: Mapping[str, Tensor] | None = None) -> None:
        """Put w0 * M(s), or w0 * M(s + z), into the parameters.

        Args:
            moves: z by layer; None: no move.
        """

    @abstractmethod
    def score_gradients(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the straight-through gradients of scores, where the network is.

        Args:
            gradients: dL/dw by parameter.

        Returns:
            By layer.
        """

    @abstractmethod
    def enter(self, optimizer: Optimizer, normalize: bool = False) -> None:
        """Give an optimizer that is about to step the scores and their gradients.

        Args:
            optimizer: The optimizer; its gradients are there.
            normalize: Divide the gradient of all scores together by its length.
        """

    @abstractmethod
    def take(self, layer: str) -> Tensor:
        """Return the scores of a layer out of its parameter, where an optimizer has stepped them.

        Args:
            layer: Its name.

        Returns:
            Of the shape of the scores.
        """

    @property
    def entered(self) -> bool:
        """Whether parameters hold scores now."""
        return bool(self._entered)

    def kept_weights(self) -> dict[str, Tensor]:
        """Return w0 * M(s), new tensors by name, whatever the parameters hold at the moment."""
        return {name: self.weights[name].masked_fill(~mask, 0) for name, mask in self.masks().items()}

    @torch.no_grad()
    def shift(self, moves: Mapping[str, Tensor]) -> None:
        """Add to the weights that are in the network; the scores stay.

        Args:
            moves: By parameter.
        """
        for name, move in moves.items():
            self.params[name].add_(move.masked_fill(~self.kept(name), 0))
        self.moved = True

    @torch.no_grad()
    def leave(self, optimizer: Optimizer) -> None:
        """Take the scores that an optimizer has stepped, and put the weights of the new masks back.

        Args:
            optimizer: The optimizer.
        """
        mine = [layer for layer in self._stepped_by(optimizer) if layer in self._entered]
        if not mine:
            return
        for layer in mine:
            self.scores[layer].copy_(self.take(layer))
        if self.rates is not None:
            self.rates.step({layer: self._entered[layer] for layer in mine}, optimizer)
        self._entered = {layer: g for layer, g in self._entered.items() if layer not in mine}
        if not self._entered:
            self.put()

    def undo(self) -> None:
        """Put the weights back where scores were not stepped: after an update that a GradScaler skipped, or an error."""
        if self._entered or self.moved:
            self._entered = {}
            self.put()

    def begin_epoch(self, epoch: int) -> None:
        """Look at scores and densities as an epoch begins.

        Args:
            epoch: Its number, from 0.
        """
        self.check_finite()
        if self.rates is not None:
            self.rates.begin_epoch(epoch)

    def check_finite(self) -> None:
        """Raise if scores have become infinite or no numbers, which the network itself does not show.

        Raises:
            PruneError: If they have.
        """
        odd = [name for name, s in self.scores.items() if not bool(torch.isfinite(s).all())]
        if self.rates is not None and not bool(torch.isfinite(self.rates.raw).all()):
            odd.append("the learned densities")
        if odd:
            raise PruneError(
                f"Expected finite scores; found others in {odd[:5]} ({len(odd)} in all). Lower the learning rate, clip gradients, or "
                "resume from an earlier checkpoint."
            )

    def snapshot(self) -> dict[str, Any]:
        """Return scores and densities as they are now; what is learned later does not change them."""
        rates = {} if self.rates is None else self.rates.state_dict()
        return {"scores": {name: s.clone() for name, s in self.scores.items()}, "rates": rates}

    @torch.no_grad()
    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Take scores and densities back, and put the weights of their masks into the parameters.

        Args:
            snapshot: What `snapshot` returned.
        """
        for name, s in self.scores.items():
            s.copy_(snapshot["scores"][name])
        if self.rates is not None:
            self.rates.load_state_dict(snapshot["rates"])
        self._entered = {}
        self.put()

    def state_dict(self) -> dict[str, Any]:
        """Return weights, scores and densities.

        Returns:
            Tensors and plain containers only.
        """
        rates = {} if self.rates is None else self.rates.state_dict()
        return {"weights": dict(self.weights), "scores": dict(self.scores), "rates": rates}

    def _check(self, seen: Mapping[str, Any]) -> None:
        mine, theirs = (
            {name: tuple(t.shape) for name, t in found.items()} for found in (self.weights, seen["weights"])
        )
        if mine != theirs:
            odd = sorted(name for name in {*mine, *theirs} if mine.get(name) != theirs.get(name))
            raise PruneError(
                f"Expected scores of this network's parameters; found others, {odd[:5]} among them. "
                "Build the network that they were learned for."
            )

    def _stepped_by(self, optimizer: Optimizer) -> list[str]:
        theirs = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return [layer for layer, p in self.carriers.items() if id(p) in theirs]


def check_precision(params: Mapping[str, nn.Parameter]) -> None:
    """Raise unless parameters are of 32 or 64 bits.

    Args:
        params: By name.

    Raises:
        PruneError: If one is of fewer.
    """
    low = next((name for name, p in params.items() if p.dtype not in (torch.float32, torch.float64)), None)
    if low is not None:
        raise PruneError(
            f"Expected parameters of 32 or 64 bits, since scores of fewer cannot be ranked; found {low!r} of {params[low].dtype}. "
            "Train with precision 'bf16-mixed' or '16-mixed'."
        )


@torch.no_grad()
def normalize_(gradients: list[Tensor]) -> None:
    """Divide gradients by their length together, in place.

    Args:
        gradients: Tensors of one device.
    """
    if gradients:
        length = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        torch._foreach_div_(gradients, length.clamp_(min=torch.finfo(length.dtype).tiny))
