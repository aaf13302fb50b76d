from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import pl_prune as plp
from pl_prune.__main__ import main

SETTINGS = Path(__file__).parents[2] / "recipes" / "settings" / "convnet_digits.yaml"
SHORT = "trainer: {accelerator: cpu, max_epochs: 1, limit_train_batches: 3, limit_val_batches: 1, num_sanity_val_steps: 0, callbacks: []}"
WIDER = """
model: {init_args: {num_classes: 12, network: {init_args: {num_classes: 12}}}}
data: {class_path: pl_prune.data.Digits, init_args: {seed: 1}}
"""


@pytest.fixture
def words(tmp_path):
    (tmp_path / "short.yaml").write_text(SHORT)
    (tmp_path / "wider.yaml").write_text(WIDER)
    files = ["--config", str(SETTINGS), "--config", str(tmp_path / "short.yaml")]
    targets = ["--targets", str(tmp_path / "wider.yaml"), "--criteria", "Magnitude", "--sparsity", "0.9"]
    return ["transfer", *files, *targets, "--folder", str(tmp_path / "out")]


@pytest.mark.filterwarnings("ignore")
def test_an_interrupted_transfer_goes_on_and_gives_indices_for_source_and_target(words, tmp_path, capsys, monkeypatch):
    from pl_prune.commands.study_run import StudyRun

    train, done = StudyRun.train, []

    def breaks_off(spec, run):
        if len(done) == 5:
            raise KeyboardInterrupt
        train(spec, run)
        done.append(spec.key)

    monkeypatch.setattr(StudyRun, "train", breaks_off)
    assert main([*words, "--seeds", "0", "1"]) == 130
    assert len(done) == 5
    capsys.readouterr()
    done.clear()
    monkeypatch.setattr(StudyRun, "train", lambda spec, run: (train(spec, run), done.append(spec.key)))
    assert main([*words, "--seeds", "0", "1", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [(c["dataset"], c["seeds"]) for c in told["cells"]] == [("source", [0, 1]), ("wider", [0, 1])]
    assert all(cell["same_masks"] and cell["dti"] == [0.0, 0.0] for cell in told["cells"])
    assert len(done) == 2 * 2 * 3 - 5  # the same mask is trained once, and nothing finished again
    assert json.loads((tmp_path / "out" / "transfer.json").read_text()) == told
    assert main(["report", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.index("Transfer of masks") < page.index("<h2>Metric</h2>")
    done.clear()
    assert main([*words, "--seeds", "0", "1"]) == 0
    assert done == []
    assert "DTI" in capsys.readouterr().out
    assert main([*words, "--seeds", "0", "1", "--allocation", "Layerwise"]) == 2
    assert "found --allocation Layerwise" in capsys.readouterr().err  # whose masks would have been the old ones


@pytest.mark.filterwarnings("ignore")
def test_every_file_is_of_its_own_data_sparsity_and_allocation(words, tmp_path, monkeypatch):
    """Heads of all arms come from their weights' seed; rounds are run under the study's allocation, at each sparsity."""
    from pl_prune.commands.study_run import StudyRun

    started = {}
    monkeypatch.setattr(StudyRun, "train", lambda spec, run: started.setdefault(spec.key, spec))
    words = [word if word != "Magnitude" else "IterSNIP" for word in words]
    (tmp_path / "rounds.yaml").write_text(
        "prune: {class_path: pl_prune.PruneAtInit, init_args: {criterion: {class_path: pl_prune.IterSNIP, init_args: {rounds: 2}}}}"
    )
    words += ["--config", str(tmp_path / "rounds.yaml"), "--sparsity", "0.5", "0.9", "--seeds", "0", "1"]
    main([*words, "--allocation", "ERK"])
    out = tmp_path / "out"
    heads = {
        (data, seed): load_file(out / "weights" / f"{data}_seed={seed}.safetensors")
        for data in ("source", "wider")
        for seed in (0, 1)
    }
    for seed in (0, 1):
        source, wider = heads["source", seed], heads["wider", seed]
        differ = [name for name in source if not torch.equal(source[name], wider[name])]
        assert differ == ["network.head.bias", "network.head.weight"]
    assert not torch.equal(heads["wider", 0]["network.head.weight"], heads["wider", 1]["network.head.weight"])
    again, cross = (started[f"IterSNIP_wider_0.9_seed=0_{arm}"].values["weights"] for arm in ("again", "cross"))
    assert (Path(again).name, Path(cross).name) == ("wider_seed=0.safetensors", "wider_seed=1.safetensors")
    for data in ("source", "wider"):
        for sparsity in (0.5, 0.9):
            header = plp.read_header(out / "masks" / f"IterSNIP_{data}_{sparsity}_seed=1.safetensors")
            assert header["meta"]["sparsity"] == sparsity
            assert header["meta"]["rounds"] == 2
            masks = plp.load_masks(out / "masks" / f"IterSNIP_{data}_{sparsity}_seed=1.safetensors")
            fit = plp.RunFolder(fitted(tmp_path, words, data, sparsity)).masks()
            assert masks == fit


def fitted(tmp_path, words, data, sparsity):
    """Return the folder of a fit under ERK, from the same weights, that scores by itself."""
    configs = [words[i + 1] for i, word in enumerate(words) if word == "--config"]
    configs += [str(tmp_path / "wider.yaml")] if data == "wider" else []
    argv = [word for file in configs for word in ("--config", file)]
    argv += [f"--weights={tmp_path / 'out' / 'weights' / f'{data}_seed=1.safetensors'}", "--seed_everything=1"]
    argv += ["--prune.allocation=ERK", f"--prune.sparsity={sparsity}", "--trainer.enable_progress_bar=false"]
    argv += ["--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={tmp_path}", "--trainer.logger.name=fits"]
    argv += [f"--trainer.logger.version={data}-{sparsity}"]
    assert main(["fit", *argv]) == 0
    return tmp_path / "fits" / f"{data}-{sparsity}"


def test_machines_that_start_together_prepare_one_after_the_other(words, tmp_path, monkeypatch):
    from pl_prune.commands import transfer
    from pl_prune.runs.lock import is_locked

    held = []

    def prepare(*args):
        held.append(is_locked(tmp_path / "out" / "preparing"))
        raise KeyboardInterrupt

    monkeypatch.setattr(transfer, "_prepare", prepare)
    assert main([*words, "--seeds", "0", "1"]) == 130
    assert held == [True]
    assert not is_locked(tmp_path / "out" / "preparing")


@pytest.mark.parametrize("name", ["wider", "source"])
def test_two_data_sets_of_one_name_are_refused(words, tmp_path, capsys, name):
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / f"{name}.yaml").write_text(WIDER)
    words.insert(words.index("--targets") + 1, str(tmp_path / "more" / f"{name}.yaml"))
    assert main([*words, "--seeds", "0", "1"]) == 2
    assert f"found {name} more than once" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_one_seed_is_refused_before_anything_is_made(words, tmp_path, capsys):
    assert main([*words, "--seeds", "0"]) == 2
    assert "two or more" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
