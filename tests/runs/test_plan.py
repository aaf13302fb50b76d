from __future__ import annotations

import pytest
import yaml
from refusal import expect_refusal

from pl_prune.runs.plan import Plan
from pl_prune.runs.sweep import as_sweep

STUDY = {
    "name": "example",
    "config": "common.yaml",
    "set": {"trainer.max_epochs": 2},
    "rows": {
        "dense": {"set": {"prune": "Dense"}, "grid": False},
        "SNIP": {"config": "snip.yaml"},
        "ERK": {"config": ["snip.yaml"], "set": {"prune.criterion": "Random", "prune.allocation": "ERK"}},
    },
    "grid": {"prune.sparsity": [0.8, 0.9], "optimizer.lr": [0.1]},
    "seeds": [0, 7],
}
SNIP = {"prune": {"class_path": "pl_prune.PruneAtInit", "init_args": {"criterion": "pl_prune.SNIP", "sparsity": 0.5}}}


@pytest.fixture
def study(tmp_path):
    (tmp_path / "snip.yaml").write_text(yaml.safe_dump(SNIP))
    (tmp_path / "common.yaml").write_text("seed_everything: 1")

    def write(**changes):
        content = {key: value for key, value in {**STUDY, **changes}.items() if value is not ...}
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        return tmp_path / "study.yaml"

    return write


def test_every_row_at_every_point_with_every_seed(study, tmp_path):
    specs = Plan.load(study()).specs()
    assert [s.key for s in specs[:5]] == [
        "dense_seed=0",
        "SNIP_sparsity=0.8_lr=0.1_seed=0",
        "SNIP_sparsity=0.9_lr=0.1_seed=0",
        "ERK_sparsity=0.8_lr=0.1_seed=0",
        "ERK_sparsity=0.9_lr=0.1_seed=0",
    ]
    assert len(specs) == 10
    last = specs[-1]
    assert last.config == (str(tmp_path / "common.yaml"), str(tmp_path / "snip.yaml"))
    assert last.values == {
        "trainer.max_epochs": 2,
        "prune.criterion": "Random",
        "prune.allocation": "ERK",
        "prune.sparsity": 0.9,
        "optimizer.lr": 0.1,
        "seed_everything": 7,
    }
    assert last.settings == {"prune.sparsity": 0.9, "optimizer.lr": 0.1}
    assert specs[0].values == {"trainer.max_epochs": 2, "prune": "Dense", "seed_everything": 0}


def test_the_sweep_is_the_same_grid(study, tmp_path):
    plan = Plan.load(study())
    sweep = as_sweep(plan)
    prunes = sweep["parameters"].pop("prune")["values"]
    assert sweep["parameters"] == {"optimizer.lr": {"values": [0.1]}, "seed_everything": {"values": [0, 7]}}
    assert prunes[0] == {"class_path": "Dense"}
    assert prunes[2] == {
        "class_path": "pl_prune.PruneAtInit",
        "init_args": {"criterion": "pl_prune.SNIP", "sparsity": 0.9},
    }
    assert prunes[3]["init_args"] == {"criterion": "Random", "allocation": "ERK", "sparsity": 0.8}
    assert len(prunes) == 5
    assert sweep["command"][2:6] == ["fit", "--config", str(tmp_path / "common.yaml"), "--trainer.max_epochs=2"]


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"set": {"prune.sparsity": 0.9}}, ("'prune.sparsity' in `set`",)),
        ({"grid": {"optimizer.lr": [0.1, 0.2]}}, ("rows that all take optimizer.lr", "'dense'")),
    ],
)
def test_a_sweep_that_would_not_be_the_study_is_refused(study, changes, parts):
    plan = Plan.load(study(**changes))
    with expect_refusal(*parts):
        as_sweep(plan)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"sparsities": [0.5]}, ("'sparsities'", "grid", "spelling")),
        ({"rows": {"a": {"recipe": "snip.yaml"}}}, ("row 'a'", "'recipe'")),
        ({"rows": {}}, ("rows", "at least one")),
        ({"rows": {"a": {"config": "snap.yaml"}}}, ("'snap.yaml'", "row 'a'")),
        ({"grid": {"prune.sparsity": 0.9}}, ("grid.prune.sparsity", "0.9", "brackets")),
        ({"seeds": [0.5]}, ("seeds", "[0.5]")),
        ({"seeds": [1, 1]}, ("different seeds", "1 twice")),
        ({"seeds": [True]}, ("seeds", "[True]")),
        ({"metric": ["a"]}, ("metric", "['a']")),
        ({"grid": {"prune.sparsity": []}}, ("grid.prune.sparsity", "leave the key out")),
        ({"rows": {"a": {"grid": {"prune.sparsity": [0.1]}}}}, ("grid of row 'a'", "true or false")),
        ({"rows": {"a": {"weights_of": ["b"]}}}, ("weights_of of row 'a'", "['b']")),
        ({"rows": {"a b": {}, "a!b": {}}}, ("a name of its own", "a-b")),
        ({"direction": "up"}, ("'up'",)),
        ({"set": ["a"]}, ("set, dotted key", "['a']")),
        ({"rows": {"a": {"set": 3}}}, ("set of row 'a'", "3")),
        ({"rows": {"dense": {}, "a": {"weights_of": "dens"}}}, ("weights_of", "'dens'", "of 'a'", "'dense'")),
        ({"rows": {"a": {}, "b": {"weights_of": "a", "grid": False}}}, ("weights_of", "'a'", "grid: false")),
        ({"rows": {"a": {"masks_of": "b"}, "b": {"weights_of": "a"}}}, ("masks_of", "from scratch", "a from b from a")),
        ({"rows": {"a": {}, "b": {"weights_of": "a", "masks_of": "a"}}}, ("found both", "'b'")),
        ({"not_reproduced": "RST"}, ("not_reproduced", "'RST'")),
        ({"not_reproduced": ["SNIP"]}, ("not_reproduced", "no rows", "SNIP")),
        ({"paper": {"GraNet": [1, 2]}}, ("`paper`", "'GraNet'")),
        ({"paper": {"SNIP": [1]}}, ("'SNIP'", "a list of 2", "null")),
        ({"paper": {"dense": [1, 2]}}, ("'dense'", "a list of 1")),
        ({"paper": {"SNIP": {0.8: 1}}}, ("'SNIP'", "a list of 2")),
    ],
)
def test_mistakes_are_named(study, changes, parts):
    with expect_refusal(*parts):
        Plan.load(study(**changes)).specs()


def test_files_that_are_no_studies_are_named(tmp_path):
    with expect_refusal("nothing.yaml", "found none"):
        Plan.load(tmp_path / "nothing.yaml")
    with expect_refusal("directory"):
        Plan.load(tmp_path)
    for text in (b"a: [", b"- a", b"\xff\xfe"):
        (tmp_path / "x.yaml").write_bytes(text)
        with expect_refusal("x.yaml"):
            Plan.load(tmp_path / "x.yaml")


def test_rows_that_a_sweep_cannot_vary_are_named(study):
    with expect_refusal("for a sweep", "optimizer.lr", "'a'"):
        as_sweep(Plan.load(study(rows={"a": {"config": "snip.yaml", "set": {"optimizer.lr": 1}}})))


def test_a_row_may_start_from_the_weights_of_another(study):
    rows = {
        "dense": {"set": {"prune": "Dense"}, "grid": False},
        "after": {"config": "snip.yaml", "weights_of": "dense"},
    }
    specs = Plan.load(study(rows=rows, not_reproduced=...)).specs()
    assert {(s.seed, s.weights_of) for s in specs if s.row == "after"} == {(0, "dense_seed=0"), (7, "dense_seed=7")}
    assert {s.weights_of for s in specs if s.row == "dense"} == {None}
    with expect_refusal("weights_of", "'dense'", "'after'"):
        as_sweep(Plan.load(study(rows=rows)))


def test_a_row_keeps_the_masks_of_another_at_the_same_point(study):
    rows = {
        "trained": {"grid": False},
        "searched": {"config": "snip.yaml", "weights_of": "trained"},
        "tuned": {"set": {"optimizer.lr": 0.01}, "masks_of": "searched"},
    }
    specs = Plan.load(study(rows=rows)).specs()
    tuned = [s for s in specs if s.row == "tuned"]
    assert [(s.weights_of, s.masks) for s in tuned[:2]] == [
        ("searched_sparsity=0.8_lr=0.1_seed=0", True),
        ("searched_sparsity=0.9_lr=0.1_seed=0", True),
    ]
    assert {s.weights_of for s in specs if s.row == "searched"} == {"trained_seed=0", "trained_seed=7"}
    assert not any(key.startswith("prune") for s in tuned for key in s.values)  # its masks say how sparse it is
    assert {s.settings["prune.sparsity"] for s in tuned} == {0.8, 0.9}
    assert {s.masks for s in specs if s.row != "tuned"} == {False}


def test_values_of_a_paper_are_told_and_its_rows_that_cannot_be_run_too(study):
    paper = {"dense": ["93.89 ± 0.33"], "SNIP": [93.2, None], "GraNet": ["92.0", None]}
    plan = Plan.load(study(paper=paper, not_reproduced=["GraNet", "RST"]))
    points = [{"prune.sparsity": s, "optimizer.lr": 0.1} for s in (0.8, 0.9)]
    assert plan.references() == [
        {"row": "dense", "settings": {}, "value": "93.89 ± 0.33", "reproduced": True},
        {"row": "SNIP", "settings": points[0], "value": "93.2", "reproduced": True},
        {"row": "GraNet", "settings": points[0], "value": "92.0", "reproduced": False},
        {"row": "GraNet", "settings": points[1], "value": None, "reproduced": False},
        {"row": "RST", "settings": {}, "value": None, "reproduced": False},
    ]
    assert len(plan.specs()) == 10
