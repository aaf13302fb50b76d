"""`ScoredUnits`: one learned score for each unit of a layer, whose slices all leave together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pl_prune.adversarial.rates import Rates
from pl_prune.adversarial.score_state import Scored, check_precision, normalize_
from pl_prune.adversarial.scores import HARP, RLTH, ScoreLearner, proportional, top_mask
from pl_prune.core.group_budget import Target
from pl_prune.core.groups import ParameterGroups
from pl_prune.core.masks import MaskSet
from pl_prune.core.types import PruneError, plain, prune_count
from pl_prune.optim.units import Units


class ScoredUnits(Scored):
    """Scores of channels, hidden units and heads: the masks of a network that can be sliced.

    A unit's mask multiplies what consumes it, the columns of the weights behind it, so that a unit that is out still
    computes, and its score still learns: dL/ds = sign(s) times the sum of w0 dL/dw over those columns. (Masks over what produces
    it have no gradient behind a ReLU once they are zero.) An optimizer steps a unit's score in the place of one entry of the weight that
    consumes it; the other entries stand at zero meanwhile, without gradient. `settle` zeroes what produces units that are out.

    Args:
        params: All parameters of the network by name (`plain`).
        groups: The groups.
        learner: How scores begin (from the norms of the units' columns), and how layers share the budget.
        sparsity: Fraction to remove.
        target: Of what: units, or parameters or multiply-accumulates of the whole network, as counted after slicing.
        state: What `state_dict` returned, to go on from there; None: begin.

    Raises:
        PruneError: If a parameter is of low precision, the learner draws its weights, the budget cannot be met, or the state
            is of other parameters.

    Source:
        HARP's channel pruning, which scores the input channels of each layer. Divergence: one score for all layers that consume a
        unit, so that it can be sliced off.
    """

    def __init__(
        self,
        params: Mapping[str, nn.Parameter],
        groups: ParameterGroups,
        learner: ScoreLearner,
        sparsity: float,
        target: Target,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        if isinstance(learner, RLTH):
            raise PruneError(
                "Expected a learner that starts from trained weights, to score units; found RLTH. Use HYDRA or HARP, or leave `units` out."
            )
        self._groups, self._target = groups, target
        self._consumed = _consumers(groups)
        self._units = Units(self._consumed, params)
        held = {name: params[name] for name in self._units.names}
        check_precision(held)
        total = _cost(groups, groups.sizes, target)
        self._budget = total - prune_count(sparsity, total)
        self._found = 0
        self._at = {group.root: _carrier(group, self._consumed) for group in self._consumed}
        self._places = {root: params[plain(name)] for root, (name, _) in self._at.items()}
        self._start = start = self._counts(dict.fromkeys(groups.sizes, 1.0))
        if _cost(groups, start, target) > self._budget:
            left = 1 - Fraction(_cost(groups, start, target), total)
            raise PruneError(
                f"Expected to remove {sparsity:.4g} of the {target}; found that at most {float(left):.4f} can go, with a unit left in "
                f"each of {len(groups)} groups. Lower the sparsity, or let more layers be pruned (`include`, `exclude`)."
            )
        self.rates = None
        if isinstance(learner, HARP):
            costs = {root: _saved(groups, root, target) for root in groups.sizes}
            self.rates = Rates(learner, {r: start[r] / n for r, n in groups.sizes.items()}, costs, self._places)
        self._signs: dict[str, Tensor] = {}
        self._keep: dict[str, Tensor] = {}
        self._kept: dict[str, Tensor] = {}
        sizes = self._units.by_root(self._units.sums(held, held).sqrt())
        scores = {root: learner.begin(root, size[None].to(self._places[root]), 0)[1][0] for root, size in sizes.items()}
        super().__init__(held, {name: p.detach().clone() for name, p in held.items()}, scores, state)

    @property
    def counts(self) -> dict[str, int]:
        """How many units each group keeps now."""
        return self._start if self.rates is None else self._counts(self.rates.by_layer())

    @property
    def carriers(self) -> Mapping[str, nn.Parameter]:
        """The weight in whose place each group's scores are stepped."""
        return self._places

    def keep(self) -> dict[str, Tensor]:
        """Return which units M(s) keeps, (size,) of bool by root."""
        if not self.moved:
            return self._keep
        return {
            root: top_mask(s, count) for (root, s), count in zip(self.scores.items(), self.counts.values(), strict=True)
        }

    def masks(self) -> MaskSet:
        """Return masks over parameters for s, whatever the parameters hold at the moment."""
        return self._masks(self.keep())

    def kept(self, name: str) -> Tensor:
        """Return which entries of a parameter are in the network as it is.

        Args:
            name: Its name.

        Returns:
            A mask of its shape.
        """
        return self._kept[name]

    @torch.no_grad()
    def put(self, moves: Mapping[str, Tensor] | None = None) -> None:
        """Put w0 * M(s), or w0 * M(s + z), into the parameters.

        Args:
            moves: z by group; None: no move.
        """
        counts = self.counts
        for root, s in self.scores.items():
            at = s if moves is None else s + moves[root]
            self._signs[root], self._keep[root] = torch.sign(at), top_mask(at, counts[root])
        self._kept = dict(self._masks(self._keep))
        for name, p in self.params.items():
            p.copy_(self.weights[name]).masked_fill_(~self._kept[name], 0)
        self.moved = moves is not None

    @torch.no_grad()
    def score_gradients(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the straight-through gradients of scores, where the network is.

        Args:
            gradients: dL/dw by parameter.

        Returns:
            By group.
        """
        sums = self._units.by_root(self._units.sums(gradients, self.weights))
        return {root: self._signs[root] * g.to(self._signs[root]) for root, g in sums.items()}

    @torch.no_grad()
    def enter(self, optimizer: Optimizer, normalize: bool = False) -> None:
        """Give an optimizer that is about to step the scores and their gradients.

        Args:
            optimizer: The optimizer; its gradients are there.
            normalize: Divide the gradient of all scores together by its length.
        """
        gradients = {name: p.grad for name, p in self.params.items() if p.grad is not None}
        sums = self._units.by_root(self._units.sums(gradients, self.weights))
        mine = self._stepped_by(optimizer)
        scored = {root: self._signs[root] * sums[root].to(self._signs[root]) for root in mine}
        if normalize:
            normalize_(list(scored.values()))
        places = {id(p) for p in self._places.values()}
        for p in self.params.values():
            if id(p) in places:
                p.zero_()
                p.grad = torch.zeros_like(p)
            else:
                p.grad = None
        for root in mine:
            _, index = self._at[root]
            place = self._places[root]
            place[index] = self.scores[root]
            assert place.grad is not None
            place.grad[index] = scored[root]
            self._entered[root] = sums[root].sum() if self.rates else None

    @torch.no_grad()
    def settle(self, tensors: Mapping[str, Tensor]) -> MaskSet:
        """Zero what produces the units that are out; outputs do not change.

        Args:
            tensors: All parameters of the network by name, changed in place.

        Returns:
            Masks over what produces units and what consumes them.
        """
        masks = self._groups.expand({root: mask.cpu() for root, mask in self.keep().items()}, inputs=True)
        masks = MaskSet({plain(name): mask for name, mask in masks.items()})
        masks = masks.to(next(iter(self.params.values())).device)
        masks.apply_({name: tensors[name] for name in masks})
        return masks

    def take(self, layer: str) -> Tensor:
        """Return the scores of a group out of its weight.

        Args:
            layer: Its root.

        Returns:
            (size,).
        """
        return self._places[layer][self._at[layer][1]]

    def _masks(self, keep: Mapping[str, Tensor]) -> MaskSet:
        masks = self._consumed.expand({root: mask.cpu() for root, mask in keep.items()})
        return MaskSet({plain(name): mask for name, mask in masks.items()}).to(next(iter(self.params.values())).device)

    def _counts(self, shares: Mapping[str, float]) -> dict[str, int]:
        """Share as many units as the budget allows out in proportion to densities."""
        sizes = self._groups.sizes

        def fits(units: int) -> bool:
            return _cost(self._groups, proportional(sizes, shares, units), self._target) <= self._budget

        low, high = len(sizes), sum(sizes.values())
        step = 1
        if self._found:  # hardly ever far from where it was
            low = high = self._found
            while low > len(sizes) and not fits(low):
                low, high, step = max(len(sizes), low - step), low, 2 * step
            while high < sum(sizes.values()) and fits(high):
                low, high, step = high, min(sum(sizes.values()), high + step), 2 * step
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(middle) else (low, middle - 1)
        self._found = low
        return proportional(sizes, shares, low)


def _cost(groups: ParameterGroups, counts: Mapping[str, int], target: Target) -> int:
    if target == "groups":
        return sum(counts.values())
    keep = {root: torch.arange(n) < counts[root] for root, n in groups.sizes.items()}
    return groups.cost(keep)[("params", "macs").index(target)]


def _saved(groups: ParameterGroups, root: str, target: Target) -> float:
    """Return what a group costs, reckoned from what one unit less saves."""
    whole = dict(groups.sizes)
    size = whole[root]
    if target == "groups" or size < 2:
        return float(size)
    less = {**whole, root: size - 1}
    return float(size * (_cost(groups, whole, target) - _cost(groups, less, target)))


def _consumers(groups: ParameterGroups) -> ParameterGroups:
    """Return the same units with the columns that consume them in the place of what produces them."""
    found = []
    for group in groups:
        members = tuple(replace(m, kind="out") for m in group.members if m.kind == "in")
        if not members:
            raise PruneError(
                f"Expected a weight that consumes the units of {group.root!r}, to learn their scores by; found none. "
                "Leave the layer out by `exclude`."
            )
        found.append(replace(group, members=members))
    names = {m.name for group in found for m in group.members}
    return ParameterGroups(found, {name: groups.shapes[name] for name in groups.shapes if name in names})


def _carrier(group: Any, groups: ParameterGroups) -> tuple[str, tuple[Tensor, ...]]:
    """Return a weight that consumes a group's units, and an entry of it for each."""
    member = group.members[0]
    rows = member.index[:, 0]
    index = tuple(rows if d == member.dim else torch.zeros_like(rows) for d in range(len(groups.shapes[member.name])))
    return member.name, index
