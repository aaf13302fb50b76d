"""`SmartRatio`: densities that fall from the input of a network to its output."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, get_args

import torch

from pl_prune.core.allocate import LayerAllocation, webster
from pl_prune.core.types import PruneError, check_choice


@dataclass(frozen=True)
class SmartRatio(LayerAllocation):
    """Densities that go with k^2 + k, for the k-th layer from the output; linear layers have one of their own.

    With `Random` scores these are the random tickets of Su et al., as good as the masks of criteria that they
    checked. All selected layers count, in their order in the network. Linear layers take `linear_keep` of their
    weights, but at most half of the budget, and more only where all convolutions are whole.

    Args:
        linear_keep: Fraction of linear layers' entries to keep, in (0, 1].
        network: "vgg" divides the densities by i^2 for the i-th layer from the input.

    Raises:
        PruneError: If `linear_keep` is out of range, or `network` another one.

    Source:
        Su et al., Sanity-Checking Pruning Methods: Random Tickets can Win the Jackpot (smart ratios).
        Divergences: what a layer that is kept whole cannot take goes to all other convolutions in proportion, in their
        code to the next ones until they are whole; the total is exact; their share of linear layers has no upper
        limit; their last layer is the classifier, which `Select` leaves out unless `output_layer` is set.

    >>> scores = {"a": torch.rand(4, 3, 3, 3), "b": torch.rand(8, 4, 3, 3), "c": torch.rand(8, 8, 3, 3)}
    >>> SmartRatio()(scores, 0.8).counts()
    {'a': (60, 108), 'b': (80, 288), 'c': (54, 576)}
    """

    linear_keep: float = 0.3
    network: Literal["resnet", "vgg"] = "resnet"

    def __post_init__(self) -> None:
        super().__post_init__()
        keep = self.linear_keep
        if isinstance(keep, bool) or not isinstance(keep, (int, float)) or not 0 < keep <= 1:
            raise PruneError(
                f"Expected linear_keep to be a fraction in (0, 1]; found {keep!r}. Leave it out for the paper's 0.3."
            )
        check_choice("network", self.network, get_args(Literal["resnet", "vgg"]))

    def _split(self, shapes: list[torch.Size], sizes: list[int], floors: list[int], keep: int) -> list[int]:
        depth = len(shapes)
        ratios = [(k * k + k) * self._decay(depth + 1 - k, depth) for k in range(depth, 0, -1)]
        linear = [i for i, shape in enumerate(shapes) if len(shape) < 3]
        convolutions = [i for i in range(depth) if i not in linear]

        def total(values: list[int], layers: list[int]) -> int:
            return sum(values[i] for i in layers)

        wanted = int(Fraction(str(float(self.linear_keep))) * sum(shapes[i].numel() for i in linear) + Fraction(1, 2))
        share = max(min(wanted, keep // 2), total(floors, linear), keep - total(sizes, convolutions))
        share = min(share, total(sizes, linear), keep - total(floors, convolutions))
        counts = [0] * depth
        for layers, budget, ratio in ((linear, share, [1] * depth), (convolutions, keep - share, ratios)):
            weights = [max(ratio[i] * shapes[i].numel(), 1) for i in layers]
            found = webster(weights, [sizes[i] for i in layers], [floors[i] for i in layers], budget)
            for i, count in zip(layers, found, strict=True):
                counts[i] = count
        return counts

    def _decay(self, place: int, depth: int) -> int:
        """Return 1 / place^2 as a whole number, up to a factor that all places share."""
        return (math.lcm(*range(1, depth + 1)) // place) ** 2 if self.network == "vgg" else 1
