"""Figures of one look: SVG that follows the page's colours, PNG for elsewhere."""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pl_prune.core.types import PruneError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, PAPER = "#16181b", "#fdfdfc"
"""Text and background; on the page they become those of the reader's light or dark mode."""
WIDTH = 5.2
"""Inches: at this width the text of a figure is still readable on a phone."""
_PALETTE = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9")  # Okabe and Ito
_DASHES = ("-", "--", "-.", (0, (1, 1.2)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
_STYLE: Any = {
    "text.parse_math": False,
    "text.usetex": False,
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.labelsize": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "hatch.linewidth": 0.6,
    "path.simplify": True,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor"), "none"),
}


@dataclass(frozen=True)
class Picture:
    """A finished figure.

    Args:
        name: Of its file.
        title: Its heading.
        caption: What to look at.
        svg: An element for a page.
        png: The same for elsewhere, on white.
    """

    name: str
    title: str
    caption: str
    svg: str
    png: bytes


def need_matplotlib() -> None:
    """Import matplotlib.

    Raises:
        PruneError: If it is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise PruneError(
            "Expected matplotlib for the figures; found that it is not installed. Run pip install 'pl_prune[report]'."
        ) from error


def draw(name: str, title: str, caption: str, height: float, paint: Callable[[Figure], None]) -> Picture:
    """Draw a figure.

    Args:
        name: Of its file.
        title: Its heading; also what a screen reader says.
        caption: One sentence that says what to look at.
        height: In inches.
        paint: Fills the figure.

    Returns:
        The figure in both forms.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    svg, png = io.StringIO(), io.BytesIO()
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about letters that a font lacks, and layouts that are tight
        figure = Figure(figsize=(WIDTH, height), layout="constrained", dpi=144)
        canvas = FigureCanvasAgg(figure)
        paint(figure)
        figure.get_layout_engine().execute(figure)  # type: ignore[union-attr]
        figure.set_layout_engine("none")
        # Not by `savefig`, which draws everything twice; the SVG comes last, for it leaves 72 dots an inch.
        figure.patch.set_facecolor("white")
        canvas.print_png(png, pil_kwargs={"compress_level": 3})  # type: ignore[no-untyped-call]
        figure.patch.set_facecolor("none")
        FigureCanvasSVG(figure).print_svg(  # type: ignore[no-untyped-call]
            svg, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    return Picture(name, title, caption, _inline(svg.getvalue(), f"{title}. {caption}"), png.getvalue())


def _inline(svg: str, label: str) -> str:
    """Make matplotlib's file an element that takes its colours from the page and shares no name with other ones."""
    svg = re.sub(
        r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", svg[svg.index("<svg") :], flags=re.DOTALL
    )
    box = re.search(r'viewBox="([^"]*)"', svg)
    head = f'<svg viewBox="{box[1] if box else ""}" role="img" aria-label="{html.escape(label)}">'
    svg = head + svg[svg.index(">") + 1 :]
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"(font: [^;\"]*?px )[^;\"]*", r"\1system-ui, sans-serif", svg)
    svg = re.sub(r"\s*\n\s*", "\n", svg)
    return svg.replace(INK, "currentColor").replace(PAPER, "var(--paper)").strip()


def look(place: int) -> dict[str, Any]:
    """Return how a row's line looks: colours repeat after six, colours with dashes and markers do not.

    Args:
        place: Place of the row in the study.

    Returns:
        Keywords of `Axes.plot`.
    """
    return {
        "color": _PALETTE[place % len(_PALETTE)],
        "linestyle": _DASHES[(place + place // len(_PALETTE)) % len(_DASHES)],
        "marker": _MARKERS[place % len(_MARKERS)],
    }


def band(axes: Axes, xs: Sequence[float], middle: Sequence[float], wide: Sequence[float], color: str) -> None:
    """Shade what lies within one standard deviation of a line.

    Args:
        axes: Where.
        xs: Places.
        middle: Means.
        wide: Standard deviations.
        color: Of the line.
    """
    low = [m - w for m, w in zip(middle, wide, strict=True)]
    high = [m + w for m, w in zip(middle, wide, strict=True)]
    axes.fill_between(xs, low, high, color=color, alpha=0.15, linewidth=0)


def panels(figure: Figure, titles: Sequence[str], alike: Literal["x", "y"] | None = None) -> list[Axes]:
    """Divide a figure into small panels, two a line.

    Args:
        figure: Which.
        titles: Of the panels; about 36 letters fit.
        alike: The axis that the caller makes the same in all panels; it is labelled at the figure's edge alone.

    Returns:
        One axes for each title.
    """
    columns = min(2, len(titles))
    every = list(figure.subplots(-(-len(titles) // 2), columns, squeeze=False).flat)
    for place, (axes, title) in enumerate(zip(every, titles, strict=False)):
        axes.set_title(title, loc="left")
        if alike == "x":
            axes.tick_params(labelbottom=place + columns >= len(titles))
        elif alike == "y":
            axes.tick_params(labelleft=place % columns == 0)
    for axes in every[len(titles) :]:
        axes.remove()
    return every[: len(titles)]


def legend(figure: Figure, axes: Axes, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """Put a legend under a figure, in as many columns as its longest name leaves room for.

    Args:
        figure: Where.
        axes: Whose lines.
        handles: The lines.
        labels: Their names.
    """
    figure.legend(
        handles,
        [f" {label}" if label.startswith("_") else label for label in labels],
        loc="outside lower center",
        ncols=_columns(labels),
        handlelength=3.2,
        columnspacing=1.2,
    )


def legend_height(labels: Sequence[str]) -> float:
    """Return the inches that `legend` takes.

    Args:
        labels: Names.

    Returns:
        Inches.
    """
    return 0.12 + 0.175 * -(-len(labels) // _columns(labels))


def _columns(labels: Sequence[str]) -> int:
    return max(1, min(4, int(WIDTH * 72 / (42 + 4.7 * max(map(len, labels), default=1)))))
