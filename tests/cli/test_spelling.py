from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from pl_prune.__main__ import main
from pl_prune.callbacks.base import PruningCallback
from pl_prune.core.criterion import Criterion
from pl_prune.spelling import closest, explain

QUICKSTART = str(Path(__file__).parents[2] / "recipes" / "quickstart.yaml")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--prune=PruneAtInt"], "a kind of PruningCallback under prune; found 'PruneAtInt'. The closest name is 'PruneAtInit'."),
        (["--prune.criterion=snap"], "a kind of Criterion under prune.criterion; found 'snap'. The closest name is 'SNIP'."),
        (["--prune.criterion=pl_prune.SNP"], "a kind of Criterion under prune.criterion; found 'SNP'. The closest name is 'SNIP'."),
        (["--prune.allocation=Globl"], "a kind of Allocation under prune.allocation; found 'Globl'. The closest name is 'Global'."),
        (["--prune=GradualPruning", "--prune.schedule=Cubc"], "a kind of Schedule under prune.schedule; found 'Cubc'. The closest"),
        (["--prune.spersity=0.5"], "a setting of PruneAtInit under prune; found 'spersity'. The closest name is 'sparsity'."),
        (
            ["--prune.allocation.min_keep_row=1"],
            "a setting of Global under prune.allocation; found 'min_keep_row'. The closest name is 'min_keep_rows'.",
        ),
        (["--prune.criterion.rounds=3"], "a setting of SNIP under prune.criterion; found 'rounds'. It has none."),
        (["--prune=Dense", "--prune.sparsity=0.9"], "found 'sparsity'. It has none. Choose the class first: `--prune=PruneAtInit`"),
        (["--prne.sparsity=0.9"], "a known key; found 'prne'. The closest name is 'prune'."),
        (["--prune.samples.per_clas=3"], "a setting of Samples under prune.samples; found 'per_clas'. The closest name is 'per_class'."),
        (["--trainer.max_epoch=1"], "a known key; found 'trainer.max_epoch'. The closest name is 'trainer.max_epochs'."),
        (["--optimzer.lr=1"], "a known key; found 'optimzer'. The closest name is 'optimizer'."),
        (["--optimizer.momentumm=1"], "a setting of SGD under optimizer; found 'momentumm'. The closest name is 'momentum'."),
        (["--wieghts=x"], "a known key; found 'wieghts'. The closest name is 'weights'."),
    ],
    ids=lambda v: v[-1] if isinstance(v, list) else "",
)  # fmt: skip
def test_a_mistyped_name_is_answered_with_the_closest(words, said, capfd, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pl-prune"])
    with pytest.raises(SystemExit, match="2"):
        main(["fit", "--config", QUICKSTART, *words])
    error = capfd.readouterr().err
    assert re.fullmatch(r"pl-prune fit: error: Expected .+; found .+\. .+\n", error), error
    assert said in error


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("sparsity: 0.9", "spersity: 0.9", "found 'spersity'. The closest name is 'sparsity'."),
        ("criterion: pl_prune.SNIP", "criterion: {class_path: GraSP, init_args: {temperture: 1.0}}", "is 'temperature'."),
        ("criterion: pl_prune.SNIP", "allocation: {class_path: Globl}", "found 'Globl'. The closest name is 'Global'."),
        ("\nprune:", "\nprun:", "found 'prun'. The closest name is 'prune'."),
        (
            "sparsity: 0.9",
            "samples: {per_clas: 3}",
            "a setting of Samples under prune.samples; found 'per_clas'. The closest name is 'per_class'.",
        ),
        ("sparsity: 0.9", "select: {exclud: [a]}", "a setting of Select under prune.select; found 'exclud'. The closest name is"),
    ],
)  # fmt: skip
def test_so_is_one_in_a_recipe(old, new, said, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pl-prune"])
    recipe = tmp_path / "recipe.yaml"
    text = Path(QUICKSTART).read_text()
    assert text.count(old) == 1
    recipe.write_text(text.replace(old, new))
    with pytest.raises(SystemExit, match="2"):
        main(["fit", "--config", str(recipe)])
    assert said in capfd.readouterr().err


def test_a_mistyped_setting_of_the_module_is_not_taken_for_a_key_of_ours(capfd, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pl-prune"])
    with pytest.raises(SystemExit, match="2"):
        main(["fit", "--config", QUICKSTART, "--model.wieght=3"])
    error = capfd.readouterr().err
    assert "a setting of ImageClassifier under model; found 'wieght'" in error
    assert "weights'" not in error


def test_what_is_like_nothing_is_answered_with_all_there_are():
    message = 'Parser key "prune":\n  - Expected a dot import path string: Zzzz'
    explained = explain(message, {"prune": PruningCallback})
    assert explained is not None
    assert explained.startswith("Expected a kind of PruningCallback under prune; found 'Zzzz'. There are Dense, ")


def test_a_class_of_the_users_own_is_among_the_names():
    class Sqrt(Criterion):
        def __call__(self, probe):
            return {}

    message = (
        "Parser key \"prune\":\n  Problem with given class_path 'pl_prune.PruneAtInit':\n"
        '    Parser key "criterion":\n      Expected a dot import path string: mine.Sqr'
    )
    explained = explain(message, {"prune": PruningCallback})
    assert explained is not None
    assert "found 'Sqr'. The closest name is 'Sqrt'." in explained


@pytest.mark.parametrize(
    "message",
    [
        "Parser key \"trainer.max_epochs\":\n  Expected a <class 'int'>. Got value: abc",
        "unrecognized arguments: --colour=red",
        'Parser key "prune":\n  Problem with given class_path \'pl_prune.PruneAtInit\':\n    Parser key "sparsity":\n'
        "      Expected a <class 'float'>. Got value: abc",
        "Parser key \"prune\":\n  Problem with given class_path 'no.such.Thing':\n    Option 'x' is not accepted",
        "",
    ],
)
def test_other_messages_are_left_to_jsonargparse(message):
    assert explain(message, {"prune": PruningCallback}) is None


def test_letters_may_be_of_either_case():
    assert closest("grasp", ["SNIP", "GraSP"]) == "GraSP"
    assert closest("other", ["SNIP", "GraSP"]) is None
