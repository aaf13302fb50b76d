"""The figures of sharpness and stability: which lines they draw, and where nothing was measured."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from pl_prune.report import sharpness
from pl_prune.report.curves import curve_figures, run_figures
from pl_prune.report.grid import Group, Run, Study
from pl_prune.report.study import Cell


def run(start: float, rhos=("0.001", "0.01"), epochs: int = 4) -> Run:
    curve = [
        {
            "epoch": epoch,
            "step": 10 * epoch,
            "seconds": 1.0,
            "val/acc": 0.5,
            "sharpness/largest_eigenvalue": start - epoch,
            **{f"sharpness/loss_difference_{rho}": float(rho) * start for rho in rhos},
            "stability/hamming": 0.01 * epoch,
            "stability/hamming_of_kept": 0.05 * epoch,
        }
        for epoch in range(epochs)
    ]
    return Run(Path(), {"sparsity": 0.9}, [], {}, None, curve)


def study(**rows: list[Run]) -> Study:
    groups = [
        Group(
            Cell(row, {"sparsity": 0.9}, list(range(len(runs))), [0.5] * len(runs), [0.5] * len(runs), 1.0, 0.0, None),
            runs,
        )
        for row, runs in rows.items()
    ]
    return Study("s", groups, "val/acc", "maximize")


@pytest.fixture
def drawn(monkeypatch):
    """What every panel of the next figures shows: its title, and its lines' values."""
    seen: list[tuple[str, list[list[float]]]] = []
    panels = sharpness.panels

    def watched(figure, titles):
        axes = panels(figure, titles)
        for one, title in zip(axes, titles, strict=True):
            lines: list[list[float]] = []
            seen.append((title, lines))
            plot = one.plot

            def noted(xs, ys, plot=plot, lines=lines, **style):
                lines.append(list(ys))
                return plot(xs, ys, **style)

            one.plot = noted
        return axes

    monkeypatch.setattr(sharpness, "panels", watched)
    return seen


def test_a_run_has_one_figure_with_a_line_for_each_radius(drawn):
    figures = run_figures(run(8.0))
    assert [f.title for f in figures] == ["acc during training", "Sharpness and stability during training"]
    lines = dict(drawn)
    assert lines["largest eigenvalue, scores"] == [[8.0, 7.0, 6.0, 5.0]]
    assert lines["loss difference"] == [[0.008] * 4, [0.08] * 4]
    assert lines["Hamming distance, kept entries"] == [[0.0, 0.05, 0.1, pytest.approx(0.15)]]
    assert len(lines) == 4
    assert figures[1].png.startswith(b"\x89PNG")
    assert "\u03c1 = 0.001" in figures[1].svg


def test_a_study_sets_the_means_of_its_rows_side_by_side(drawn):
    figures = curve_figures(study(HYDRA=[run(8.0), run(10.0)], S2AP=[run(4.0)]))
    assert [f.name for f in figures] == ["training_1", "sharpness_1"]
    lines = dict(drawn)
    assert lines["largest eigenvalue, scores"] == [[9.0, 8.0, 7.0, 6.0], [4.0, 3.0, 2.0, 1.0]]
    assert lines["loss difference, \u03c1 = 0.01"] == [[pytest.approx(0.09)] * 4, [0.04] * 4]
    assert "S2AP" in figures[1].svg
    assert "sparsity 0.9" in figures[1].title


def test_rows_that_measured_nothing_are_left_out(drawn):
    plain = Run(Path(), {"sparsity": 0.9}, [], {}, None, [{"epoch": 0, "val/acc": 0.5}])
    assert [f.name for f in curve_figures(study(HYDRA=[plain], other=[plain]))] == ["training_1"]
    assert [f.name for f in run_figures(plain)] == ["training_1"]
    assert not drawn
    (_, figure) = curve_figures(study(HYDRA=[plain], S2AP=[run(4.0, rhos=())]))
    assert "HYDRA" not in figure.svg
    assert [title for title, _ in drawn] == [
        "largest eigenvalue, scores",
        "Hamming distance, all entries",
        "Hamming distance, kept entries",
    ]
