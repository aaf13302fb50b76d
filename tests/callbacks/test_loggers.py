from __future__ import annotations

import csv
import json
import re
import sys
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import yaml
from fake_module import TinyModule
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning_utilities.core.imports import RequirementCache

import pl_prune as plp
from pl_prune.__main__ import main
from pl_prune.report.curves import density_figure

wandb = pytest.importorskip("wandb")
Image = pytest.importorskip("PIL.Image")
from wandb_offline import offline_run  # noqa: E402

RECIPES = Path(__file__).parents[2] / "recipes"
FIT = ["fit", "--config", str(RECIPES / "quickstart.yaml"), "--trainer.max_epochs=1", "--trainer.limit_train_batches=2"]
FIT += ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--model.network.width=4"]
WANDB = [*FIT, "--config", str(RECIPES / "loggers" / "wandb.yaml")]


@pytest.fixture
def offline(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pl-prune"])
    for name, value in {"MODE": "offline", "SILENT": "true", "DIR": str(tmp_path)}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    yield monkeypatch
    wandb.finish()
    wandb.teardown()


class Drawn(TinyModule):
    def panels(self, batch):
        return {"columns": {"input": [*batch[0].sigmoid()]}}


def pixels(png):
    return np.asarray(Image.open(png).convert("RGB"))


def events(folder):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator(
        str(folder), {"images": 0, "tensors": 0, "scalars": 0}
    )
    return accumulator.Reload()


def test_every_logger_gets_the_same_figures(fit, offline, tmp_path):
    for name in ("tensorboard", "matplotlib"):
        pytest.importorskip(name)
    loggers = [
        CSVLogger(tmp_path, "csv", "one"),
        TensorBoardLogger(tmp_path, "tb", "one"),
        WandbLogger(project="wandb", save_dir=tmp_path),
    ]
    pruner = plp.GradualPruning(schedule=plp.OneShot(final=0.75, start=3))
    fit(pruner, plp.SparsityReport(), plp.PredictionPanels(2), module=Drawn(), logger=loggers, log_every_n_steps=1)
    wandb.finish()

    folder = tmp_path / "csv" / "one"
    head, *rows = csv.reader((folder / "layers.csv").read_text().splitlines())
    report = json.loads((folder / "report.json").read_text())
    assert [row[: 1 + head.index("kept")] for row in rows] == [
        [layer["name"], "x".join(map(str, layer["shape"])), str(layer["kept"])] for layer in report["layers"]
    ]
    assert sum(layer["kept"] for layer in report["layers"]) == 450

    board = events(tmp_path / "tb" / "one")
    dense, pruned = board.Tensors("sparsity/layers/text_summary")
    assert (dense.step, pruned.step) == (0, 8)
    said = pruned.tensor_proto.string_val[0].decode().splitlines()
    assert said[0] == f"| {' | '.join(head)} |"
    assert [line.split(" | ")[2] for line in said[2:]] == [row[2] for row in rows]
    assert [s.value for s in board.Scalars("sparsity/prunable")] == [0.0, 0.75]

    _, history, media = offline_run(tmp_path)
    tables = [record["sparsity/layers/path"] for record in history if "sparsity/layers/path" in record]
    table = json.loads((media / tables[-1]).read_text())
    assert (len(tables), table["columns"]) == (2, head)
    assert [row[2] for row in table["data"]] == [layer["kept"] for layer in report["layers"]]

    left = {"sparsity/density": folder / "density.png", "predictions": folder / "figures" / "predictions.png"}
    for name, png in left.items():
        files = [record[f"{name}/filenames"] for record in history if f"{name}/filenames" in record]
        assert np.array_equal(pixels(media / files[-1][0]), pixels(png)), name
        assert np.array_equal(pixels(BytesIO(board.Images(name)[-1].encoded_image_string)), pixels(png)), name
        assert len(files) == len(board.Images(name)) == (2 if name == "sparsity/density" else 3), name


def test_units_that_were_sliced_off_are_logged_as_units(fit, tmp_path):
    pytest.importorskip("torch_pruning")
    logger = CSVLogger(tmp_path, "csv", "one")
    fit(plp.StructuredPruning(plp.ByGroup(plp.Magnitude()), 0.5), plp.SparsityReport(), logger=logger)
    head, *rows = csv.reader((tmp_path / "csv" / "one" / "layers.csv").read_text().splitlines())
    units = json.loads((tmp_path / "csv" / "one" / "report.json").read_text())["units"]["layers"]
    assert (head, {name: [int(kept), int(total)] for name, kept, total in rows}) == (["name", "kept", "total"], units)
    assert sum(int(row[1]) for row in rows) < sum(int(row[2]) for row in rows)


def test_a_network_of_very_many_layers_is_drawn_by_its_sparsest():
    pytest.importorskip("matplotlib")
    picture = density_figure({f"layer{i}.weight": (i, 3000) for i in range(3000)}, "entries")
    assert "The 100 sparsest of 3000 layers" in picture.caption
    assert "layer99.weight" in picture.svg
    assert "layer100.weight" not in picture.svg


def test_without_matplotlib_there_are_tables_alone(fit, tmp_path, monkeypatch):
    monkeypatch.setattr("pl_prune.callbacks.report.can_draw", lambda: False)
    fit(plp.SparsityReport(), logger=CSVLogger(tmp_path, "csv", "one"))
    assert (tmp_path / "csv" / "one" / "layers.csv").is_file()
    assert list(tmp_path.rglob("*.png")) == []


def test_wandb_has_the_resolved_settings_by_the_names_of_the_command_line(offline, tmp_path):
    assert main([*WANDB, "--prune.allocation=ERK", "--prune.sparsity=0.8"]) == 0
    wandb.finish()
    config, _, _ = offline_run(tmp_path)
    asked = {"prune": "pl_prune.PruneAtInit", "prune.sparsity": 0.8, "prune.allocation": "pl_prune.ERK"}
    defaults = {"prune.bn_warmup": "auto", "prune.scores": None, "prune.samples.per_class": 10, "seed_everything": 42}
    assert {name: config[name] for name in asked | defaults} == asked | defaults
    assert not [name for name in config if "init_args" in name or "class_path" in name]
    (result,) = tmp_path.rglob("result.json")
    assert json.loads(result.read_text())["sparsity"] == pytest.approx(0.8, abs=1e-3)
    assert yaml.safe_load((result.parent / "config.yaml").read_text())["prune"]["init_args"]["sparsity"] == 0.8


@pytest.mark.parametrize("kind", ["CSVLogger", "TensorBoardLogger"])
def test_other_loggers_have_them_too(offline, kind):
    pytest.importorskip("tensorboard")
    folder = ["--trainer.logger.save_dir=runs", "--trainer.logger.name=a", "--trainer.logger.version=b"]
    assert main([*FIT, f"--trainer.logger={kind}", *folder]) == 0
    if kind == "CSVLogger":
        assert yaml.safe_load(Path("runs/a/b/hparams.yaml").read_text())["prune.sparsity"] == 0.9
    else:
        from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

        metadata = events("runs/a/b").SummaryMetadata("_hparams_/session_start_info")
        found = HParamsPluginData.FromString(metadata.plugin_data.content).session_start_info.hparams
        assert found["prune.sparsity"].number_value == 0.9
        assert found["prune"].string_value == "pl_prune.PruneAtInit"


def test_wandb_can_be_switched_off(offline, tmp_path):
    offline.setenv("WANDB_MODE", "disabled")
    assert main(WANDB) == 0
    (result,) = tmp_path.rglob("result.json")
    assert json.loads(result.read_text())["sparsity"] == pytest.approx(0.9, abs=1e-3)
    assert list(tmp_path.rglob("*.wandb")) == []


def test_wandb_without_a_key_is_refused_with_the_fix(offline, tmp_path, capfd):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        offline.delenv(name, raising=False)
    offline.setenv("HOME", str(tmp_path))
    offline.setenv("NETRC", str(tmp_path / "none"))
    offline.setattr("sys.stdin", None)
    assert main(WANDB) == 2
    said = capfd.readouterr().err
    assert "API key" in said
    assert "WANDB_MODE=offline" in said
    assert list(tmp_path.rglob("result.json")) == []


@pytest.mark.parametrize(
    ("kind", "extra", "switches"),
    [
        ("WandbLogger", "wandb", ["pytorch.loggers.wandb._WANDB_AVAILABLE"]),
        (
            "TensorBoardLogger",
            "tensorboard",
            [f"fabric.loggers.tensorboard._TENSORBOARD{x}_AVAILABLE" for x in ("", "X")],
        ),
    ],
)
def test_a_logger_whose_package_is_missing_is_named_with_its_extra(offline, capfd, kind, extra, switches):
    for switch in switches:
        offline.setattr(f"lightning.{switch}", RequirementCache(f"{extra}>=99"))
    arguments = ["--trainer.logger.save_dir=runs", "--trainer.logger.version=null"]
    assert main([*FIT, f"--trainer.logger=lightning.pytorch.loggers.{kind}", *arguments]) == 2
    assert f"pip install 'pl_prune[{extra}]'" in capfd.readouterr().err


def test_the_page_on_loggers_runs(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (RECIPES.parent / "docs" / "loggers.md").read_text(), re.DOTALL)
    space: dict = {"plp": plp, "Trainer": partial(Trainer, max_epochs=1, accelerator="cpu")}
    exec(code, space)
    assert [type(logger) for logger in space["trainer"].loggers] == [CSVLogger, TensorBoardLogger]
