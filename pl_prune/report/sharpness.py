"""Figures of what `ScoreSharpness` logs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pl_prune.report.canvas import INK, Picture, draw, legend, legend_height, look, panels
from pl_prune.report.epochs import Line, epoch_axis, over_seeds, trace
from pl_prune.report.grid import Run, Study
from pl_prune.report.words import apart

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_RISE = "sharpness/loss_difference_"
_PANELS = {
    "sharpness/largest_eigenvalue": "largest eigenvalue, scores",
    "stability/hamming": "Hamming distance, all entries",
    "stability/hamming_of_kept": "Hamming distance, kept entries",
}
_CAPTION = (
    "Look for lines that stay low: flat in the space of scores, and masks close to the first ones. At sparsity s the distance of all "
    "entries is at most 2 (1 - s); that of kept entries is the fraction of them that was exchanged."
)


def is_sharpness(metric: str) -> bool:
    """Say whether a metric has its place in these figures.

    Args:
        metric: Its name.

    Returns:
        True for those of `ScoreSharpness`.
    """
    return metric in _PANELS or metric.startswith(_RISE)


def run_sharpness(run: Run) -> list[Picture]:
    """Draw sharpness and stability over the epochs of a run.

    Args:
        run: The run.

    Returns:
        One figure; none where nothing was measured.
    """
    rises = _rises([run])
    lines = [(title, [(over_seeds([run], name), {**look(0), "color": INK})]) for name, title in _PANELS.items()]
    lines[1:1] = [
        ("loss difference", [(over_seeds([run], _RISE + rho), look(place)) for place, rho in enumerate(rises)])
    ]
    labels = [f"\u03c1 = {rho}" for rho in rises]
    return _figure("sharpness", "Sharpness and stability during training", _CAPTION, lines, labels)


def sharpness_figures(study: Study) -> list[Picture]:
    """Draw sharpness and stability over the epochs of every row, at the sparsest and at the densest point.

    Args:
        study: The study.

    Returns:
        At most two figures; none where nothing was measured.
    """
    figures = []
    for number, point in enumerate(study.shown):
        groups = [
            g for g in study.at(point) if any(is_sharpness(name) for run in g.runs for r in run.curve for name in r)
        ]
        rises = _rises([run for g in groups for run in g.runs])
        names = list(_PANELS.items())
        names[1:1] = [(_RISE + rho, f"loss difference, \u03c1 = {rho}") for rho in rises[-1:]]
        lines = [
            (title, [(over_seeds(g.runs, name), look(study.rows.index(g.cell.row))) for g in groups])
            for name, title in names
        ]
        title = f"Sharpness and stability during training at {study.label(point)}"
        caption = f"{_CAPTION} Bands are \u00b11 standard deviation over seeds."
        figures += _figure(f"sharpness_{number + 1}", title, caption, lines, apart([g.cell.row for g in groups], 28))
    return figures


def _rises(runs: Sequence[Run]) -> list[str]:
    """Return the radii of loss differences, ascending."""
    found = {name.removeprefix(_RISE) for run in runs for r in run.curve for name in r if name.startswith(_RISE)}
    return sorted(found, key=float)


def _figure(
    name: str, title: str, caption: str, lines: list[tuple[str, list[tuple[Line, dict[str, Any]]]]], labels: list[str]
) -> list[Picture]:
    """Draw a panel for each title with a line; the legend is that of the panel with the most of them."""
    lines = [(head, found) for head, several in lines if (found := [one for one in several if one[0]])]
    if not lines:
        return []

    def paint(figure: Figure) -> None:
        handles: list[Any] = []
        for axes, (_, several) in zip(panels(figure, [head for head, _ in lines]), lines, strict=True):
            drawn = [trace(axes, line, style) for line, style in several]
            handles = max(handles, drawn, key=len)
            epoch_axis(axes)
        if len(handles) > 1:
            legend(figure, axes, handles, labels)

    height = 0.3 + 1.75 * -(-len(lines) // 2) + (legend_height(labels) if len(labels) > 1 else 0)
    return [draw(name, title, caption, height, paint)]
