"""`Saliency`: how much a unit matters, from its weights and the gradient at hand."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from pl_prune.core.seeds import generator_of
from pl_prune.core.types import PruneError, check_choice, check_type
from pl_prune.optim.units import Units

Kind: TypeAlias = Literal["mixed", "magnitude", "avg_magnitude", "cosine", "taylor1", "taylor2", "random"]
Preset: TypeAlias = Literal["corrected", "paper", "oto"]
_PARTS = get_args(Kind)[1:-1]


@dataclass(frozen=True)
class Saliency:
    """Score units by their weights x and the gradient g of the step at hand; higher = keep.

    | part | corrected | paper | oto |
    |---|---|---|---|
    | magnitude | ‖x‖ | ‖x‖ | ‖x‖ |
    | avg_magnitude | ‖x‖/√n | ‖x‖/√n | ‖x‖/n |
    | cosine | 1 - cos(x, g) | cos(x, g) | cos(x, g) + 1 |
    | taylor1 | abs(x·g) | abs(x·g) | abs(x·g) |
    | taylor2 | abs(x·g - q/2) | x·g + q/2 | (x·g)²/2 |

    n is the number of entries of the unit, and q = Σx²g² stands for xᵀHx. A mixture divides each part by its sum over the units
    that are still there (oto: by its 2-norm over all units) and weights the quotients.

    Args:
        kind: One part alone, all of them mixed, or random numbers.
        preset: Which column.
        weights: Weights of the parts of a mixture; 0.2 each if None. A part that is not named does not count.
        seed: Seed of random numbers; None: the seed of `seed_everything`, or 0.

    Raises:
        PruneError: If a value is not of its kind.

    Source:
        HESSO, appendix B. Divergences of "corrected": a positive x·g says that the way to zero leads down, so it must lower
        the score (the paper's cosine raises it); f(x) - f(0) is x·g - xᵀHx/2 on a quadratic (the paper adds the second term).
        The Hessian is that of squared gradients, as in its section 4.6. One part alone is not normalised, so a negative sum cannot
        turn it round. The published code ("oto") takes update directions of its own SGD and Adam for g; here g is the gradient,
        after accumulation and averaging over ranks, before clipping.
    """

    kind: Kind = "mixed"
    preset: Preset = "corrected"
    weights: dict[str, float] | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        check_choice("saliency.kind", self.kind, get_args(Kind))
        check_choice("saliency.preset", self.preset, get_args(Preset))
        if self.weights is None:
            return
        check_type("saliency.weights", self.weights, Mapping, "for example {'magnitude': 0.5, 'taylor1': 0.5}")
        numbers = all(isinstance(w, (int, float)) and 0 <= w < float("inf") for w in self.weights.values())
        if self.kind != "mixed" or self.weights.keys() - set(_PARTS) or not numbers or not any(self.weights.values()):
            raise PruneError(
                f"Expected saliency.weights of a mixture, 0 or more, some above 0, by names among {', '.join(_PARTS)}; found "
                f"{dict(self.weights)!r} with kind={self.kind!r}. Leave them out for equal weights."
            )

    @property
    def parts(self) -> dict[str, float]:
        """The weight of each part of a mixture."""
        return dict(self.weights) if self.weights is not None else dict.fromkeys(_PARTS, 0.2)

    def score(self, statistics: Tensor, entries: Tensor, here: Tensor) -> Tensor | None:
        """Score units.

        Args:
            statistics: What `gather` returned, (4, size).
            entries: Number of entries of every unit, (size,).
            here: Which units are still there, (size,) of bool.

        Returns:
            (size,) of float64 on the CPU; None where weights or gradients are not finite.
        """
        statistics = statistics.cpu().double()
        if not bool(statistics.isfinite().all()):
            return None
        if self.kind == "random":
            return torch.rand(len(here), generator=generator_of(self.seed or 0, "units"), dtype=torch.float64)
        if self.kind != "mixed":
            return self._part(self.kind, statistics, entries)
        total = torch.zeros(len(here), dtype=torch.float64)
        for part, weight in self.parts.items():
            value = self._part(part, statistics, entries)
            norm = value.norm() if self.preset == "oto" else value[here].sum()
            if float(norm):
                total += weight * value / norm
        return total

    def _part(self, part: str, statistics: Tensor, entries: Tensor) -> Tensor:
        xx, xg, gg, xxgg = statistics.unbind()
        size = xx.sqrt()
        if part == "magnitude":
            return size
        if part == "avg_magnitude":
            return size / (entries if self.preset == "oto" else entries.sqrt())
        if part == "taylor1":
            return xg.abs()
        if part == "cosine":
            product = size * gg.sqrt()
            cosine = torch.where(product > 0, xg / product, 0).clamp(-1, 1)
            return {"corrected": 1 - cosine, "paper": cosine, "oto": 1 + cosine}[self.preset]
        signed = {"corrected": xg - xxgg / 2, "paper": xg + xxgg / 2, "oto": xg.square() / 2}[self.preset]
        return signed.abs() if self.preset == "corrected" else signed


def gather(units: Units, x: Mapping[str, Tensor], g: Mapping[str, Tensor], names: Container[str] = ()) -> Tensor:
    """Sum over every unit what saliencies are made of.

    Args:
        units: The units.
        x: Weights by name.
        g: Gradients by name; a missing one is zero.
        names: Which parameters count; all of them if empty.

    Returns:
        Σx², Σxg, Σg² and Σx²g², (4, size), on the weights' device.
    """
    products = {n: x[n].detach() * g[n].detach() for n in units.names if n in g and (not names or n in names)}
    return torch.stack([
        units.sums(x, x, names),
        units.sums(x, g, names),
        units.sums(g, g, names),
        units.sums(products, products, names),
    ])
