"""`ScoredWeights`: parameters that hold w0 * M(s), while an optimizer steps s in their place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pl_prune.adversarial.rates import Rates
from pl_prune.adversarial.scores import HARP, ScoreLearner, top_mask
from pl_prune.core.masks import MaskSet
from pl_prune.core.types import PruneError

_KEPT = 4  # added to the sign of a score, in one byte, where its weight is in the network


class ScoredWeights:
    """Learn scores with the optimizer that is there, without any parametrization.

    Beside the parameters live w0, s (each of their size and type) and one byte an entry. Around an optimizer's step, gradients
    become sign(s) w0 dL/dw and values become s (`enter`); behind it s is read and w0 * M(s) is put back (`leave`). That is bit for
    bit what an optimizer does to scores that are parameters themselves.

    Args:
        params: The parameters, by name.
        learner: How scores begin and how many entries each layer keeps.
        sparsity: Fraction of all entries to prune.
        seed: Of what the learner draws.
        state: What `state_dict` returned, to go on from there; None: begin.

    Attributes:
        weights: w0 by name.
        scores: s by name.
        rates: The densities that HARP learns; None for other learners.

    Raises:
        PruneError: If a parameter is of low precision, the sparsity leaves a layer empty, or the state is of other parameters.
    """

    def __init__(
        self,
        params: Mapping[str, nn.Parameter],
        learner: ScoreLearner,
        sparsity: float,
        seed: int = 0,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        low = next((name for name, p in params.items() if p.dtype not in (torch.float32, torch.float64)), None)
        if low is not None:
            raise PruneError(
                f"Expected parameters of 32 or 64 bits, since scores of fewer cannot be ranked; found {low!r} of {params[low].dtype}. "
                "Train with precision 'bf16-mixed' or '16-mixed'."
            )
        self.params, self.learner = params, learner
        sizes = {name: p.numel() for name, p in params.items()}
        self.rates = Rates(learner, params, sparsity) if isinstance(learner, HARP) else None
        self._counts = learner.counts(sizes, sparsity)
        self._marks: dict[str, Tensor] = {}
        self._entered: dict[str, Tensor | None] = {}  # gradients of densities, of parameters that hold scores now
        self.moved = False
        begun = (
            {name: learner.begin(name, p, seed) for name, p in params.items()} if state is None else self._read(state)
        )
        self.weights = {name: w0 for name, (w0, _) in begun.items()}
        self.scores = {name: s for name, (_, s) in begun.items()}
        self.put()

    @property
    def entered(self) -> bool:
        """Whether parameters hold scores now."""
        return bool(self._entered)

    @property
    def counts(self) -> dict[str, int]:
        """How many entries each layer keeps now."""
        return self._counts if self.rates is None else self.rates.counts()

    def masks(self) -> MaskSet:
        """Return M(s), whatever the parameters hold at the moment."""
        if self.moved:
            return MaskSet({name: top_mask(s, self.counts[name]) for name, s in self.scores.items()})
        return MaskSet({name: marks > 1 for name, marks in self._marks.items()})

    def kept_weights(self) -> dict[str, Tensor]:
        """Return w0 * M(s), new tensors by name, whatever the parameters hold at the moment."""
        return {name: self.weights[name].masked_fill(~mask, 0) for name, mask in self.masks().items()}

    def kept(self, name: str) -> Tensor:
        """Return which entries of a parameter are in the network as it is.

        Args:
            name: Its name.

        Returns:
            A mask of its shape.
        """
        return self._marks[name] > 1

    @torch.no_grad()
    def put(self, moves: Mapping[str, Tensor] | None = None) -> None:
        """Put w0 * M(s), or w0 * M(s + z), into the parameters.

        Args:
            moves: z by name; None: no move.
        """
        counts = self.counts
        for name, s in self.scores.items():
            at = s if moves is None else s + moves[name]
            keep = top_mask(at, counts[name])
            self._marks[name] = torch.sign(at).to(torch.int8).add_(keep, alpha=_KEPT)
            self.params[name].copy_(self.weights[name]).masked_fill_(~keep, 0)
        self.moved = moves is not None

    @torch.no_grad()
    def shift(self, moves: Mapping[str, Tensor]) -> None:
        """Add to the weights that are in the network; the scores stay.

        Args:
            moves: By name.
        """
        for name, move in moves.items():
            self.params[name].add_(move.masked_fill(~self.kept(name), 0))
        self.moved = True

    @torch.no_grad()
    def score_gradient(self, name: str, gradient: Tensor) -> Tensor:
        """Return the straight-through gradient of a layer's scores, where the network is.

        Args:
            name: The layer.
            gradient: dL/dw of its weight.

        Returns:
            sign(s) w0 dL/dw, for pruned entries too.
        """
        marks = self._marks[name]
        return gradient * self.weights[name] * (marks - _KEPT * (marks > 1))

    @torch.no_grad()
    def enter(self, optimizer: Optimizer, normalize: bool = False) -> None:
        """Give an optimizer that is about to step the scores and their gradients.

        Args:
            optimizer: The optimizer; its gradients are there.
            normalize: Divide the gradient of all scores together by its length.
        """
        mine = self._stepped_by(optimizer)
        for name in mine:
            p = self.params[name]
            if p.grad is None:
                self._entered[name] = None
                p.copy_(self.scores[name])
                continue
            self._entered[name] = (p.grad * self.weights[name]).sum() if self.rates else None
            p.grad.copy_(self.score_gradient(name, p.grad))
            p.copy_(self.scores[name])
        gradients = [g for name in mine if (g := self.params[name].grad) is not None]
        if normalize and gradients:
            length = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
            torch._foreach_div_(gradients, length.clamp_(min=torch.finfo(length.dtype).tiny))

    @torch.no_grad()
    def leave(self, optimizer: Optimizer) -> None:
        """Take the scores that an optimizer has stepped, and put the weights of the new masks back.

        Args:
            optimizer: The optimizer.
        """
        mine = [name for name in self._stepped_by(optimizer) if name in self._entered]
        if not mine:
            return
        for name in mine:
            self.scores[name].copy_(self.params[name])
        if self.rates is not None:
            self.rates.step({name: self._entered[name] for name in mine}, optimizer)
        self._entered = {name: g for name, g in self._entered.items() if name not in mine}
        if not self._entered:
            self.put()

    def undo(self) -> None:
        """Put the weights back where scores were not stepped: after an update that a GradScaler skipped, or an error."""
        if self._entered or self.moved:
            self._entered = {}
            self.put()

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

    def _read(self, state: Mapping[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
        odd = [
            name
            for name in {*self.params, *state["weights"]}
            if name not in self.params or state["weights"].get(name, torch.empty(0)).shape != self.params[name].shape
        ]
        if odd:
            raise PruneError(
                f"Expected scores of this network's parameters; found others, {sorted(odd)[:5]} among them. "
                "Build the network that they were learned for."
            )
        if self.rates is not None:
            self.rates.load_state_dict(state["rates"])
        return {
            name: (state["weights"][name].to(p, copy=True), state["scores"][name].to(p, copy=True))
            for name, p in self.params.items()
        }

    def _stepped_by(self, optimizer: Optimizer) -> list[str]:
        theirs = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return [name for name, p in self.params.items() if id(p) in theirs]
