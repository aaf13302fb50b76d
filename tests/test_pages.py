"""Every callback has its page, and what the pages show in Python and YAML works."""

from __future__ import annotations

import json
import re
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from criteria_list import concrete
from fake_module import TinyModule, tiny_data, tiny_loader
from fragments import PAGES, ROOT, fragments, run
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import nn

import pl_prune as plp
from pl_prune.__main__ import main
from pl_prune.cli import PruneCLI
from pl_prune.runs.plan import Plan

CALLBACKS = sorted(cls.__name__ for cls in concrete(Callback))
TITLES = {page: text.partition("\n")[0] for page, text in PAGES.items()}
YAML = [(page, yaml.safe_load(text)) for page in PAGES for text in fragments(page, "yaml")]
OF_TRAINER = {"prune", "adversarial", "trainer"}
CONFIGS = [(page, part) for page, part in YAML if OF_TRAINER & set(part)]
SWEEPS = [(page, text) for page in PAGES for text in fragments(page, "yaml") if "\nparameters:" in f"\n{text}"]
STUDY = [part for page, part in YAML if page == "studies"]
QUICKSTART = f"--config={ROOT / 'recipes' / 'quickstart.yaml'}"


class Data(LightningDataModule):
    def train_dataloader(self):
        return tiny_loader()

    def val_dataloader(self):
        return tiny_loader(16)


class Parsed(PruneCLI):
    """Parse, and build nothing."""

    def instantiate_classes(self):
        self.config_init = None

    def _run_subcommand(self, subcommand):
        pass


@pytest.fixture(scope="module")
def parse():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pl-prune"])
        known = {"subclass_mode_model": True, "subclass_mode_data": True}
        cli = Parsed(LightningModule, LightningDataModule, args=["fit", QUICKSTART], **known)
        yield lambda *words: cli.parser.parse_args(["fit", *words]).fit.as_dict()


@pytest.fixture
def space(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    module = TinyModule()
    quiet = {
        "max_epochs": 2,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
    }
    return {
        **{"plp": plp, "torch": torch, "Trainer": partial(Trainer, logger=False, accelerator="cpu", **quiet)},
        **{"module": module, "model": module.net, "data": Data(), "batches": [tiny_data()[:16]]},
        "loss_fn": lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]),
    }


@pytest.mark.parametrize("name", CALLBACKS)
def test_every_callback_has_a_page_with_what_a_page_says(name):
    (page,) = (page for page, title in TITLES.items() if re.search(rf"\b{name}\b", title))
    names = [other for other in CALLBACKS if re.search(rf"\b{other}\b", TITLES[page])]
    assert any(f"plp.{one}(" in part for one in names for part in fragments(page, "python"))
    assert any(f"pl_prune.{one}" in part for one in names for part in fragments(page, "yaml"))
    swept = re.findall(r"recipes/sweeps/\w+\.yaml", PAGES[page])
    assert swept
    assert all((ROOT / file).is_file() for file in swept)
    for heading in ("## What it does to your checkpoint\n", "## Composes with\n"):
        assert heading in PAGES[page]


@pytest.mark.parametrize(("page", "part"), CONFIGS, ids=[page for page, _ in CONFIGS])
def test_yaml_is_what_the_command_line_takes(page, part, parse, tmp_path):
    (tmp_path / "part.yaml").write_text(yaml.safe_dump(part))
    config = parse(QUICKSTART, f"--config={tmp_path / 'part.yaml'}")
    for key in {"prune", "adversarial"} & set(part):
        assert config[key]["class_path"] == part[key]["class_path"]
        for name, value in part[key].get("init_args", {}).items():
            if isinstance(value, (int, float)):
                assert config[key]["init_args"][name] == value
    kinds = [callback["class_path"] for callback in part.get("trainer", {}).get("callbacks", [])]
    assert [c["class_path"].rpartition(".")[2] for c in config["trainer"]["callbacks"]][-len(kinds) :] == [
        kind.rpartition(".")[2] for kind in kinds
    ] or not kinds


@pytest.mark.parametrize(("page", "text"), SWEEPS, ids=[page for page, _ in SWEEPS])
def test_first_and_last_values_of_a_sweep_reach_the_run(page, text, parse, tmp_path):
    (file,) = re.findall(r"recipes/sweeps/\w+\.yaml", text)
    command = yaml.safe_load((ROOT / file).read_text())["command"]
    command = [
        str(ROOT / word) if word.startswith("recipes/") else word for word in command[command.index("fit") + 1 :]
    ]
    args, swept = tmp_path / "args.json", yaml.safe_load(text)["parameters"]
    for which in (0, -1):
        values = {name: parameter["values"][which] for name, parameter in swept.items()}
        args.write_text(json.dumps(values))
        given = {"${args_json_file}": [str(args)], "${args}": [f"--{name}={value}" for name, value in values.items()]}
        config = parse(*(word for part in command for word in given.get(part, [part])))
        for name, value in values.items():
            if name == "trainer.callbacks+":
                last = config["trainer"]["callbacks"][-len(value) :]
                assert [one["class_path"] for one in last] == [one["class_path"] for one in value]
                continue
            found = config
            for key in name.split("."):
                found = found[-1] if isinstance(found, list) else found
                found = found.get(key, found.get("init_args", {}).get(key))
            found = found["class_path"].rpartition(".")[2] if isinstance(found, dict) else found
            assert found == (value.rpartition(".")[2] if isinstance(value, str) else value), name


def test_fragments_of_a_study_are_studies(monkeypatch, tmp_path):
    whole, *changes = STUDY
    assert len(changes) >= 3
    monkeypatch.chdir(ROOT)
    for change in ({}, *changes):
        taken = {key: value for key, value in whole.items() if key != "grid" or "search" not in change}
        (tmp_path / "study.yaml").write_text(yaml.safe_dump({**taken, **change}))
        plan = Plan.load(tmp_path / "study.yaml")
        assert set(plan.rows) == set(change.get("rows", whole["rows"]))


def test_every_yaml_fragment_is_of_a_kind_that_is_tested():
    others = [page for page, part in YAML if not OF_TRAINER & set(part) and "parameters" not in part]
    assert set(others) == {"adversarial_pruning", "studies"}
    assert others.count("adversarial_pruning") == 1  # the stage file: cli/test_adversarial_pruning_recipes.py


@pytest.mark.filterwarnings("ignore:Starting from v1.9.0")
def test_the_first_page(space):
    found = run("index", space)
    assert found["masks"].sparsity() == pytest.approx(0.9, abs=1e-3)
    report = json.loads((plp.RunFolder("runs/mine").path / "report.json").read_text())
    assert report["sparsity"] == pytest.approx(0.9, abs=1e-3)


@pytest.mark.parametrize("page", ["batch_norm_warmup", "dense", "sparsity_report", "run_record"])
@pytest.mark.filterwarnings("ignore:`trainer.fit` is called")
def test_a_callback_in_ten_lines(page, space):
    trainer = run(page, space)["trainer"]
    if not trainer.state.finished:
        trainer.fit(space["module"], space["data"])
    assert trainer.global_step == 8
    named = {type(callback).__name__ for callback in trainer.callbacks}
    assert any(name in TITLES[page] for name in named)


def test_prune_at_init(space):
    found = run("prune_at_init", space)
    scores = [found[name] for name in ("snip", "fp", "hd", "hp")]
    alone = plp.score(space["model"], plp.FisherPruning(), space["batches"], space["loss_fn"])
    assert all(list(one) == list(alone) for one in scores)
    for name, score in alone.items():
        torch.testing.assert_close(found["fp"][name], score)
    found["trainer"].fit(space["module"], space["data"])
    assert found["trainer"].callbacks[0].masks.sparsity() == pytest.approx(0.9, abs=1e-3)


def test_gradual_pruning(space):
    trainer = run("gradual_pruning", space)["trainer"]
    (callback,) = (cb for cb in trainer.callbacks if isinstance(cb, plp.GradualPruning))
    assert callback.schedule == plp.Cubic(final=0.9, start=100, end=2000, every=100)
    with pytest.raises(plp.PruneError, match="2000"):  # a fit that is too short is refused
        trainer.fit(space["module"], space["data"])


def test_robustness_evaluation(space):
    x, y = torch.rand(4, 1, 8, 8), torch.arange(4)
    network = space["model"].eval()
    other = plp.robust_accuracy(network, x, y, eps=8 / 255, preset="fast", seed=0)
    found = run("robustness_evaluation", {**space, "model": network, "x": x, "y": y, "other": other})
    assert found["result"].robust == other.robust  # the same network, image by image
    assert found["trainer"].callbacks[0].folder == "runs/robustness"


def test_prediction_panels(space):
    assert run("prediction_panels", space)["trainer"].callbacks[0].samples == 3


@pytest.mark.filterwarnings("ignore:.*hyperparameters")
def test_loggers(space):
    pytest.importorskip("tensorboard")
    run("loggers", space)["trainer"].fit(space["module"], space["data"])
    (layers,) = Path("runs/mine").rglob("layers.csv")
    assert len(layers.read_text().splitlines()) == 4  # a head and three prunable layers
    assert list(Path("runs/board").rglob("events.*"))


def test_a_dense_twin_does_not_lose_masks(space, tmp_path):
    pruned = space["Trainer"](max_epochs=1, callbacks=[plp.PruneAtInit(plp.Magnitude())])
    pruned.fit(space["module"], space["data"])
    path = tmp_path / "pruned.ckpt"
    pruned.save_checkpoint(path)
    with pytest.raises(plp.PruneError, match="masks of"):
        run("dense", space)["trainer"].fit(TinyModule(), space["data"], ckpt_path=path)


def test_warm_up_leaves_a_resumed_fit_alone_and_warns_without_norms(space, tmp_path):
    first = space["Trainer"](max_epochs=1)
    first.fit(space["module"], space["data"])
    path = tmp_path / "first.ckpt"
    first.save_checkpoint(path)
    again = TinyModule()
    space["Trainer"](max_epochs=1, callbacks=[plp.BatchNormWarmup()]).fit(again, space["data"], ckpt_path=path)
    assert torch.equal(again.net[1].running_mean, space["module"].net[1].running_mean)
    plain = TinyModule()
    plain.net[1] = nn.Identity()
    with pytest.warns(UserWarning, match="batch norms"):
        space["Trainer"](max_epochs=1, callbacks=[plp.BatchNormWarmup()]).fit(plain, space["data"])


def test_choosing_shows_the_table_of_the_classes(capsys):
    assert main(["criteria"]) == 0
    assert capsys.readouterr().out in PAGES["choosing"]


@pytest.mark.parametrize("base", [plp.Criterion, plp.GroupCriterion, plp.Allocation], ids=lambda base: base.__name__)
def test_choosing_names_every_choice(base):
    kinds = concrete(base)
    assert len(kinds) > 3
    for kind in kinds:
        assert f"`{kind.__name__}`" in PAGES["choosing"], kind.__name__


def test_the_table_of_group_criteria_is_that_of_the_classes():
    rows = dict(re.findall(r"^\| `(\w+)` \| (the loss|nothing) \| \w+ \|$", PAGES["choosing"], re.MULTILINE))
    for kind in set(concrete(plp.GroupCriterion)) - {plp.ByGroup}:
        assert rows[kind.__name__] == ("the loss" if kind.needs_loss else "nothing")


@pytest.mark.parametrize("page", PAGES)
def test_every_test_and_file_that_a_page_names_exists(page):
    named = re.findall(r"\b(?:tests|recipes|benchmarks)/[\w/.]+\b(?!\*)", PAGES[page])
    assert [name for name in named if not list(ROOT.glob(f"{name}*"))] == []


def test_every_entry_of_the_errata_names_what_shows_it():
    defined = {name for p in (ROOT / "tests").rglob("*.py") for name in re.findall(r"def (test_\w+)", p.read_text())}
    tables = re.findall(r"^\|[^\n]*\| See \|\n\|[-|]+\|\n((?:\|.*\n)+)", PAGES["papers_and_code"], re.MULTILINE)
    rows = [row for table in tables for row in table.splitlines()]
    assert len(rows) > 12
    for row in rows:
        shown = re.findall(r"`(test_\w+|(?:tests|recipes|benchmarks)/[\w/.]+)`", row.rpartition(" | ")[2])
        assert shown, row
        assert all(name in defined or (ROOT / name).exists() for name in shown), row
