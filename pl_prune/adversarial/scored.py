"""`ScoredWeights`: one learned score for each weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pl_prune.adversarial.rates import Rates
from pl_prune.adversarial.score_state import Scored, check_precision, normalize_
from pl_prune.adversarial.scores import HARP, ScoreLearner, proportional, top_mask
from pl_prune.core.masks import MaskSet

_KEPT = 4  # added to the sign of a score, in one byte, where its weight is in the network


class ScoredWeights(Scored):
    """One score for each weight: beside the parameters live w0, s (each of their size and type) and one byte an entry.

    What an optimizer does to these scores is bit for bit what it does to scores that are parameters themselves.

    Args:
        params: The parameters, by name.
        learner: How scores begin and how many entries each layer keeps.
        sparsity: Fraction of all entries to prune.
        seed: Of what the learner draws.
        state: What `state_dict` returned, to go on from there; None: begin.

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
        check_precision(params)
        self._sizes = {name: p.numel() for name, p in params.items()}
        self._counts = learner.counts(self._sizes, sparsity)
        self.rates = None
        if isinstance(learner, HARP):
            shares = learner.shares({name: tuple(p.shape) for name, p in params.items()})
            begin = proportional(self._sizes, shares, sum(self._counts.values()))
            start = {name: begin[name] / n for name, n in self._sizes.items()}
            self.rates = Rates(learner, start, self._sizes, params)
        self._marks: dict[str, Tensor] = {}
        begun = {name: learner.begin(name, p, seed) for name, p in params.items()}
        super().__init__(params, {n: w0 for n, (w0, _) in begun.items()}, {n: s for n, (_, s) in begun.items()}, state)

    @property
    def counts(self) -> dict[str, int]:
        """How many entries each layer keeps now."""
        if self.rates is None:
            return self._counts
        return proportional(self._sizes, self.rates.by_layer(), sum(self._counts.values()))

    @property
    def carriers(self) -> Mapping[str, nn.Parameter]:
        """The parameters themselves."""
        return self.params

    def masks(self) -> MaskSet:
        """Return M(s), whatever the parameters hold at the moment."""
        if self.moved:
            counts = self.counts
            return MaskSet({name: top_mask(s, counts[name]) for name, s in self.scores.items()})
        return MaskSet({name: marks > 1 for name, marks in self._marks.items()})

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

    def score_gradients(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the straight-through gradients of scores, where the network is.

        Args:
            gradients: dL/dw by parameter.

        Returns:
            By parameter.
        """
        return {name: self.score_gradient(name, g) for name, g in gradients.items()}

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
            self._entered[name] = None
            if p.grad is not None:
                self._entered[name] = (p.grad * self.weights[name]).sum() if self.rates else None
                p.grad.copy_(self.score_gradient(name, p.grad))
            p.copy_(self.scores[name])
        if normalize:
            normalize_([g for name in mine if (g := self.params[name].grad) is not None])

    def take(self, layer: str) -> Tensor:
        """Return the scores of a layer out of its parameter.

        Args:
            layer: Its name.

        Returns:
            Of its shape.
        """
        return self.params[layer]
