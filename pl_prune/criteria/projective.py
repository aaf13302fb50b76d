"""`PROscore`: pruning by the direction in which a filter would go."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pl_prune.core.group_criterion import GroupCriterion, narrowed
from pl_prune.core.groups import Group, GroupScores, Member, ParameterGroups
from pl_prune.core.probe import Probe
from pl_prune.core.types import Scores, check_positive
from pl_prune.criteria.activations import ActivationTaps, has_channels, is_norm

_TINY = 1e-12
_Row = tuple[str, int]


@dataclass(frozen=True)
class PROscore(GroupCriterion):
    """Score a filter F by the tangent of its angle after one gradient step in projective space, whatever its norm.

    The activation behind the filter is relaxed to D x - D' x + sigma(x) with D = D' = |F|, which changes nothing; then
    (F, D) is a point of projective space, a gradient step moves it to (F - lam dL/dF, D - lam dL/dD), and the score is
    |F - lam dL/dF| / |D - lam dL/dD|: filters that move towards zero score low. No D is ever put in: its gradient
    is the sum of x times the gradient at the activation's output, seen in one ordinary pass.

    Args:
        lam: Step size, relative to the gradient of the mean loss.
        normalize: Divide the step by |F|^2, so that the score stays the same when a filter is scaled and the next layer scaled
            back: |F / |F| - lam |F| dL/dF| / |1 - lam dL/dD|.
        target: What F is: "auto" takes scale and shift of the norms of a group that has norms, else rows of weights
            (biases apart); "weight" always takes rows of weights.
        across: "mean", "sum" or "max" over the filters of a unit (of coupled layers, of a head).

    Raises:
        PruneError: If `lam` is not positive.

    Source:
        IPPRO, importance-based pruning with projective offset, sections 3 and 4. Divergences: the paper leaves open how coupled
        layers count (here by their mean), the mode of batch norm (here evaluation) and whether the loss is a sum or a mean
        (here the mean); `normalize` is ours. A filter of norm 0 scores 0, and denominators are at least 1e-12.
    """

    lam: float = 0.01
    normalize: bool = False
    target: Literal["auto", "weight"] = "auto"
    across: Literal["mean", "sum", "max"] = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("PROscore.lam", self.lam)

    def __call__(self, probe: Probe, groups: ParameterGroups) -> GroupScores:
        """Differentiate the loss once, and score filters and then units.

        Args:
            probe: The model, its parameters and its data.
            groups: The groups.

        Returns:
            (size,) by root.
        """
        filters = {group.root: _filters(probe.model, group, self.target, groups) for group in groups}
        rows = dict.fromkeys((m.name, m.dim) for found in filters.values() for m in found)
        biases = {name: bias for name, _ in rows if (bias := _bias(name)) in probe.params}
        probe = narrowed(probe, dict.fromkeys([n for n, _ in rows] + list(biases.values())))
        grads, offsets = _gradients(probe, list(rows), biases)
        scores = {}
        for name, dim in rows:
            norm = is_norm(probe.model.get_submodule(_owner(name)))
            parts = [name, biases[name]] if norm and name in biases else [name]
            weight, grad = (torch.cat([_rows(t[part], dim) for part in parts], 1) for t in (probe.weights(), grads))
            scores[name, dim] = self._score(weight, grad, offsets[name, dim])
        return {
            root: self._reduced(torch.cat([scores[m.name, m.dim][m.index.to(grads[m.name].device)] for m in found], 1))
            for root, found in filters.items()
        }

    def _score(self, weight: Tensor, grad: Tensor, offset: Tensor) -> Tensor:
        if weight.device.type != "mps":  # scores lie so near to 1 that float32 loses their order
            weight, grad, offset = weight.double(), grad.double(), offset.double()
        norm = weight.norm(dim=1)
        moved = weight - self.lam * grad * (norm.square()[:, None] if self.normalize else 1.0)
        scale = norm - self.lam * offset * (norm if self.normalize else 1.0)
        return torch.where(norm > 0, moved.norm(dim=1) / scale.abs().clamp_min(_TINY), 0.0)

    def _reduced(self, scores: Tensor) -> Tensor:
        return scores.amax(1) if self.across == "max" else scores.sum(1) if self.across == "sum" else scores.mean(1)


def _filters(model: nn.Module, group: Group, target: str, groups: ParameterGroups) -> list[Member]:
    """Return the members whose slices are the filters of a group."""
    outs = [m for m in group.members if m.kind == "out"]
    weights = [m for m in outs if len(groups.shapes[m.name]) > 1]
    norms = [m for m in outs if m.name.endswith("weight") and is_norm(model.get_submodule(_owner(m.name)))]
    return norms if norms and (target == "auto" or not weights) else weights


def _gradients(probe: Probe, rows: list[_Row], biases: dict[str, str]) -> tuple[Scores, dict[_Row, Tensor]]:
    """Return the mean gradients of the weights, and of one D for each of their rows."""
    modules = {name: probe.model.get_submodule(_owner(name)) for name, _ in rows}
    tapped = {row: _owner(row[0]) for row in rows if has_channels(modules[row[0]], row[1])}
    scales = {
        f"{name} {dim}": nn.Parameter(probe.params[name].new_zeros(probe.params[name].shape[dim])) for name, dim in rows
    }
    every = Probe(probe.model, {**probe.params, **scales}, probe._loss, probe.batches, probe.track)

    def contribution(batch: Any, size: int, _: int) -> Iterable[Tensor]:
        with ActivationTaps(probe.model, dict.fromkeys(tapped.values())) as taps:
            grads = dict(zip(probe.params, probe._summed_grads(batch, size), strict=True))
        for row in rows:
            seen = taps.sums.get(tapped.get(row, ""))
            grads[f"{row[0]} {row[1]}"] = seen if seen is not None else _linear(probe, grads, row, biases)
        return grads.values()

    found = every.mean("projective scores", contribution)
    return {name: found[name] for name in probe.params}, {row: found[f"{row[0]} {row[1]}"] for row in rows}


def _linear(probe: Probe, grads: Scores, row: _Row, biases: dict[str, str]) -> Tensor:
    """Return the gradient of D where no activation follows: <F, dL/dF>, and the bias's part."""
    name, dim = row
    total = (_rows(probe.params[name].detach(), dim) * _rows(grads[name], dim)).sum(1)
    if name in biases and probe.params[biases[name]].shape == total.shape:
        total = total + probe.params[biases[name]].detach() * grads[biases[name]]
    return total


def _rows(tensor: Tensor, dim: int) -> Tensor:
    return tensor.movedim(dim, 0).reshape(tensor.shape[dim], -1)


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _bias(name: str) -> str:
    return f"{name.removesuffix('weight')}bias" if name.endswith("weight") else ""
