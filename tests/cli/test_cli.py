from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import fake_data
import pytest
import torch
import yaml
from criteria_list import criteria as pl_prune_criteria
from safetensors.torch import save_file

from pl_prune import MaskSet
from pl_prune.__main__ import main

ROOT = Path(__file__).parents[2]
TABLES = tuple(
    f"recipes/studies/{kind}" for kind in ("hesso", "ippro", "pai", "s2ap", "yopo")
)  # runs/test_study_recipes.py
TRANSFER = ("recipes/transfer", "recipes/transfer/targets")
STRUCTURED = ("recipes/hesso", "recipes/structured")  # run by test_language_recipes.py and test_structured_recipes.py
STAGES = ("recipes/adversarial_pruning", "recipes/adversarial_pruning/stages")  # test_adversarial_pruning_recipes.py
FILES = [
    p
    for p in sorted((ROOT / "recipes").rglob("*.yaml"))
    if p.parent.relative_to(ROOT).as_posix() not in TABLES + TRANSFER + STRUCTURED + STAGES
]
OVERLAYS, SWEEPS, CRITERIA, GRADUAL, SETTINGS, STUDIES = (
    [p for p in FILES if p.parent.name == kind]
    for kind in ("loggers", "sweeps", "pai", "gradual", "settings", "studies")
)
BASELINES = [p for p in FILES if p.parent.name in ("baselines", "yopo")]
ADVERSARIAL = [p for p in FILES if p.parent.name == "adversarial"]  # run by test_adversarial_recipes.py
RECIPES = [
    p for p in FILES if p not in ADVERSARIAL + BASELINES + OVERLAYS + SWEEPS + CRITERIA + GRADUAL + SETTINGS + STUDIES
]
DIGITS = ROOT / "recipes" / "settings" / "convnet_digits.yaml"
QUICKSTART = str(ROOT / "recipes" / "quickstart.yaml")
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pl-prune"])


def run(*argv: str) -> int:
    return main(argv)


def test_every_recipe_is_found():
    assert [p.relative_to(ROOT).as_posix() for p in RECIPES] == ["recipes/quickstart.yaml"]
    assert len(BASELINES) == 11
    assert len(ADVERSARIAL) == 7
    assert [len(kind) for kind in (OVERLAYS, SWEEPS, CRITERIA, GRADUAL, SETTINGS, STUDIES)] == [2, 11, 16, 2, 19, 1]


def test_every_criterion_has_a_recipe():
    criteria = {type(c).__name__ for c in pl_prune_criteria()}
    recipes = [yaml.safe_load(p.read_text())["prune"] for p in CRITERIA + BASELINES]
    assert {r["init_args"]["criterion"].split(".")[-1] for r in recipes if isinstance(r, dict)} == criteria


TINY = [
    "--trainer.limit_train_batches=2",
    "--trainer.limit_val_batches=2",
    "--trainer.max_epochs=1",
    "--trainer.accelerator=cpu",
]


@pytest.mark.filterwarnings(
    "ignore:The variance of predictions", "ignore:.*every score is zero", "ignore:.*expected a signal path"
)
@pytest.mark.parametrize("recipe", CRITERIA + BASELINES, ids=lambda p: p.stem)
def test_a_criterions_recipe_runs(recipe):
    small = ["--prune.criterion.init_args.rounds=3"] if recipe.stem in ("synflow", "iter_snip", "force") else []
    files = [f"--config={recipe}", f"--config={DIGITS}", "--model.network.width=4"]
    assert run("fit", *files, *QUIET, *TINY, *small, "--trainer.logger=false") == 0


@pytest.mark.filterwarnings("ignore:Starting from v1.9.0", "ignore:.*layers empty from sparsity")
@pytest.mark.parametrize("recipe", GRADUAL, ids=lambda p: p.stem)
def test_a_gradual_recipe_ends_at_its_sparsity(recipe):
    schedule = yaml.safe_load(recipe.read_text())["prune"]["init_args"]["schedule"]["init_args"]
    files = [f"--config={recipe}", f"--config={DIGITS}", "--model.network.width=4"]
    assert run("fit", *files, *QUIET, "--trainer.limit_val_batches=1", "--trainer.accelerator=cpu") == 0
    report = json.loads(next(Path().rglob("report.json")).read_text())
    assert report["sparsity"] == pytest.approx(schedule["final"], abs=1e-3)
    masks = torch.load(next(Path().rglob("last.ckpt")))["callbacks"]["GradualPruning"]["masks"]
    assert MaskSet.from_state_dict(masks).sparsity() == report["sparsity"]


SHRUNK = {  # what a network of full size takes too long for
    "TinyImageNet": ["--data.root=data"],
    "ImageNet": ["--data.root=data", "--data.size=64"],
    "CIFAR": ["--data.root=data"],
    "Digits": [],
}
SMALLER = {
    **{f"resnet{n}_tinyimagenet": ["--model.network.depth=20"] for n in (34, 50, 101)},
    **{f"wrn28_10_cifar{n}": ["--model.network.widen=1"] for n in (10, 100)},
}


@pytest.mark.filterwarnings(
    "ignore:Starting from v1.9.0", "ignore:.*expected a signal path", "ignore:.*every score is zero"
)
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda p: p.stem)
def test_a_setting_runs(setting, tmp_path, monkeypatch):
    data = yaml.safe_load(setting.read_text())["data"]
    kind = data["class_path"].rpartition(".")[2]
    if kind == "CIFAR":
        fake_data.cifar(tmp_path / "data", monkeypatch, data["init_args"]["classes"])
    elif kind != "Digits":
        getattr(fake_data, {"TinyImageNet": "tiny_imagenet", "ImageNet": "imagenet"}[kind])(tmp_path / "data")
    files = [f"--config={ROOT / 'recipes' / 'pai' / 'magnitude.yaml'}", f"--config={setting}"]
    small = ["--data.batch_size=4", *SHRUNK[kind], *SMALLER.get(setting.stem, [])]
    small += [] if kind == "Digits" else ["--data.workers=0"]
    assert run("fit", *files, *QUIET, *TINY, *small) == 0
    assert json.loads(next(Path().rglob("report.json")).read_text())["sparsity"] == pytest.approx(0.95, abs=1e-5)


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda p: p.stem)
def test_an_overlay_parses_on_every_recipe(overlay, capsys):
    for recipe in RECIPES:
        with pytest.raises(SystemExit, match="0"):
            run("fit", f"--config={recipe}", f"--config={overlay}", "--print_config")
        assert yaml.safe_load(capsys.readouterr().out)["trainer"]["logger"]["init_args"]["version"] is None


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_print_config_parses_to_itself(recipe, capsys, tmp_path):
    def printed(*configs):
        with pytest.raises(SystemExit, match="0"):
            run("fit", *[f"--config={c}" for c in configs], "--print_config")
        return capsys.readouterr().out

    first = printed(recipe)
    (tmp_path / "resolved.yaml").write_text(first)
    assert yaml.safe_load(printed(tmp_path / "resolved.yaml")) == yaml.safe_load(first)


@pytest.mark.filterwarnings("ignore:Experiment logs directory", "ignore:Checkpoint directory")
def test_a_finished_run_is_not_overwritten_and_runs_are_compared(capfd):
    capsys = capfd
    arguments = ["--config", QUICKSTART, "--trainer.max_epochs=1", *QUIET]
    assert run("fit", *arguments) == 0
    before = {p: p.read_bytes() for p in Path("runs").rglob("*") if p.is_file()}
    assert run("fit", *arguments, "--prune.sparsity=0.5") == 2
    assert "found one in 'runs/quickstart/snip'" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in Path("runs").rglob("*") if p.is_file()} == before
    assert run("fit", *arguments, "--prune=Dense", "--trainer.logger.init_args.version=dense") == 0
    capsys.readouterr()
    assert run("compare", "runs/quickstart/snip", "runs/quickstart/dense") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[2:]] == ["0.9000", "0.0000"]
    saved = yaml.safe_load(Path("runs/quickstart/snip/config.yaml").read_text())
    assert saved["prune"]["init_args"]["sparsity"] == 0.9


@pytest.mark.filterwarnings("ignore:The dirpath has changed", "ignore:Experiment logs directory")
def test_a_checkpoint_resumes_validates_tests_and_predicts():
    arguments = ["--config", QUICKSTART, *QUIET]
    run("fit", *arguments, "--trainer.max_epochs=1", "--trainer.logger.init_args.version=one")
    arguments.append("--trainer.logger.init_args.version=two")
    checkpoint = "runs/quickstart/one/checkpoints/last.ckpt"
    masks = torch.load(checkpoint, weights_only=True)["callbacks"]["PruneAtInit"]["masks"]["bits"]
    for command in ("validate", "test", "predict"):
        assert run(command, *arguments, f"--ckpt_path={checkpoint}") == 0
    run("fit", *arguments, "--trainer.max_epochs=2", f"--ckpt_path={checkpoint}")
    resumed = torch.load("runs/quickstart/two/checkpoints/last.ckpt", weights_only=True)
    assert resumed["epoch"] == 1
    for name, bits in resumed["callbacks"]["PruneAtInit"]["masks"]["bits"].items():
        assert torch.equal(bits, masks[name])


DENSE = ["--prune=Dense", "--trainer.max_epochs=1", "--trainer.logger.init_args.version=dense"]
CHECKPOINT = "runs/quickstart/dense/checkpoints/last.ckpt"


@pytest.mark.filterwarnings("ignore:Experiment logs directory", "ignore:Checkpoint directory")
def test_pruning_after_training_starts_from_weights_alone():
    run("fit", "--config", QUICKSTART, *QUIET, *DENSE)
    trained = torch.load(CHECKPOINT, weights_only=True)["state_dict"]
    bare = {name.removeprefix("network."): t for name, t in trained.items() if name.startswith("network.")}
    torch.save(bare, "bare.pt")
    save_file(bare, "bare.safetensors")
    for number, weights in enumerate((CHECKPOINT, "bare.pt", "bare.safetensors")):
        still = ["--optimizer.lr=0", "--trainer.max_epochs=1", "--prune.criterion=Magnitude", f"--weights={weights}"]
        assert (
            run("fit", "--config", QUICKSTART, *QUIET, *still, f"--trainer.logger.init_args.version=run{number}") == 0
        )
        after = torch.load(f"runs/quickstart/run{number}/checkpoints/last.ckpt", weights_only=True)
        assert after["epoch"] == 0
        assert after["global_step"] == 20
        masks = MaskSet.from_state_dict(after["callbacks"]["PruneAtInit"]["masks"])
        assert sum(kept for kept, _ in masks.counts().values()) == 9245
        cut = torch.cat([trained[name][~mask].abs() for name, mask in masks.items()]).max()
        for name, mask in masks.items():
            assert torch.equal(after["state_dict"][name], trained[name] * mask)
            assert not mask.any() or trained[name][mask].abs().min() >= cut


@pytest.mark.filterwarnings("ignore:Experiment logs directory", "ignore:Checkpoint directory")
def test_weights_that_do_not_fit_are_refused(capfd):
    run("fit", "--config", QUICKSTART, *QUIET, *DENSE)
    Path("text.ckpt").write_text("not a checkpoint")
    torch.save({"state_dict": {"head.weight": torch.ones(2)}}, "other.ckpt")
    torch.save([1], "list.ckpt")
    wider = "--model.network.init_args.num_classes=12"
    for arguments, said in [
        (["--weights=nowhere.ckpt"], "found none at 'nowhere.ckpt'"),
        (["--weights=text.ckpt"], "to be a checkpoint of tensors"),
        (["--weights=list.ckpt"], "to hold a state_dict"),
        (["--weights=other.ckpt"], "head.weight (in the file alone)"),
        ([f"--weights={CHECKPOINT}", wider], "network.head.weight is (10, 128), not (12, 128)"),
        ([f"--weights={CHECKPOINT}", f"--ckpt_path={CHECKPOINT}"], "found both"),
    ]:
        assert run("fit", "--config", QUICKSTART, *QUIET, *arguments) == 2
        assert said in capfd.readouterr().err


@pytest.mark.filterwarnings("ignore:Experiment logs directory", "ignore:Checkpoint directory")
def test_weights_of_a_pruned_run_warn_that_its_masks_stay_behind():
    run("fit", "--config", QUICKSTART, *QUIET, "--trainer.max_epochs=1")
    pruned = "--weights=runs/quickstart/snip/checkpoints/last.ckpt"
    with pytest.warns(UserWarning, match=r"pruned by PruneAtInit; its weights are loaded, its masks are not"):
        run("validate", "--config", QUICKSTART, *QUIET, pruned)


def test_inspect_prints_the_report_and_trains_nothing(capsys):
    assert run("inspect", "--config", QUICKSTART, *QUIET, "--prune.sparsity=0.95", "--prune.criterion=GradNorm") == 0
    out = capsys.readouterr().out
    assert "GradNorm() at sparsity 0.95" in out
    assert "4,622 of 92,448 kept" in out
    assert "path input to output" in out
    assert list(Path().iterdir()) == []


def test_inspect_shows_what_would_be_sliced_off(capsys):
    words = ["--prune=StructuredPruning", "--prune.criterion=ByGroup", "--prune.sparsity=0.5"]
    assert run("inspect", "--config", QUICKSTART, *QUIET, *words) == 0
    out = capsys.readouterr().out
    assert "112 of 224 kept, the others sliced off" in out
    assert "network.features.0" in out.split("units kept")[1]
    assert "masked weights alone" not in out
    assert list(Path().iterdir()) == []


def test_overrides_reach_nested_settings():
    run(
        "fit", "--config", QUICKSTART, *QUIET, "--trainer.max_epochs=1", "--prune.allocation=ERK",
        "--prune.allocation.min_keep_rows=1", "--prune.select.exclude=[network.features.0]", "--prune.samples.per_class=2",
        "--prune.on_layer_collapse=raise",
    )  # fmt: skip
    report = json.loads(Path("runs/quickstart/snip/report.json").read_text())
    assert report["method"] == "SNIP() at sparsity 0.9, ERK(min_keep_rows=1)"
    assert [layer["name"] for layer in report["layers"]] == ["network.features.3.weight", "network.features.6.weight"]
    assert all(layer["empty_rows"] == 0 for layer in report["layers"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["frob"], "expected a command, found 'frob'"),
        (["fit", "--config", QUICKSTART, "--prune.sparsity=1.5"], "sparsity in [0, 1)"),
        (["fit", "--config", QUICKSTART, "--prune.spersity=0.5"], "spersity"),
        (["fit", "--config", QUICKSTART, "--prune.criterion=Snap"], "Snap"),
        (["fit", "--config", QUICKSTART, "--prune.select.include=[network.fetures.0]"], "network.features.0"),
        (["inspect", "--config", QUICKSTART, "--prune=GradualPruning"], "prunes at the start of the fit"),
        (["inspect", "--config", QUICKSTART, "--prune=Dense"], "prunes at the start of the fit"),
        (["compare", "nowhere"], "nowhere/report.json"),
        (["compare"], "at least one run folder"),
    ],
    ids=lambda v: v[-1] if isinstance(v, list) else "",
)
def test_bad_input_ends_in_a_message_and_status_two(arguments, said, capfd):
    try:
        status = run(*arguments, *(QUIET if arguments[0] in ("fit", "inspect") else []))
    except SystemExit as exit_:
        status = exit_.code
    assert status == 2
    assert said in capfd.readouterr().err


def test_null_switches_pruning_off():
    assert run("fit", "--config", QUICKSTART, *QUIET, "--prune=null", "--trainer.max_epochs=1") == 0
    assert json.loads(Path("runs/quickstart/snip/report.json").read_text())["method"] == "dense"


def test_help_answers_without_torch():
    code = "import sys, pl_prune.__main__ as m; m.main(['--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "inspect" in done.stdout
