"""Score learners: masks that are learned by gradient descent on scores, over weights that do not move."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod, sqrt
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from pl_prune.core.neutral import is_norm
from pl_prune.core.seeds import seed_of
from pl_prune.core.types import PruneError, check_choice, prune_count


class ScoreLearner(ABC):
    """How scores begin, how many entries each layer keeps, and what trains beside the scores.

    A score learner is a frozen dataclass. The network runs on w0 * M(s), where M(s) marks each layer's entries of largest
    |s|; the optimizer steps s.

    Attributes:
        trains_norms: Whether the scales and shifts of norms train too, or stand at one and zero; everything else stands still.
    """

    trains_norms: ClassVar[bool] = True

    @abstractmethod
    def begin(self, name: str, weight: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Return what a layer starts from.

        Args:
            name: The layer's parameter.
            weight: Its value (out, in, ...).
            seed: Of what is drawn.

        Returns:
            Weights w0 and scores s, both new and of the shape of `weight`.
        """

    def counts(self, sizes: Mapping[str, int], sparsity: float) -> dict[str, int]:
        """Say how many entries each layer keeps.

        Args:
            sizes: Entries of each layer.
            sparsity: Fraction to prune.

        Returns:
            As many of each layer in proportion to its size as go together into exactly what the sparsity leaves.
        """
        return proportional(sizes, dict.fromkeys(sizes, 1.0), _kept(sizes, sparsity))


@dataclass(frozen=True)
class HYDRA(ScoreLearner):
    """Scores that start from the pretrained weights.

    s = sqrt(6 / fan_in) w / max |w|, so that the first masks are those of the largest weights; norms go on training.

    Args:
        rounding: "exact" keeps one in all of what the sparsity leaves, shared out in proportion to the layers; "published" prunes
            int(sparsity n) of each layer of n, as the authors' code.

    Source:
        Sehwag et al., HYDRA: Pruning adversarially robust neural networks, equation 2 and the straight-through estimator of
        Ramanujan et al.: dL/ds = sign(s) w0 dL/dw, for pruned entries too. Divergences: the count (`rounding`); ties go by index; masks
        are exact for every memory format (the authors' code fails for channels_last).
    """

    rounding: Literal["exact", "published"] = "exact"

    def __post_init__(self) -> None:
        check_choice("rounding", self.rounding, ("exact", "published"))

    def begin(self, name: str, weight: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Scale the weights.

        Args:
            name: The layer's parameter.
            weight: Its value (out, in, ...).
            seed: Without influence.

        Returns:
            Weights and scores.
        """
        w0 = weight.detach().clone()
        return w0, w0 * (sqrt(6 / _fan_in(weight)) / w0.abs().max().clamp_(min=torch.finfo(w0.dtype).tiny))

    def counts(self, sizes: Mapping[str, int], sparsity: float) -> dict[str, int]:
        """Say how many entries each layer keeps.

        Args:
            sizes: Entries of each layer.
            sparsity: Fraction to prune.

        Returns:
            By `rounding`.
        """
        if self.rounding == "exact":
            return super().counts(sizes, sparsity)
        return {name: n - int(sparsity * n) for name, n in sizes.items()}


@dataclass(frozen=True)
class HARP(ScoreLearner):
    """HYDRA's scores, and a density of each layer's own that is learned beside them.

    The density of layer l is k_l = k_min + (1 - k_min) sigmoid(r_l), with k_min = `least` times the density asked for. Its gradient is the
    sum over the layer's mask, and that of `weight` times the epoch's number times max(sum_l n_l k_l / (k sum_l n_l) - 1, 0), which
    holds the whole network to its density k. The factor stops growing after the first epoch at whose end that term is 0 (to four
    decimals).

    Args:
        least: Smallest density of a layer, as a fraction of the whole network's.
        weight: Of the term; 0.01 for CIFAR-10, 0.1 for ImageNet.
        start: Where densities begin: "uniform", or "erk", in proportion to the sum of each layer's dimensions.

    Source:
        Zhao and Wressnegger, Holistic adversarially robust pruning, equations 3 to 6. Divergences: at every step the learned
        densities are scaled to exactly the count that was asked for, and masks and files hold that network (the authors' export
        uses one density for all layers); densities are stepped by a momentum SGD of their own, with learning rate and decay of the
        layer's weight.
    """

    least: float = 0.1
    weight: float = 0.01
    start: Literal["uniform", "erk"] = "uniform"

    def __post_init__(self) -> None:
        check_choice("start", self.start, ("uniform", "erk"))
        for name, value, high in (("least", self.least, 1.0), ("weight", self.weight, float("inf"))):
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not 0 <= value < high or (name == "least" and not value):
                bound = "in (0, 1)" if name == "least" else "of 0 or more"
                raise PruneError(f"Expected {name} {bound}; found {value!r}. The paper uses least=0.1 and weight=0.01.")

    def shares(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, float]:
        """Say what densities start in proportion to.

        Args:
            shapes: Shapes of the layers' weights.

        Returns:
            By `start`.
        """
        return {name: sum(shape) / prod(shape) if self.start == "erk" else 1.0 for name, shape in shapes.items()}

    def begin(self, name: str, weight: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Scale the weights, as HYDRA does.

        Args:
            name: The layer's parameter.
            weight: Its value (out, in, ...).
            seed: Without influence.

        Returns:
            Weights and scores.
        """
        return HYDRA().begin(name, weight, seed)


@dataclass(frozen=True)
class RLTH(ScoreLearner):
    """Scores over random weights that never train.

    w0 = +-sqrt(2 / fan_in) with random signs; s is uniform in +-1 / sqrt(fan_in). Norms stand at scale one and shift zero.

    Source:
        Fu et al., Drawing robust scratch tickets: Subnetworks with inborn robustness are found within randomly initialized networks,
        section 3. Divergence: norms keep their scales and shifts, at one and zero, where the authors' code has none.
    """

    trains_norms: ClassVar[bool] = False

    def begin(self, name: str, weight: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Draw weights and scores.

        Args:
            name: The layer's parameter, which the draw depends on.
            weight: Whose shape, type and device to use (out, in, ...).
            seed: Of the draw.

        Returns:
            Weights and scores.
        """
        generator = torch.Generator().manual_seed(seed_of(seed, name))
        shape, fan_in = weight.shape, _fan_in(weight)
        signs = torch.randint(2, shape, generator=generator).mul_(2).sub_(1)
        scores = torch.rand(shape, generator=generator).mul_(2).sub_(1) / sqrt(fan_in)
        return (signs * sqrt(2 / fan_in)).to(weight), scores.to(weight)


@torch.no_grad()
def neutral_norms(model: nn.Module) -> None:
    """Bring every norm to scale one and shift zero.

    Args:
        model: The network, changed in place.
    """
    for module in model.modules():
        if is_norm(module):
            for name, p in module.named_parameters(recurse=False):
                p.fill_(0 if "bias" in name else 1)


def top_mask(scores: Tensor, keep: int) -> Tensor:
    """Mark the entries of largest absolute value; ties go to the lower flat index.

    Args:
        scores: Finite numbers of any shape and memory format.
        keep: How many, from 1 to all.

    Returns:
        A mask of the same shape with exactly `keep` entries True; nothing waits for the device.

    >>> top_mask(torch.tensor([[1.0, -3.0], [3.0, 3.0]]), 2)
    tensor([[False,  True],
            [ True, False]])
    """
    flat = scores.detach().abs().flatten()
    if keep >= flat.numel():
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = flat.topk(keep, sorted=False).values.min()
    above, level = flat > threshold, flat == threshold
    above |= level & (level.cumsum(0) <= keep - above.count_nonzero())
    return above.view(scores.shape)


def proportional(sizes: Mapping[str, int], densities: Mapping[str, float], keep: int) -> dict[str, int]:
    """Share out entries over layers in proportion to their sizes times densities.

    Args:
        sizes: Entries of each layer.
        densities: Positive numbers by layer; only their ratios count.
        keep: Entries in all, at least one a layer and at most all.

    Returns:
        Entries kept of each layer, from 1 to all of it, `keep` together; what is left over by rounding down goes to the largest remainders.
    """
    low, high = 0.0, 1 / min(densities[name] for name in sizes)
    for _ in range(100):  # the scale at which all shares together are what is kept
        scale = (low + high) / 2
        wanted = {name: min(max(1.0, scale * sizes[name] * densities[name]), float(n)) for name, n in sizes.items()}
        low, high = (scale, high) if sum(wanted.values()) < keep else (low, scale)
    counts = {name: int(share) for name, share in wanted.items()}
    order = sorted((n for n in sizes if counts[n] < sizes[n]), key=lambda name: counts[name] - wanted[name])
    for name in order[: keep - sum(counts.values())]:
        counts[name] += 1
    return counts


def _kept(sizes: Mapping[str, int], sparsity: float) -> int:
    total = sum(sizes.values())
    keep = total - prune_count(sparsity, total)
    if keep < len(sizes):
        raise PruneError(
            f"Expected a sparsity that leaves every layer an entry; found {sparsity}, which leaves {keep} for {len(sizes)} layers. "
            f"Lower it to {1 - len(sizes) / total:.6f} or below."
        )
    return keep


def _fan_in(weight: Tensor) -> int:
    return max(1, weight[0].numel()) if weight.ndim > 1 else weight.numel()
