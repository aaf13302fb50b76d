"""You only prune once: what a low-rank non-negative template leaves of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from pl_prune.core.criterion import Criterion
from pl_prune.core.probe import Probe
from pl_prune.core.seeds import generator_of
from pl_prune.core.types import Params, PruneError, Scores, check_count, score_dtype
from pl_prune.criteria.factorise import COPIES, SMALL, Divergence, Solver, factorise, svd_start, width


@dataclass(frozen=True)
class YOPO(Criterion):
    """Score every entry by | |w| - (V H) |, its distance from a non-negative template of low rank fitted to its layer.

    A layer is a matrix of shape (size of dimension 0, all else). Scores are fitted once, without data, and serve every
    sparsity: `Global` is YOPO-G as in the paper's algorithm 2, `Robust` YOPO-G as in its text, `Layerwise` YOPO-L.

    The rank of an (o, d) layer is at most a quarter of its shorter side (at least 1), so that no template fits nearly
    all of a small layer, and less than that side, so that none fits it exactly: a layer of one row or column gets rank 0.
    Rank 0 is `Magnitude`. Each matrix is divided by the power of two next to its mean before the fit, and the scores
    multiplied by it after, so a layer scaled by a power of two has its scores scaled, bit for bit. Small layers are fitted
    together, and beside the scores no more is held at once than three copies of the largest layer.

    Args:
        rank: Rank of the template; the paper takes 7, and 14 for ImageNet.
        iterations: How many times both factors are updated; a twentieth is enough for "hals".
        solver: "mu", multiplicative updates; "hals", hierarchical least squares, which needs far fewer iterations and
            leads to other factors, so to other masks.
        init: "uniform" draws the factors from [0, 1), by `seed` and the layer's name; "nndsvda" and "svd" draw nothing:
            they start from singular vectors, "svd" from their absolute values.
        normalize: Divide a layer's scores by the median of its |w|, so that layers of other scales compete evenly.
        per_filter: Fit each filter's (input channels, kernel) matrix alone, in layers that have such (not in linear,
            1x1 and depthwise ones).
        divergence: What the fit minimises.
        tolerance: Stop fitting a layer when its divergence fell by less than this fraction over ten iterations; 0 never.
        seed: Seed of the uniform draws, made on the CPU.

    Source:
        You Only Prune Once (YOPO), equations 7 to 9, algorithm 1 and appendix G. Divergences: the paper caps no rank; its
        epsilon of 1e-8 is absolute and changes V H by some 1e-3 at the usual weights' size, ours is relative; its
        per-channel variant fits each row by rank 1, which leaves nothing of it, hence `per_filter`; "svd" and "hals" are
        ours. It divides by the median before the fit, which gives the same scores.
    """

    rank: int = 7
    iterations: int = 200
    solver: Solver = "mu"
    init: Literal["uniform", "nndsvda", "svd"] = "uniform"
    normalize: bool = False
    per_filter: bool = False
    divergence: Divergence = "frobenius"
    tolerance: float = 0.0
    seed: int = 0
    needs_data: ClassVar[bool] = False
    needs_loss: ClassVar[bool] = False
    uses_gradients: ClassVar[bool] = False

    @property
    def cost(self) -> str:
        """Nothing is run."""
        return "no pass"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("YOPO.iterations", self.iterations)
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 0:
            raise PruneError(
                f"Expected YOPO.rank to be a whole number of 0 or more; found {self.rank!r}. The paper's is 7."
            )
        if isinstance(self.tolerance, bool) or not isinstance(self.tolerance, (int, float)) or not self.tolerance >= 0:
            raise PruneError(
                f"Expected YOPO.tolerance to be a number of 0 or more; found {self.tolerance!r}. Use 0 to run all iterations."
            )
        if self.solver == "hals" and self.divergence != "frobenius":
            raise PruneError(
                f"Expected solver 'mu' for YOPO.divergence={self.divergence!r}; found 'hals', which fits squared distances. "
                "Change one of the two."
            )

    def __call__(self, probe: Probe) -> Scores:
        """Fit the templates.

        Args:
            probe: The parameters.

        Returns:
            Non-negative scores in float32, or float64 for float64 parameters.

        Raises:
            PruneError: If a weight is not finite, or the rank exceeds both sides of every layer.
        """
        sides = [max(self._form(p.shape)[1:]) for p in probe.params.values()]
        if self.rank > max(sides, default=self.rank):
            raise PruneError(
                f"Expected YOPO.rank to be below the sides of some layer; found {self.rank}, where the longest side is "
                f"{max(sides)}. Lower the rank; the paper's is 7."
            )
        scores = {name: torch.empty(p.shape, dtype=score_dtype(p), device=p.device) for name, p in probe.params.items()}
        with torch.no_grad():
            for names in self._portions(scores):
                self._score({name: probe.params[name] for name in names}, {name: scores[name] for name in names})
        return scores

    def _score(self, params: Params, scores: Scores) -> None:
        """Score parameters together, in the tensors that are there for the scores."""
        stacks, scales, medians = [], [], []
        for (name, p), score in zip(params.items(), scores.values(), strict=True):
            stack = score.copy_(p).abs_().view(self._form(p.shape))
            mean = stack.mean((1, 2), keepdim=True)
            if not bool(mean.isfinite().all()):
                raise PruneError(
                    f"Expected finite weights; found NaN or infinity in {name}. Look for a diverged run, or a damaged checkpoint."
                )
            medians.append(_median(score) if self.normalize else None)
            scales.append(torch.where(mean > 0, mean / torch.frexp(mean).mantissa, 1))  # the power of two, exactly
            stacks.append(stack.div_(scales[-1]))
        if rank := self._rank(*stacks[0].shape[1:]):
            v, h = self._start(dict(zip(params, stacks, strict=True)), rank)
            factorise(stacks, v, h, self.iterations, self.solver, self.divergence, self.tolerance)
            first = 0
            for stack in stacks:
                here = slice(first, first := first + len(stack))
                stack.baddbmm_(v[here, :, : stack.shape[1]].mT, h[here, :, : stack.shape[2]], alpha=-1).abs_()
        for stack, scale, median in zip(stacks, scales, medians, strict=True):
            stack.mul_(scale).div_(1 if median is None else median)

    def _start(self, stacks: dict[str, Tensor], rank: int) -> list[Tensor]:
        """Make the factors that the fit starts from, zero beyond each layer's sides."""
        starts = [
            self._drawn(name, stack, rank) if self.init == "uniform" else svd_start(stack, rank, self.init == "svd")
            for name, stack in stacks.items()
        ]
        factors = []
        for parts in zip(*starts, strict=True):
            widest = max(width(part.shape[2], rank) for part in parts)
            factors.append(torch.cat([pad(part, (0, widest - part.shape[2])) for part in parts]))
        return factors

    def _drawn(self, name: str, stack: Tensor, rank: int) -> list[Tensor]:
        generator = generator_of(self.seed, name)
        sides = stack.shape[1:]
        return [
            torch.rand(len(stack), rank, side, generator=generator, dtype=torch.float64).to(stack) for side in sides
        ]

    def _form(self, shape: torch.Size) -> tuple[int, int, int]:
        """Say of how many matrices a parameter consists, and their shape."""
        if self.per_filter and len(shape) > 2 and min(shape[1], shape[2:].numel()) > 1:
            return shape[0], shape[1], shape[2:].numel()
        return (1, shape[0], shape[1:].numel()) if len(shape) > 1 else (1, 1, shape.numel())

    def _rank(self, rows: int, columns: int) -> int:
        short = min(rows, columns)
        return max(min(self.rank, max(short // 4, 1), short - 1), 0)

    def _portions(self, scores: Scores) -> Iterator[list[str]]:
        """Cut the layers into portions that are fitted together: small ones of one rank, large ones alone."""
        budget = (3 - max(COPIES[self.divergence], 1)) * max(map(Tensor.numel, scores.values()), default=0)
        forms = {name: self._form(score.shape) for name, score in scores.items() if score.numel()}
        alike: dict[tuple[object, ...], list[str]] = {}
        for name in sorted(forms, key=lambda n: forms[n][1:]):
            key = scores[name].dtype, scores[name].device, self._rank(*forms[name][1:])
            alike.setdefault(key if scores[name].numel() <= SMALL else (name,), []).append(name)
        for names in alike.values():
            rank = self._rank(*forms[names[0]][1:])
            portion: list[str] = []
            for name in names:
                together = [*portion, name]
                count = sum(forms[n][0] for n in together)
                sides = sum(max(width(forms[n][i], rank) for n in together) for i in (1, 2)) if rank else 0
                if portion and 3 * rank * count * sides > budget:
                    yield portion
                    together = [name]
                portion = together
            yield portion


def _median(a: Tensor) -> Tensor:
    """Median, or where that is zero the mean, or where that is zero too, 1."""
    found = (a.median() - a.neg().median()) / 2  # `kthvalue` on CUDA is refused under deterministic algorithms
    return next((x for x in (found, a.mean()) if x > 0), torch.ones_like(found))
