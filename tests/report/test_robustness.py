from __future__ import annotations

import json

import pytest
from refusal import expect_refusal

from pl_prune.adversarial.statistics import RobustAccuracy
from pl_prune.report.robustness import robustness_bars, robustness_curve, robustness_figures


def result(robust: int, eps: float = 8 / 255, norm: str = "linf") -> dict:
    settings = {"eps": eps, "norm": norm, "preset": "fast", "seed": 0, "chunk_size": 10, "attack": "none"}
    correct = (True,) * 9 + (False,)
    return RobustAccuracy(settings, "", correct, {"apgd-ce": (True,) * robust + (False,) * (10 - robust)}).to_dict()


def test_bars_name_models_and_what_was_done_to_them():
    picture = robustness_bars({"dense": result(4), "pruned": result(3)})
    for text in ("dense", "pruned", "40.0", "30.0", "90.0", "clean", "robust"):
        assert f">{text}<" in picture.svg, text
    assert "10 images; fast attacks, linf radius 8/255" in picture.caption
    assert picture.png.startswith(b"\x89PNG")


def test_a_curve_starts_at_clean_accuracy():
    picture = robustness_curve({"dense": [result(2, 16 / 255), result(4, 8 / 255)]})
    assert "linf (in 1/255)" in picture.svg
    with expect_refusal("one norm", "'l2', 'linf'"):
        robustness_curve({"dense": [result(4), result(4, norm="l2")]})
    for draw in (robustness_bars, robustness_curve):
        with expect_refusal("at least one result"):
            draw({})


def test_a_runs_folder(tmp_path):
    assert robustness_figures(tmp_path) == []
    (tmp_path / "robustness.json").write_text(json.dumps(result(4)))
    (picture,) = robustness_figures(tmp_path)
    assert "40.0" in picture.svg
    for damaged in ("{", '{"total": 10}'):
        (tmp_path / "robustness.json").write_text(damaged)
        with expect_refusal("robustness.json", "Evaluate again"):
            robustness_figures(tmp_path)


@pytest.mark.parametrize("robust", [0, 9])
def test_ends_of_the_scale(robust):
    assert robustness_bars({"one": result(robust)}).name == "robustness"
