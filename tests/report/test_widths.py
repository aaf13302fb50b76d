"""Figures of widths count every channel once, where norms are pruned with the layer before them too."""

from __future__ import annotations

from pathlib import Path

import pytest

from pl_prune.report.grid import Run
from pl_prune.report.widths import run_width_figure


def layer(name, shape, empty):
    return {"name": name, "shape": shape, "empty_rows": empty}


NORMS = [layer("norm.weight", [8], 5), layer("norm.bias", [8], 5)]


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ([layer("conv.weight", [8, 3, 3, 3], 5), *NORMS, layer("fc.weight", [4, 8], 0)], "5 of 12 output channels"),
        (NORMS, "10 of 16 output channels"),
    ],
    ids=["layers and norms", "norms alone"],
)
def test_a_channel_is_counted_once(layers, said):
    pytest.importorskip("matplotlib")
    picture = run_width_figure(Run(Path(), {}, layers, {}, True, []))
    assert picture.caption.startswith(said)
