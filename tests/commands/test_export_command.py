"""From a run's checkpoint to a file, and what it says of masks."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import pl_prune as plp
from pl_prune.__main__ import main
from pl_prune.data import Digits
from pl_prune.models import ConvNet, ImageClassifier

RECIPE = str(Path(__file__).parents[2] / "recipes" / "quickstart.yaml")
SMALL = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1"]
SMALL += ["--model.network.width=4", "--trainer.log_every_n_steps=1"]
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
STRUCTURED = ["--prune=StructuredPruning", "--prune.criterion=ByGroup", "--prune.criterion.criterion=Magnitude"]
STRUCTURED += ["--prune.allocation=Layerwise", "--prune.sparsity=0.5"]
QUICK = ["--batch=6", "--repeats=2"]
RUNS = {"cut": STRUCTURED, "masked": [*STRUCTURED, "--prune.shrink=false"], "snip": ["--prune.sparsity=0.2"]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three short runs by the command line: their last checkpoints."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["pl-prune"])
        for name, prune in RUNS.items():
            logger = [f"--trainer.logger.version={name}"]
            assert main(["fit", "--config", RECIPE, *SMALL, *QUIET, *prune, *logger]) == 0
    return {name: folder / "runs" / "quickstart" / name / "checkpoints" / "last.ckpt" for name in RUNS}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pl-prune"])


def told(capsys, *argv: str) -> dict:
    capsys.readouterr()
    assert main(["export", *argv, *QUICK, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    found["rows"] = {row["network"]: row for row in found["networks"]}
    return found


def module() -> ImageClassifier:
    return ImageClassifier(ConvNet(width=4)).eval()


def images(count: int = 6) -> torch.Tensor:
    data = Digits()
    data.setup("fit")
    loader = data.scoring_dataloader()
    return torch.stack([loader.dataset[i][0] for i in plp.Samples(total=count).indices(loader.dataset)])


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return torch.load(checkpoint, weights_only=True)["state_dict"]


def test_masks_that_remove_units_are_sliced_off(runs, capsys):
    found = told(capsys, "--ckpt", str(runs["masked"]), "--format=torch", "--out", "small")
    assert list(found["rows"]) == ["dense", "masked", "shrunk"]
    dense, masked, shrunk = found["rows"].values()
    whole = module()
    whole.load_state_dict(weights(runs["masked"]))
    small = plp.load_shrunk(module(), found["file"])
    x = images()
    with torch.no_grad():
        expected, outputs = whole(x), small(x)
    torch.testing.assert_close(outputs, expected)
    assert shrunk["max_abs"] == pytest.approx(float((outputs - expected).abs().max()), abs=1e-6)
    assert (masked["max_abs"], dense["max_abs"]) == (0, None)
    for row, network in ((dense, whole), (masked, whole), (shrunk, small)):
        assert row["params"] == sum(p.numel() for p in network.parameters())
        assert row["macs"] == plp.trace_groups(network, x[:2]).cost({})[1]
        assert len(row["latency"]) == 3
    assert masked["nonzero"] == sum(int((p != 0).sum()) for p in whole.parameters()) < dense["nonzero"]
    assert shrunk["bytes"] == Path(found["file"]).stat().st_size < masked["bytes"] == dense["bytes"]
    assert found["verdict"].startswith("Masks alone do not speed up")
    assert "Sliced, it takes" in found["verdict"]
    assert found["inputs"] == {"samples": 6, "source": "Digits.scoring_dataloader()"}
    assert found["latency"]["batch"] == 6
    assert found["latency"]["threads"] == torch.get_num_threads()

    again = told(capsys, "--config", RECIPE, *SMALL[3:4], "--ckpt", found["file"], "--format=torch", "--out", "again")
    assert list(again["rows"]) == ["dense", "shrunk"]
    assert load_file(again["file"]).keys() == load_file(found["file"]).keys()
    assert main(["export", "--config", RECIPE, *SMALL[3:4], "--ckpt", found["file"], "--format=torch"]) == 2
    assert "another file than the checkpoint" in capsys.readouterr().err


def test_a_run_of_the_sliced_network_is_exported_as_it_is(runs, capsys):
    found = told(capsys, "--ckpt", str(runs["cut"]), "--format=torch")
    assert list(found["rows"]) == ["dense", "shrunk"]
    assert Path(found["file"]) == runs["cut"].with_suffix(".safetensors")
    small, saved = plp.load_shrunk(module(), found["file"]), weights(runs["cut"])
    assert small.state_dict().keys() == saved.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in small.state_dict().items())
    assert found["rows"]["shrunk"]["params"] == sum(p.numel() for p in small.parameters())
    assert found["rows"]["shrunk"]["params"] < found["rows"]["dense"]["params"]
    assert found["rows"]["shrunk"]["macs"] == plp.trace_groups(small, images(2)).cost({})[1]
    assert found["verdict"].startswith("Sliced")


def test_scattered_zeros_stay_and_save_no_time(runs, capsys):
    argv = ["export", "--ckpt", str(runs["snip"]), "--out", "snip", *QUICK]
    assert main(argv) == 0
    text = capsys.readouterr().out
    assert "Masks alone do not speed up: the masked network takes" in text
    assert "No unit could be sliced off" in text
    assert "not zero" in text
    whole = module()
    whole.load_state_dict(weights(runs["snip"]))
    x = images()
    with torch.no_grad():
        torch.testing.assert_close(torch.export.load("snip.pt2").module()(x), whole(x))


def test_a_dense_network_is_written_as_it_is(capsys):
    torch.manual_seed(0)
    network = module()
    torch.save(network.network.state_dict(), "weights.pt")  # of the submodule alone
    found = told(capsys, "--config", RECIPE, "--model.network.width=4", "--ckpt=weights.pt", "--format=torch")
    assert list(found["rows"]) == ["dense"]
    assert found["verdict"].startswith("Nothing of this checkpoint is pruned")
    assert (found["file"], found["rows"]["dense"]["max_abs"]) == ("weights.safetensors", 0)
    again = module()
    again.load_state_dict(load_file(found["file"]))
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), network.parameters(), strict=True))


def test_what_is_refused(runs, capsys):
    torch.save({"a": torch.ones(2)}, "odd.ckpt")
    wider = ["--config", RECIPE, "--model.network.width=2"]
    for argv, said in (
        (["--ckpt=nowhere.ckpt"], "found none at 'nowhere.ckpt'"),
        (["--ckpt=odd.ckpt"], "config.yaml"),
        (["--ckpt=odd.ckpt", "--config", RECIPE], "of other names or shapes"),
        (["--ckpt", str(runs["cut"]), *wider], "its cuts do not fit"),
        (["--ckpt", str(runs["masked"]), "--batch=0"], "--batch to be a whole number"),
        (["--ckpt", str(runs["masked"]), "--device=toaster"], "found 'toaster'"),
    ):
        assert main(["export", *argv, "--out", "out", *(QUICK if "--batch=0" not in argv else [])]) == 2
        assert said in capsys.readouterr().err
    assert [file.name for file in Path().iterdir()] == ["odd.ckpt"]
    with pytest.raises(SystemExit, match="2"):
        main(["export", "--ckpt=odd.ckpt", "--format=tensorrt"])
