"""Pictures that runs leave, and panels of images."""

from __future__ import annotations

import pytest
import torch

from pl_prune.core.types import PruneError
from pl_prune.report.attached import gathered, left_figures, save_figure
from pl_prune.report.images import image_panels


def noise(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def picture():
    columns = {"input": list(noise(2, 3, 8, 8)), "target": [noise(16, 16), noise(1, 16, 16)]}
    return image_panels("panels", "Two <images>", "They agree to 90 %.", columns)


def test_a_picture_comes_back_from_a_folder(picture, tmp_path):
    file = save_figure(tmp_path, picture)
    assert file == tmp_path / "figures" / "panels.png"
    (found,) = left_figures(tmp_path)
    assert (found.name, found.title, found.caption, found.png) == (
        "panels",
        "Two <images>",
        "They agree to 90 %.",
        picture.png,
    )
    assert found.svg.startswith('<img src="data:image/png;base64,')
    assert 'alt="Two &lt;images&gt;. They agree to 90 %."' in found.svg


def test_any_png_is_taken_and_named_by_its_file(picture, tmp_path):
    assert left_figures(tmp_path) == []
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "Loss_surface-2.png").write_bytes(picture.png)
    (found,) = left_figures(tmp_path)
    assert (found.name, found.title) == ("loss_surface_2", "Loss surface-2")
    assert "Loss_surface-2.png" in found.caption
    (tmp_path / "figures" / "other.png").write_bytes(b"<svg>")
    with pytest.raises(PruneError, match=r"Expected a PNG in .*other.png"):
        left_figures(tmp_path)


def test_a_page_takes_what_it_has_room_for(picture, tmp_path, monkeypatch):
    for run in "ab":
        save_figure(tmp_path / run, picture)
    folders = [(run, tmp_path / run) for run in "abc"]
    found, left = gathered(folders)
    assert [p.title for p in found] == ["Two <images> (a)", "Two <images> (b)"]
    assert left == []
    monkeypatch.setattr("pl_prune.report.attached._ROOM", int(1.5 * len(found[0].svg)))
    found, left = gathered(folders)
    assert [p.title for p in found] == ["Two <images> (a)"]
    assert left == ["b: Two <images>"]


def test_segmentation_detection_and_super_resolution_have_their_panels():
    classes = torch.arange(16).view(4, 4) % 5 - 1
    segmentation = image_panels(
        "s", "t", "c", {"input": [noise(3, 4, 4)], "target": [classes], "prediction": [classes]}
    )
    boxes = {"target": [torch.tensor([[1.0, 1.0, 5.0, 6.0]])], "prediction": [torch.zeros(0, 4)]}
    images = list(noise(1, 3, 8, 8))
    detection = image_panels("d", "t", "c", {"target": images, "prediction": images}, boxes)
    larger = image_panels("u", "t", "c", {"low": [noise(1, 4, 4)], "high": [noise(1, 16, 16)], "made": [noise(16, 16)]})
    pictures = [segmentation, detection, larger]
    assert all(p.png.startswith(b"\x89PNG") for p in pictures)
    assert all(word in detection.svg for word in ("target", "prediction"))
    assert detection.svg.count("#E69F00".lower()) == 1


@pytest.mark.parametrize(
    ("columns", "boxes", "found"),
    [
        ({}, None, "no column"),
        ({"a": [noise(4, 4)], "b": []}, None, "1 of a, 0 of b"),
        ({"a": [noise(4, 4)]}, {"b": [noise(1, 4)]}, "1 of a, 1 of boxes of b"),
        ({"a": [noise(4, 4)]}, {"a": [noise(1, 5)]}, r"\(1, 5\)"),
        ({"a": [noise(4, 4, 4)]}, None, r"\(4, 4, 4\) of torch.float32"),
        ({"a": [noise(4)]}, None, r"\(4,\)"),
        ({"a": [torch.ones(3, 4, 4).long()]}, None, r"torch.int64"),
    ],
)
def test_what_is_no_image_is_refused(columns, boxes, found):
    with pytest.raises(PruneError, match=found):
        image_panels("n", "t", "c", columns, boxes)
