"""`image_panels`: inputs, targets and predictions side by side, for segmentation, detection and super-resolution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pl_prune.core.types import PruneError
from pl_prune.report.canvas import WIDTH, Picture, draw
from pl_prune.report.words import abbreviate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BOX = "#E69F00"


def image_panels(
    name: str,
    title: str,
    caption: str,
    columns: Mapping[str, Sequence[Tensor]],
    boxes: Mapping[str, Sequence[Tensor]] | None = None,
) -> Picture:
    """Draw a line of images for each sample; `save_figure` leaves them in a run's folder.

    Args:
        name: Of the file.
        title: Of the figure.
        caption: One sentence that says what is seen, best with a number.
        columns: Images by the column's name, as many in each: (C, H, W) with 1 or 3 channels or (H, W), floating values
            in [0, 1], or whole numbers, which are classes and get a colour each (negative ones, as unlabelled pixels
            often are, none).
        boxes: Boxes by the column's name: for each image (K, 4) corners x0, y0, x1, y1 in pixels.

    Returns:
        The figure.

    Raises:
        PruneError: If columns have different lengths, or an image or boxes another shape.
    """
    boxes = boxes or {}
    lengths = {
        column: len(images) for column, images in {**columns, **{f"boxes of {c}": b for c, b in boxes.items()}}.items()
    }
    if not columns or len(set(lengths.values())) != 1 or not set(boxes) <= set(columns) or 0 in lengths.values():
        found = ", ".join(f"{n} of {column}" for column, n in lengths.items()) or "no column"
        raise PruneError(
            f"Expected columns of as many images each; found {found}. Pass the same samples in every column."
        )
    pixels = {column: [_pixels(column, image) for image in images] for column, images in columns.items()}
    for column, places in boxes.items():
        for corners in places:
            if corners.ndim != 2 or corners.shape[1] != 4:
                raise PruneError(
                    f"Expected boxes (K, 4) of {column!r}; found {tuple(corners.shape)}. Pass x0, y0, x1, y1."
                )
    classes = 1 + max(
        (int(p.max()) for found in pixels.values() for p in found if not p.is_floating_point()), default=0
    )
    lines = next(iter(lengths.values()))
    shape = next(iter(pixels.values()))[0].shape
    side = WIDTH / len(columns)

    def paint(figure: Figure) -> None:
        every = figure.subplots(lines, len(columns), squeeze=False)
        for x, (column, images) in enumerate(pixels.items()):
            every[0][x].set_title(abbreviate(column, int(60 / len(columns))))
            for y, image in enumerate(images):
                axes = every[y][x]
                _show(axes, image, classes)
                for corners in boxes[column][y].tolist() if column in boxes else ():
                    _frame(axes, corners)

    return draw(name, title, caption, min(0.3 + lines * side * shape[0] / shape[1], 3 * WIDTH), paint)


def _pixels(column: str, image: Tensor) -> Tensor:
    """Return (H, W) classes, or (H, W) or (H, W, 3) values."""
    image = image.detach().cpu()
    if image.ndim == 3 and image.shape[0] in (1, 3):
        image = image[0] if image.shape[0] == 1 else image.permute(1, 2, 0)
    if image.ndim != 2 and not (image.ndim == 3 and image.shape[2] == 3 and image.is_floating_point()):
        raise PruneError(
            f"Expected images (C, H, W) with 1 or 3 channels, or (H, W), of {column!r}; found {tuple(image.shape)} of {image.dtype}. "
            "Pass values in [0, 1], or one whole number a pixel."
        )
    return image.float().clamp(0, 1) if image.is_floating_point() else image.long()


def _show(axes: Axes, image: Tensor, classes: int) -> None:
    import matplotlib as mpl

    if image.is_floating_point():
        axes.imshow(image.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    else:
        colors: Any = mpl.colormaps["tab20" if classes <= 20 else "turbo"].resampled(classes)
        values = image.float().masked_fill(image < 0, float("nan")).numpy()
        axes.imshow(values, cmap=colors, vmin=-0.5, vmax=classes - 0.5, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def _frame(axes: Axes, corners: Sequence[float]) -> None:
    from matplotlib.patches import Rectangle

    left, top, right, bottom = corners
    axes.add_patch(
        Rectangle((left - 0.5, top - 0.5), right - left, bottom - top, fill=False, color=_BOX, linewidth=1.2)
    )
