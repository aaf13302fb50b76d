from __future__ import annotations

import pytest
import torch
from refusal import expect_refusal

from pl_prune.core.masks import MaskSet
from pl_prune.core.store import save_masks
from pl_prune.runs.transfer import SOURCE, TransferPlan


def plan(folder, **changes):
    settings = {
        "name": "transfer",
        "rows": {},
        "seeds": (1, 2, 3),
        "config": ("recipe.yaml",),
        "data": {SOURCE: [], "other": ["other.yaml"]},
        "criteria": {"SNIP": "SNIP"},
        "sparsities": (0.5,),
        "folder": folder,
    }
    return TransferPlan(**{**settings, **changes})


def write_masks(plan, pattern):
    for label in plan.criteria:
        for data in plan.data:
            for sparsity in plan.sparsities:
                for seed in plan.seeds:
                    mask = torch.tensor([pattern(data, seed) >> bit & 1 for bit in range(8)], dtype=torch.bool)
                    save_masks(plan.masks(label, data, sparsity, seed), MaskSet({"w": mask}))


def test_every_arm_trains_the_weights_with_the_mask_that_the_definitions_ask_for(tmp_path):
    one = plan(tmp_path)
    write_masks(one, lambda data, seed: 16 * seed + (data == SOURCE))
    arms = {(a["dataset"], a["seed"], a["arm"]): spec for a, spec in one.arms()}
    assert len(arms) == 2 * 3 * 4

    def of(spec):
        masks = spec.values["prune"]["init_args"]["masks"]
        return spec.values["weights"], masks, spec.values["seed_everything"]

    def weights(seed, data="other"):
        return str(one.weights(data, seed))

    def masks(data, seed):
        return str(one.masks("SNIP", data, 0.5, seed))

    assert of(arms["other", 3, "own"]) == (weights(3), masks("other", 3), 3)
    assert of(arms["other", 3, "reused"]) == (weights(3), masks(SOURCE, 3), 3)
    assert of(arms["other", 3, "again"])[:2] == (weights(3), masks("other", 3))
    assert of(arms["other", 3, "again"])[2] not in one.seeds
    assert of(arms["other", 3, "cross"]) == (weights(1), masks("other", 3), 3)
    assert arms["other", 3, "own"].config == ("recipe.yaml", "other.yaml")
    assert of(arms[SOURCE, 3, "own"])[0] == weights(3, SOURCE)
    # Heads lie in those files: under --new_head they would be drawn by the seed, which orders the batches.
    assert not any(spec.values.get("new_head") for spec in arms.values())


def test_the_same_mask_is_trained_once(tmp_path):
    one = plan(tmp_path)
    write_masks(one, lambda data, seed: 16 * seed)
    arms = {(a["dataset"], a["seed"], a["arm"]): spec for a, spec in one.arms()}
    assert all(arms[data, seed, "own"].key == arms[data, seed, "reused"].key for data in one.data for seed in one.seeds)
    assert len(one.specs()) == 2 * 3 * 3


def test_sparsities_that_differ_little_have_files_and_runs_of_their_own(tmp_path):
    one = plan(tmp_path, sparsities=(0.98, 0.98000001))
    write_masks(one, lambda data, seed: 16 * seed)
    assert len(list((tmp_path / "masks").iterdir())) == 2 * 2 * 3
    assert len(one.specs()) == 2 * 2 * 3 * 3


def test_what_files_were_made_with_is_noted_and_another_one_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("recipe", "other", "third"):
        (tmp_path / f"{name}.yaml").write_text(f"seed: {name}")
    one = plan(tmp_path / "out")
    one.settle("Global")
    for made in (one.scores("SNIP", SOURCE, 1), *(one.weights(data, 1) for data in (SOURCE, "other", "third"))):
        made.parent.mkdir(exist_ok=True)
        made.touch()
    one.settle("Global")
    plan(tmp_path / "out", data={SOURCE: [], "third": ["third.yaml"]}, sparsities=(0.7,)).settle("Global")
    with expect_refusal("--allocation Global", "found --allocation ERK", "another --folder"):
        one.settle("ERK")
    (tmp_path / "other.yaml").write_text("seed: another")
    with expect_refusal("configuration of other"):
        one.settle("Global")
    plan(tmp_path / "out", data={SOURCE: [], "third": ["third.yaml"]}).settle("Global")
    (tmp_path / "recipe.yaml").write_text("seed: another")
    with expect_refusal("configuration of source"):
        plan(tmp_path / "out", data={SOURCE: []}).settle("Global")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": {SOURCE: []}}, ["--targets", "none"]),
        ({"criteria": {}}, ["--criteria"]),
        ({"sparsities": ()}, ["--sparsity"]),
        ({"sparsities": (1.5,)}, ["1.5"]),
        ({"seeds": (1,)}, ["two or more", "[1]"]),
        ({"seeds": (1, 1)}, ["different", "[1, 1]"]),
    ],
)
def test_what_gives_no_index_is_refused(tmp_path, changes, words):
    with expect_refusal(*words):
        plan(tmp_path, **changes).check()


def test_a_target_from_which_nothing_was_made_may_be_corrected(tmp_path):
    (tmp_path / "recipe.yaml").write_text("a: 1")
    target = tmp_path / "other.yaml"
    target.write_text("b: 1")
    one = plan(tmp_path, config=(str(tmp_path / "recipe.yaml"),), data={SOURCE: [], "other": [str(target)]})
    one.settle("Global")
    target.write_text("b: 2")
    one.settle("ERK")  # no score was there either
    for file in (one.weights("other", 1), one.scores("SNIP", "other", 1)):
        file.parent.mkdir()
        file.touch()
    target.write_text("b: 3")
    with expect_refusal("configuration of other"):
        one.settle("ERK")
    target.write_text("b: 2")
    with expect_refusal("--allocation ERK", "Global"):
        one.settle("Global")
