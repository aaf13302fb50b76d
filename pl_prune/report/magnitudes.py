"""Figures of what each criterion keeps and prunes of the weights' magnitudes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pl_prune.report.axes import powers_of_ten
from pl_prune.report.canvas import Picture, draw, legend, legend_height, look, panels
from pl_prune.report.entries import Entries, ranks
from pl_prune.report.saliency import REST, counts, edges
from pl_prune.report.words import apart, listed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_KEPT, _LINE = "#D55E00", "#009E73"
_POINTS = 1500
_BINS = 40


def scatter_figure(found: Sequence[Entries], magnitudes: Entries) -> Picture | None:
    """Draw scores against magnitudes: how many kept entries are smaller than what magnitude pruning would keep.

    Args:
        found: Runs of the magnitudes' network.
        magnitudes: A run whose scores are the magnitudes at which all were scored.

    Returns:
        The figure; None where no run has the shapes of the magnitudes.

    Source:
        Figure A8 of Gollini Navarrete et al.: a point is an entry, red ones are kept, the line is the percentile of the
        magnitudes at the run's sparsity. Both axes are logarithmic here, and at most 1500 kept and 1500 pruned entries
        are drawn.
    """
    found = [one for one in found if one.shapes == magnitudes.shapes and one is not magnitudes]
    if not found:
        return None
    sizes = magnitudes.scores
    lines = [_percentile(sizes, one) for one in found]
    below = [100 * float((sizes[one.kept] < line).double().mean()) for one, line in zip(found, lines, strict=True)]

    def paint(figure: Figure) -> None:
        titles = apart([e.row for e in found], 30)
        for axes, one, line in zip(panels(figure, titles, alike="x"), found, lines, strict=True):
            _scatter(axes, one, sizes, line)
        figure.supxlabel("magnitude |w| when scored (log scale)", size=9)
        figure.supylabel("score (log scale)", size=9)

    zeros = [one.row for one in found if float(one.scores.min()) == 0]
    hidden = f" Entries of score 0 ({listed(zeros)}) are not drawn." if zeros else ""
    words = [f"{one.row} {share:.3g} %" for one, share in zip(found, below, strict=True)]
    said = "Share of the kept entries (coloured) that magnitude pruning would have removed, left of the line"
    caption = f"{said}: {listed(words)}. {_whence(magnitudes)}{hidden}"
    return draw("kept_magnitudes", "Scores against magnitudes", caption, 0.55 + 1.5 * -(-len(found) // 2), paint)


def pruned_figure(found: Sequence[Entries], magnitudes: Entries) -> Picture | None:
    """Draw the histogram of the magnitudes that each criterion prunes.

    Args:
        found: Runs of the magnitudes' network.
        magnitudes: A run whose scores are the magnitudes at which all were scored.

    Returns:
        The figure; None where no run has the shapes of the magnitudes.

    Source:
        Figure 2 of IPPRO shows the magnitudes of pruned filters; here they are those of pruned weights, and the share that
        goes at each percentile stands below, for at high sparsity the histogram of pruned weights is that of all.
    """
    found = [one for one in found if one.shapes == magnitudes.shapes]
    if not found:
        return None
    sizes = magnitudes.scores
    ends = torch.linspace(0, float(sizes.quantile(0.99)) or 1.0, _BINS + 1, dtype=torch.float64).tolist()
    place = (ranks(sizes) * (_BINS / len(sizes))).long()
    full = place.bincount(minlength=_BINS)
    labels = [*apart([one.row for one in found], 28), "all entries"]

    def paint(figure: Figure) -> None:
        top, bottom = figure.subplots(2, 1)
        whole = top.stairs(counts(sizes, ends), ends, fill=True, color=REST, alpha=0.6)
        handles = []
        for one in found:
            style = {**look(one.place), "markevery": (one.place % 5, 5)}
            top.stairs(counts(sizes[~one.kept], ends), ends, color=style["color"], linewidth=1.2)
            shares = 100 * place[~one.kept].bincount(minlength=_BINS) / full
            handles += bottom.plot([100 * (i + 0.5) / _BINS for i in range(_BINS)], shares.tolist(), **style)
        top.set_ylabel("pruned entries")
        top.set_xlabel("magnitude |w| when scored; the last bin holds all larger ones")
        bottom.set_ylabel("pruned (%)")
        bottom.set_xlabel("percentile of the magnitude")
        bottom.grid(alpha=0.2)
        legend(figure, bottom, [*handles, whole], labels)

    means = [f"{one.row} {float(sizes[~one.kept].mean()):.3g}" for one in found if not bool(one.kept.all())]
    caption = (
        f"The mean magnitude of pruned entries is: {listed(means)}; of all entries it is {float(sizes.mean()):.3g}. "
        f"A row whose line below is flat prunes large and small weights alike. {_whence(magnitudes)}"
    )
    return draw("pruned_magnitudes", "Magnitudes that are pruned", caption, 3.9 + legend_height(labels), paint)


def _whence(magnitudes: Entries) -> str:
    return f"Magnitudes are the scores of {magnitudes.row}, which scored the same weights."


def _percentile(sizes: Tensor, one: Entries) -> float:
    return float(sizes.quantile(1 - float(one.kept.double().mean())))


def _scatter(axes: Axes, one: Entries, sizes: Tensor, line: float) -> None:
    ends, flat = edges(one.scores)
    for kept, color in ((False, REST), (True, _KEPT)):
        places = (one.kept == kept).nonzero().flatten()
        places = places[torch.randperm(len(places), generator=torch.Generator().manual_seed(0))[:_POINTS]]
        places = places[(sizes[places] > 0) & ((one.scores[places] > 0) | (flat is not None))]
        points = axes.plot(sizes[places].numpy(), one.scores[places].numpy(), "o", color=color, rasterized=True)
        points[0].set(markersize=1.4, markeredgewidth=0)
    axes.axvline(line, color=_LINE, linewidth=1.2, dashes=(4, 2))
    small, large = float(sizes.quantile(0.0005)) or 1e-6, float(sizes.max()) or 1.0
    powers_of_ten(axes.xaxis, small, large)
    axes.set_xlim(small / 1.5, 1.5 * large)
    powers_of_ten(axes.yaxis, ends[0], ends[-1], flat)
