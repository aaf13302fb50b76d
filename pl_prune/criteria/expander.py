"""Expander graphs as masks: `BiRegular` and `XNet` order the edges between the inputs and the outputs of a layer."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pl_prune.core.criterion import Criterion
from pl_prune.core.probe import Probe
from pl_prune.core.seeds import generator_of
from pl_prune.core.types import Scores


class _Expander(Criterion):
    """Score whole kernels by the order in which the edges of a random bipartite graph are added."""

    seed: int
    needs_data: ClassVar[bool] = False
    needs_loss: ClassVar[bool] = False
    uses_gradients: ClassVar[bool] = False
    layerwise_only: ClassVar[bool] = True

    @property
    def cost(self) -> str:
        """Nothing is run."""
        return "no pass"

    def __call__(self, probe: Probe) -> Scores:
        """Order the edges of every layer.

        Args:
            probe: The model and its parameters.

        Returns:
            Scores in (0, 1], the same for all entries of a kernel: float32, or float64 where a layer has too many edges for
            that.
        """
        scores = {}
        for name, p in probe.params.items():
            groups = getattr(probe.model.get_submodule(name.rpartition(".")[0]), "groups", 1)
            inner = p.shape[1] if p.ndim > 1 else 1
            generator = generator_of(self.seed, name)
            order = torch.cat([self._order(p.shape[0] // groups, inner, generator) for _ in range(groups)])
            edges = order.numel() // groups
            dtype = torch.float32 if edges < 1 << 22 else torch.float64
            pairs = (1 - order.double() / max(edges, 1)).to(dtype).to(p.device)
            scores[name] = pairs.view(p.shape[0], *[inner] * (p.ndim > 1), *[1] * (p.ndim - 2)).expand(p.shape).clone()
        return scores

    @abstractmethod
    def _order(self, rows: int, columns: int, generator: torch.Generator) -> Tensor:
        """Number the edges of the complete bipartite graph in the order in which they are added, from 0."""


@dataclass(frozen=True)
class BiRegular(_Expander):
    """Score kernels so that at every budget the degrees of all inputs differ by at most one, and those of all outputs.

    A kernel is an edge between an input and an output channel; in a linear layer, a weight. Under a layer-wise
    allocation masks of all sparsities are nested and each is a random bi-regular graph, so almost as good an expander
    as there can be: its second singular value is about that of Ramanujan graphs (a tenth more in layers of a prime number
    of inputs and as many outputs, whose graphs are circulants of random shifts). All entries of a kernel are kept or
    none, but for the last kernel that the budget reaches. Groups of a grouped convolution are graphs of their own.

    Args:
        seed: With the layer's name, seed of the graph.

    Source:
        Stewart et al., Data-Free Model Pruning at Initialization via Expanders (RReg). Divergences: their code draws a
        configuration model of one degree, in which edges coincide and are lost, keeps the best of 100 and uses it for
        all layers of the same shape; here rounds of a circulant are mixed by swaps along alternating cycles, which
        keep every prefix exactly regular.

    >>> import pl_prune as plp
    >>> scores = plp.score(torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(4, 2)), BiRegular())
    >>> mask = plp.Layerwise()(scores, 0.5)["0.weight"]
    >>> mask.sum(0).tolist(), mask.sum(1).tolist()
    ([2, 2, 2, 2, 2, 2], [3, 3, 3, 3])
    """

    seed: int = 0

    def _order(self, rows: int, columns: int, generator: torch.Generator) -> Tensor:
        if rows > columns:
            return biregular_order(columns, rows, generator).T
        return biregular_order(rows, columns, generator)


@dataclass(frozen=True)
class XNet(_Expander):
    """Score kernels so that each channel of the smaller side gets equally many, at random.

    Degrees of the smaller side (inputs, where both are as large) differ by at most one at every budget; the other side's
    are random, and some of it may be without an edge. Otherwise as `BiRegular`.

    Args:
        seed: With the layer's name, seed of the graph.

    Source:
        Prabhu et al., Deep Expander Networks: Efficient Deep Networks from Graph Theory (X-Linear and X-Conv layers).
        Divergence: the degree follows from the budget, not the budget from the degree.
    """

    seed: int = 0

    def _order(self, rows: int, columns: int, generator: torch.Generator) -> Tensor:
        if rows >= columns:
            return self._picked(columns, rows, generator).T
        return self._picked(rows, columns, generator)

    def _picked(self, pickers: int, choices: int, generator: torch.Generator) -> Tensor:
        picked = torch.rand(pickers, choices, generator=generator).argsort(dim=1).argsort(dim=1)
        turn = torch.rand(choices, pickers, generator=generator).argsort(dim=1).argsort(dim=1)
        return picked * pickers + turn.T.gather(1, picked)


def biregular_order(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Order the edges between nodes so that all prefixes have degrees that differ by at most one on either side.

    Round k of `rows` rounds gives every column one edge. Two rounds differ by cycles that alternate between them; along
    each such cycle they may be exchanged without a change in any degree.

    Args:
        rows: Nodes of one side, at most `columns`.
        columns: Nodes of the other side.
        generator: Where the graph is drawn from.

    Returns:
        The place of every edge, from 0: a (rows, columns) tensor of integers.
    """
    if rows < 2:
        return torch.randperm(rows * columns, generator=generator).view(rows, columns)
    period = math.gcd(rows, columns)
    start = torch.arange(rows)[:, None] * columns
    shift = torch.randperm(period, generator=generator)[start // (rows * columns // period)]
    rounds = (start + (torch.arange(columns) - shift) % columns) % rows  # the row that meets a column in a round
    for sweep in range(16):
        rounds = rounds.index_select(1, torch.randperm(columns, generator=generator))
        # Where some rows meet one column more, and others in other rounds, every second sweep pairs similar rounds.
        spread = 3 * period if sweep % 2 and columns % rows else rows
        likeness = start[:, 0] % rows + spread * torch.rand(rows, generator=generator)
        first, second = likeness.argsort()[: rows // 2 * 2].view(-1, 2).T
        rounds[first], rounds[second] = _exchanged(rounds[first], rounds[second], rows, generator)

    rounds = rounds.index_select(1, torch.randperm(columns, generator=generator))
    met = (torch.arange(rows)[:, None] * rows + rounds).flatten()
    before = torch.bincount(met, minlength=rows * rows).view(rows, rows)
    degree = (before.cumsum(0) - before).flatten()[met] + _ranks(met)
    turn = (torch.arange(rows)[:, None] * columns).expand(rows, columns).flatten() + degree  # by round, then by degree
    place = torch.empty_like(turn).scatter_(0, turn.argsort(stable=True), torch.arange(len(turn)))
    order = torch.empty(rows, columns, dtype=torch.long).scatter_(0, rounds, place.view(rows, columns))
    return order[torch.randperm(rows, generator=generator)]


def _exchanged(first: Tensor, second: Tensor, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Exchange two rounds along a random half of the cycles that alternate between them, in many pairs at once."""
    columns, size = first.shape[1], first.numel()
    offset = torch.arange(len(first))[:, None] * rows
    here, there = ((part + offset).flatten() for part in (first, second))
    most = -(-columns // rows)
    owner = torch.full((len(first) * rows * most,), size)
    owner.scatter_(0, here * most + _ranks(here), torch.arange(size))
    # From a column to the one that has in the first round what it has in the second; a path, not a cycle, ends outside.
    follow = torch.cat([owner.index_select(0, there * most + _ranks(there)), torch.tensor([size])])
    label = torch.arange(size + 1)
    for _ in range(columns.bit_length()):
        label = torch.minimum(label, label.index_select(0, follow))
        follow = follow.index_select(0, follow)
    coin = torch.rand(size + 1, generator=generator) < 0.5
    swap = (coin.index_select(0, label) & (follow < size))[:-1].view_as(first)
    return torch.where(swap, second, first), torch.where(swap, first, second)


def _ranks(keys: Tensor) -> Tensor:
    """Number the entries of each key from 0."""
    order = keys.argsort(stable=True)
    count = torch.bincount(keys)
    begin = (count.cumsum(0) - count).index_select(0, keys.index_select(0, order))
    return torch.empty_like(keys).scatter_(0, order, torch.arange(len(keys)) - begin)
