"""`alignment`: how far parameters moved along each eigenvector of the Hessian at the start."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from pl_prune.core.batch import batch_size
from pl_prune.core.hessian import hessian_products
from pl_prune.core.sandbox import untouched
from pl_prune.core.types import PruneError
from pl_prune.report.canvas import INK, Picture, draw, legend, legend_height, look
from pl_prune.report.entries import ranks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST = 20_000
_TOP = 10
_ZERO = 1e-10


@dataclass(frozen=True)
class Alignment:
    """A movement in the eigenbasis of a Hessian.

    Args:
        eigenvalues: (n,) by descending size |λ|.
        squares: (n,) squared projections of the movement on their eigenvectors; they sum up to its squared length.
    """

    eigenvalues: Tensor
    squares: Tensor

    def share(self, top: int) -> float:
        """Return the part of the squared movement along the first eigenvectors.

        Args:
            top: How many, those of the largest |λ|.

        Returns:
            In [0, 1]; 0 where nothing moved.
        """
        whole = float(self.squares.sum())
        return float(self.squares[:top].sum()) / whole if whole else 0.0

    @property
    def curved(self) -> int:
        """Eigenvalues that are not zero up to rounding (1e-10 of the largest)."""
        sizes = self.eigenvalues.abs()
        return int((sizes > _ZERO * sizes.max()).sum())

    def correlation(self) -> float:
        """Correlate |λ| with the squared projection, over the eigenvectors along which the loss is curved.

        Returns:
            Spearman's rank correlation; NaN for fewer than two.
        """
        count = self.curved
        if count < 2:
            return float("nan")
        a, b = (ranks(v[:count]) for v in (self.eigenvalues.abs(), self.squares))
        a, b = a - a.mean(), b - b.mean()
        scale = float(a.norm() * b.norm())
        return float(a @ b) / scale if scale else float("nan")


def eigenbasis(
    model: nn.Module, loss_fn: Callable[[nn.Module, Any], Tensor], batches: Sequence[Any]
) -> tuple[Tensor, Tensor]:
    """Decompose the exact Hessian of the mean loss, in float64.

    Args:
        model: A small model, before training; it stays as it is.
        loss_fn: `loss_fn(model, batch)`, the mean loss of a batch.
        batches: All data, on the model's device.

    Returns:
        Eigenvalues (n,) by descending |λ|, and eigenvectors (n, n) as columns in the same order; parameters are flattened
        one after the other in the order of `named_parameters()`.

    Raises:
        PruneError: If there is no data, or the model has more than 20,000 parameters.
    """
    count = sum(p.numel() for p in model.parameters())
    if count > _MOST or not batches:
        found = f"{count:,} parameters" if count > _MOST else "no batches"
        raise PruneError(
            f"Expected at most {_MOST:,} parameters, whose Hessian has {_MOST**2 * 8 / 2**30:.0f} GiB, and data; found {found}. "
            "Take a smaller network."
        )
    double = copy.deepcopy(model).double()
    data = [
        tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, b) for b in batches
    ]
    sizes = [batch_size(b) for b in data]
    params = list(double.parameters())

    def loss() -> Tensor:
        parts = [loss_fn(double, b) * (size / sum(sizes)) for b, size in zip(data, sizes, strict=True)]
        return torch.stack(parts).sum()

    with untouched(double):
        for p in params:
            p.requires_grad_()
        hessian = params[0].new_empty(count, count)
        for row, product in enumerate(hessian_products(loss, params, _units(params))):
            hessian[row] = torch.cat([h.detach().flatten() for h in product])
    values, vectors = torch.linalg.eigh((hessian + hessian.T) / 2)
    order = values.abs().argsort(descending=True, stable=True)
    return values[order], vectors[:, order]


def alignment(basis: tuple[Tensor, Tensor], before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Alignment:
    """Project a movement on an eigenbasis.

    Args:
        basis: What `eigenbasis` returned for the model before it moved.
        before: Its parameters by name, in their order.
        after: The same after some training.

    Returns:
        The movement in the eigenbasis.

    Raises:
        PruneError: If names or sizes differ.

    Source:
        Gollini Navarrete et al., Appendix A: z = U^T (w_t - w_0) for the Hessian at w_0 over the train set. They plot |z|; we
        square it, so that shares of the movement can be summed up.
    """
    values, vectors = basis
    if list(before) != list(after) or sum(p.numel() for p in before.values()) != len(values):
        raise PruneError(
            f"Expected the {len(values)} parameters of the eigenbasis before and after; found "
            f"{sum(p.numel() for p in before.values())} and {sum(p.numel() for p in after.values())}. "
            "Pass dict(model.named_parameters()), copied before the training."
        )
    moved = torch.cat([(after[name].detach().double() - before[name].detach().double()).flatten() for name in before])
    return Alignment(values, (vectors.T @ moved.to(vectors.device)).square())


def _units(params: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Make the unit vectors, one after the other."""
    for which, param in enumerate(params):
        for entry in range(param.numel()):
            vector = [torch.zeros_like(p) for p in params]
            vector[which].view(-1)[entry] = 1.0
            yield vector


def alignment_figure(found: Mapping[str, Alignment]) -> Picture:
    """Draw squared projections against eigenvalues, and how much of the movement the first eigenvectors hold.

    Args:
        found: Movements by what to call them ("first step", "epoch 5"), all of one Hessian; the last is the one drawn
            point by point.

    Returns:
        The figure.
    """
    name, last = list(found.items())[-1]
    count = len(last.eigenvalues)

    def paint(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        for sign, color, marker in ((1, "#0072B2", "o"), (-1, "#D55E00", "v")):
            mine = (last.eigenvalues * sign > 0).nonzero().flatten()
            mine = mine[mine < last.curved]
            size = float(last.squares.sum()) or 1.0
            left.scatter(
                last.eigenvalues[mine].abs().tolist(), (last.squares[mine] / size).tolist(), s=5, color=color, marker=marker,
                linewidths=0, rasterized=True, label="λ > 0" if sign > 0 else "λ < 0",
            )  # fmt: skip
        left.set_xscale("log")
        left.set_yscale("log")
        for axis in (left.xaxis, left.yaxis):
            axis.set_major_formatter(lambda value, _: f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e"))
            axis.get_major_locator().set_params(numticks=5)
        left.minorticks_off()
        left.set_xlabel("size of the eigenvalue |λ|")
        left.set_ylabel(f"share of the movement, {name}")
        left.legend(loc="lower right", markerscale=2, handletextpad=0.2)
        tops = range(1, count + 1)
        handles = []
        for place, one in enumerate(found.values()):
            sums = (100 * one.squares.cumsum(0) / (one.squares.sum() or 1)).tolist()
            handles += right.plot(tops, sums, **{**look(place), "marker": ""})
        (chance,) = right.plot(tops, [100 * top / count for top in tops], color=INK, linewidth=1, dashes=(2, 2))
        right.set_xscale("log")
        right.set_xticks(ticks := [10**i for i in range(len(str(count)))], [f"{tick:,}" for tick in ticks])
        right.minorticks_off()
        right.set_xlabel("eigenvectors of the largest |λ|")
        right.set_ylabel("share of the movement (%)")
        right.grid(alpha=0.2)
        legend(figure, right, [*handles, chance], labels)

    labels = [*found, "a random direction"]
    top = min(_TOP, count)
    caption = (
        f"{100 * last.share(top):.1f} % of the squared movement ({name}) lies along the {top} eigenvectors of largest |λ| of {count:,}, "
        f"of which {last.curved:,} are curved; a random direction would have {100 * top / count:.2g} %. Over the curved ones, |λ| and "
        f"movement have rank correlation {last.correlation():.2f}."
    )
    title = "Movement along the Hessian's eigenvectors"
    return draw("alignment", title, caption, 2.9 + legend_height(labels), paint)
