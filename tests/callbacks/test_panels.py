from __future__ import annotations

import pytest
import torch
from fake_module import TinyModule
from lightning.pytorch.loggers import CSVLogger
from refusal import expect_refusal

import pl_prune as plp
from pl_prune.report.attached import left_figures


class Drawn(TinyModule):
    def __init__(self):
        super().__init__()
        self.drawn = []

    def panels(self, batch):
        assert not self.training
        self.drawn.append(batch)
        return {"columns": {"input": [*batch[0].sigmoid()]}}


def test_the_first_samples_are_drawn_at_each_validation(fit, tmp_path):
    logger = CSVLogger(tmp_path, name="runs", version="one")
    module, _ = fit(plp.PredictionPanels(2), module=Drawn(), logger=logger, num_sanity_val_steps=0)
    assert [len(y) for _, y in module.drawn] == [2, 2]
    (picture,) = left_figures(tmp_path / "runs" / "one")
    assert (picture.name, picture.title) == ("predictions", "Predictions")
    assert picture.caption == "The first validation samples and predictions after 8 steps."


def test_drawing_changes_nothing(fit, tmp_path):
    drawn, plain = (
        fit(*callbacks, module=Drawn(), logger=CSVLogger(tmp_path, name=str(len(callbacks))))[0]
        for callbacks in ([plp.PredictionPanels()], [])
    )
    assert drawn.drawn
    for one, other in zip(drawn.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("settings", [{"logger": False}, {"fast_dev_run": True}])
def test_without_a_folder_nothing_is_drawn(fit, tmp_path, settings):
    assert fit(plp.PredictionPanels(), module=Drawn(), **settings)[0].drawn == []
    assert list(tmp_path.rglob("*.png")) == []


def test_what_cannot_be_drawn_is_refused(fit):
    with expect_refusal("samples", "0"):
        plp.PredictionPanels(0)
    with expect_refusal("TinyModule", "panels(batch)", "leave PredictionPanels out"):
        fit(plp.PredictionPanels())
