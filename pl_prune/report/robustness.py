"""Figures of accuracy under attack."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pl_prune.core.types import PruneError
from pl_prune.report.canvas import INK, Picture, draw, legend, legend_height, look, need_matplotlib
from pl_prune.report.words import apart

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Result = Mapping[str, Any]
"""What `RobustAccuracy.to_dict()` returns, and `RobustnessEvaluation` writes to robustness.json."""


def robustness_bars(results: Mapping[str, Result]) -> Picture:
    """Draw clean and robust accuracy of one or several models, with their intervals.

    Args:
        results: By the name of the model; best of one attack and the same images.

    Returns:
        The figure.

    Raises:
        PruneError: If there is nothing to draw.
    """
    _some(results)
    names = apart(list(results), 28)
    kinds = ("clean", "robust")

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        for place, result in enumerate(results.values()):
            for side, kind in enumerate(kinds):
                value = 100 * result[kind]
                low, high = (100 * end for end in result[f"{kind}_interval"])
                at = place + 0.38 * side - 0.19
                error = [[max(0, value - low)], [max(0, high - value)]]
                axes.barh(at, value, xerr=error, color=look(side)["color"], ecolor=INK, capsize=2, height=0.34)
                axes.text(high + 1, at, f"{value:.1f}", va="center", size=7.5)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_xlim(0, 112)
        axes.set_xticks([0, 25, 50, 75, 100])
        axes.set_xlabel("accuracy (%)")
        axes.grid(axis="x", alpha=0.2)
        handles = [axes.barh(0, 0, color=look(side)["color"]) for side in range(len(kinds))]
        legend(figure, axes, handles, list(kinds))

    attacks = "; ".join(dict.fromkeys(_attack(result) for result in results.values()))
    total = ", ".join(dict.fromkeys(f"{result['total']} images" for result in results.values()))
    caption = (
        f"Look for whiskers, 95 % intervals, that keep apart ({total}; {attacks}). Models on the same images differ significantly far "
        "sooner than their intervals part: compare them image by image."
    )
    height = 1.0 + 0.5 * max(2, len(results)) + legend_height(kinds)
    return draw("robustness", "Accuracy without and under attack", caption, height, paint)


def robustness_curve(results: Mapping[str, Sequence[Result]]) -> Picture:
    """Draw robust accuracy against the radius of the attack.

    Args:
        results: By the name of the model: one for each radius, in one norm; clean accuracy is drawn at 0.

    Returns:
        The figure.

    Raises:
        PruneError: If there is nothing to draw, or norms differ.
    """
    _some(results)
    norms = {result["norm"] for several in results.values() for result in several}
    if len(norms) != 1:
        raise PruneError(f"Expected results in one norm; found {sorted(norms)}. Draw a figure for each.")
    (norm,) = norms
    labels = apart(list(results), 28)

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        handles = []
        for place, several in enumerate(results.values()):
            points = {0.0: (several[0]["clean"], *several[0]["clean_interval"])}
            points |= {255 * r["eps"]: (r["robust"], *r["robust_interval"]) for r in several}
            xs = sorted(points)
            value, low, high = ([100 * points[x][i] for x in xs] for i in range(3))
            axes.fill_between(xs, low, high, color=look(place)["color"], alpha=0.15, linewidth=0)
            handles += axes.plot(xs, value, **look(place))
        axes.set_ylim(0, 102)
        axes.set_xlim(left=0)
        axes.set_xlabel(f"radius of the attack, {norm} (in 1/255)")
        axes.set_ylabel("accuracy (%)")
        axes.grid(alpha=0.2)
        legend(figure, axes, handles, labels)

    caption = (
        "Look for lines that fall to zero as the radius grows: one that does not is a sign of an attack that fails. Bands are 95 % "
        "intervals."
    )
    return draw(
        "robustness_curve", "Accuracy against the radius of the attack", caption, 2.9 + legend_height(labels), paint
    )


def robustness_figures(folder: str | Path) -> list[Picture]:
    """Draw what an evaluation wrote into a run's folder.

    Args:
        folder: The run's.

    Returns:
        One figure; none where there is no robustness.json.

    Raises:
        PruneError: If the file is damaged.
    """
    file = Path(folder) / "robustness.json"
    if not file.is_file():
        return []
    need_matplotlib()
    try:
        result = json.loads(file.read_text())
        return [robustness_bars({"this run": result})]
    except (ValueError, KeyError, TypeError) as error:
        raise PruneError(
            f"Expected the result of an evaluation in {str(file)!r}; found something else ({error!r}). Evaluate again."
        ) from error


def _attack(result: Result) -> str:
    return f"{result['preset']} attacks, {result['norm']} radius {255 * result['eps']:.3g}/255"


def _some(results: Mapping[str, Any]) -> None:
    if not results or not all(results.values()):
        raise PruneError(
            "Expected at least one result for each model; found none. Evaluate with robust_accuracy first."
        )
