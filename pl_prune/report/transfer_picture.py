"""The picture of transfer: both indices of every criterion beside the noise of training."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev
from typing import TYPE_CHECKING

from pl_prune.report.canvas import Picture, draw, legend, look
from pl_prune.report.transfer import TransferCell

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def transfer_picture(cells: Sequence[TransferCell]) -> Picture:
    """Draw DTI and I3 with one standard deviation, over grey bars of the noise of training.

    Args:
        cells: The cells.

    Returns:
        The figure.
    """
    criteria = list(dict.fromkeys(cell.criterion for cell in cells))
    places = list(dict.fromkeys((cell.dataset, cell.sparsity) for cell in cells))
    step = len(criteria) + 1
    heights = {
        (criterion, place): -(step * j + i) for j, place in enumerate(places) for i, criterion in enumerate(criteria)
    }
    many = len({sparsity for _, sparsity in places}) > 1

    def paint(figure: Figure) -> None:
        left, right = figure.subplots(1, 2, sharey=True)
        for axes, index in ((left, "DTI"), (right, "I³")):
            for i, criterion in enumerate(criteria):
                mine = [cell for cell in cells if cell.criterion == criterion]
                found = [cell.dti if axes is left else cell.i3 for cell in mine]
                ys = [heights[criterion, (cell.dataset, cell.sparsity)] for cell in mine]
                axes.barh(ys, [2 * c.noise() for c in mine], left=[-c.noise() for c in mine], color="0.6", alpha=0.35)
                axes.errorbar(
                    [mean(values) for values in found],
                    ys,
                    xerr=[stdev(values) if len(values) > 1 else 0.0 for values in found],
                    label=criterion,
                    capsize=2,
                    **{**look(i), "linestyle": "none"},
                )
            axes.axvline(0, color="0.5", linewidth=0.8)
            axes.set_xlabel(f"{index}, difference of risk")
        left.set_yticks(
            [-(step * j + (len(criteria) - 1) / 2) for j in range(len(places))],
            [f"{dataset}, {sparsity:g}" if many else dataset for dataset, sparsity in places],
        )
        legend(figure, left, *left.get_legend_handles_labels())

    caption = (
        "Means and one standard deviation over seeds; grey: the noise of training, the same mask trained with another order of "
        "batches. A mask that moves well lies within the grey."
    )
    return draw("transfer", "Transfer of masks", caption, 1.2 + 0.16 * step * len(places), paint)
