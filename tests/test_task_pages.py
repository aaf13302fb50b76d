"""Fragments that want a data set, pretrained weights or a command line run on small ones."""

from __future__ import annotations

import json
import sys

import fake_text
import pytest
import torch
from fake_module import TinyModule
from fragments import PAGES, ROOT, fragments, run
from lightning.pytorch import LightningDataModule

import pl_prune as plp
from pl_prune import data
from pl_prune.data import SQuAD


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


def test_every_fragment_of_python_is_run_somewhere():
    files = ["test_docs", "test_pages", "test_readme", "test_migration", "test_task_pages"]
    tests = "".join((ROOT / "tests" / f"{name}.py").read_text() for name in files)
    pages = [page for page in PAGES if fragments(page, "python")]
    assert len(pages) > 20
    assert [page for page in pages if f'"{page}"' not in tests and f'"{page}.md"' not in tests] == []


@pytest.mark.filterwarnings("ignore:Starting from v1.9.0", "ignore:.*learning rate")
def test_language(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    folder = fake_text.bert(tmp_path / "google-bert" / "bert-base-uncased")
    config = transformers.AutoConfig.from_pretrained(folder)
    transformers.AutoModelForQuestionAnswering.from_config(config).save_pretrained(folder)
    fake_text.squad(tmp_path / "squad")
    train = tmp_path / "squad" / "train-v1.1.json"
    content = json.loads(train.read_text())
    train.write_text(json.dumps({**content, "data": content["data"] * 4}))
    windows = {"max_length": 24, "doc_stride": 4, "max_query_length": 8}
    small = lambda root, tokenizer, batch_size: SQuAD(root, tokenizer, batch_size=2, **windows)  # noqa: E731
    monkeypatch.setattr(data, "SQuAD", small)
    found = run("language", {})
    layers = found["small"].network.bert.encoder.layer
    assert sum(layer.intermediate.dense.out_features for layer in layers) == 30  # of twice 30


def test_tasks(monkeypatch):
    detection = pytest.importorskip("torchvision.models.detection")
    network = detection.fasterrcnn_mobilenet_v3_large_320_fpn
    weights = detection.FasterRCNN_MobileNet_V3_Large_320_FPN_Weights
    state = network(weights=None, weights_backbone=None).state_dict()
    frozen = {name: value for name, value in state.items() if "num_batches" not in name}  # as frozen norms have it
    monkeypatch.setattr(weights, "get_state_dict", lambda self, **kwargs: frozen)
    free = run("tasks", {"torch": torch})["free"]
    assert any(isinstance(m, torch.nn.BatchNorm2d) for m in free.modules())
    saved = torch.load("coco.pt")
    assert all(torch.equal(saved[name], value) for name, value in frozen.items())


def test_studies(tmp_path):
    from pl_prune.report.attached import left_figures, save_figure
    from pl_prune.report.images import image_panels

    pytest.importorskip("matplotlib").use("Agg")
    images, classes = torch.rand(2, 3, 8, 8), torch.randint(3, (2, 8, 8))
    space = {"image_panels": image_panels, "save_figure": save_figure, "run": plp.RunFolder(tmp_path)}
    run("studies", {**space, "images": images, "classes": classes, "predicted": classes, "iou": 0.5})
    assert left_figures(tmp_path)[0].caption == "Mean IoU 0.500."


def test_command_line(monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["main.py", "fit", "--prune=PruneAtInit", "--prune.sparsity=0.8", "--print_config"]
    )
    with pytest.raises(SystemExit, match="0"):
        run("command_line", {"__name__": "__main__", "YourModule": TinyModule, "YourData": LightningDataModule})
    assert "sparsity: 0.8" in capsys.readouterr().out
