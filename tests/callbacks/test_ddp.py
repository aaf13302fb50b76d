from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from criteria_list import criteria
from ddp_job import (
    NUMBERED,
    SCHEDULE,
    Backwards,
    OwnSamples,
    as_in_one_process,
    block,
    loss,
    module,
    prune,
    prune_drifted,
    prune_own,
    share,
    warm_up,
    warm_up_synced,
)
from fake_module import tiny_data
from launch import launch

import pl_prune as plp
from pl_prune.core.controls import inverted
from pl_prune.core.types import prune_count


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """What each rank of two and of three saved; side by side, since a process spends most of its time starting."""
    folders = {size: tmp_path_factory.mktemp(f"ranks{size}") for size in (2, 3)}
    launch(*([Path(__file__).with_name("ddp_job.py"), folder, size] for size, folder in folders.items()))
    return {
        size: [{**torch.load(folder / f"rank{rank}.pt", weights_only=True), "folder": folder} for rank in range(size)]
        for size, folder in folders.items()
    }


@pytest.fixture(scope="module", params=[2, 3], ids="{} ranks".format)
def ranks(request, jobs):
    return jobs[request.param]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The one-process twin of a pruned run: its callback, which holds the masks and the scores that made them."""
    return cache(lambda criterion: prune(criterion, 1, tmp_path_factory.mktemp("alone"))[2])


@cache
def scores_of(criterion):
    return plp.score(module(), criterion, share(0, 1), loss)


def check_close(found, expected):
    """To 1e-6 of each score and of the largest of its layer."""
    assert found.keys() == expected.keys()
    for name, score in expected.items():
        torch.testing.assert_close(found[name], score, rtol=1e-6, atol=1e-6 * float(score.abs().max()))


def check_masks(masks, twin):
    """Equal, but for entries that are within 1e-6 of the largest score of the layer from the threshold."""
    assert masks.counts() == twin.masks.counts()
    for name, score in twin.scores.items():
        threshold = score[twin.masks[name]].min()
        differ = masks[name] != twin.masks[name]
        assert bool(((score - threshold).abs()[differ] <= 1e-6 * score.abs().max()).all()), name


@pytest.mark.parametrize("criterion", criteria(), ids=lambda c: type(c).__name__)
def test_ranks_are_one_process(ranks, criterion, alone):
    held = [sum(len(batch[1]) for batch in share(rank, len(ranks))) for rank in range(len(ranks))]
    assert len(set(held)) == 2
    twin, name = alone(criterion), type(criterion).__name__
    for rank in ranks:
        masks = plp.MaskSet.from_state_dict(rank[name]["masks"])
        check_masks(masks, twin)
        check_close(rank[name]["scores"], scores_of(criterion))
        assert masks == plp.MaskSet.from_state_dict(ranks[0][name]["masks"])
        for parameter, zeros in rank[name]["zeros"].items():
            assert torch.equal(zeros, ~masks[parameter])


@pytest.mark.parametrize("criterion", [c for c in criteria() if c.needs_loss], ids=lambda c: type(c).__name__)
def test_a_rank_may_hold_no_sample(ranks, criterion):
    assert block(len(ranks) - 1, len(ranks)) == []
    for rank in ranks:
        check_close(rank[type(criterion).__name__]["scores without a sample on the last rank"], scores_of(criterion))


def test_fewer_samples_than_ranks(ranks, tmp_path):
    _, _, twin = prune(plp.SNIP(), 1, tmp_path, plp.Samples(total=len(ranks) - 1))
    for rank in ranks:
        check_masks(plp.MaskSet.from_state_dict(rank["few"]), twin)


@pytest.mark.parametrize("more", [-1, 1], ids=["fewer batches", "more batches"])
@pytest.mark.parametrize("synced", [False, True], ids=["BatchNorm", "SyncBatchNorm"])
def test_batch_norms_are_warmed_up_over_all_ranks(ranks, synced, more, tmp_path):
    batches = len(ranks) + more
    alone = warm_up_synced(0, 1, batches) if synced else warm_up(1, tmp_path, batches)
    assert alone["net.1.num_batches_tracked"] == batches
    for rank in ranks:
        torch.testing.assert_close(rank["buffers", batches, synced], alone, rtol=1e-6, atol=1e-7)


def test_ranks_may_hold_any_share_of_the_samples(ranks):
    x, y = tiny_data().tensors
    for name, criterion in NUMBERED.items():
        alone = plp.score(module(), criterion, [(x[:11], y[:11])], loss)
        for rank in ranks:
            for parameter, score in alone.items():
                found = rank["rank after rank"][name][parameter]
                torch.testing.assert_close(found, score, rtol=1e-5, atol=1e-6 * float(score.abs().max()))


@pytest.mark.parametrize("run", ["gradual", "gradual, as in one process"])
def test_masks_grow_alike_on_all_ranks(ranks, run):
    first = plp.MaskSet.from_state_dict(ranks[0][run]["masks"])
    total = sum(size for _, size in first.counts().values())
    for rank in ranks:
        assert rank[run]["error"] == ""
        assert plp.MaskSet.from_state_dict(rank[run]["masks"]) == first
        assert rank[run]["sparsity"] == [prune_count(SCHEDULE.sparsity(step), total) / total for step in range(8)]
        assert rank[run]["held"] == [True] * 8


def test_masks_grow_as_in_one_process(ranks, tmp_path):
    alone = as_in_one_process(1, tmp_path)
    assert len(set(alone["sparsity"])) == 7
    for rank in ranks:
        found = rank["gradual, as in one process"]
        assert plp.MaskSet.from_state_dict(found["masks"]) == plp.MaskSet.from_state_dict(alone["masks"])


def test_ranks_are_scored_with_the_buffers_of_rank_zero(ranks, tmp_path):
    twin = prune_drifted(1, tmp_path)
    for rank in ranks:
        check_masks(plp.MaskSet.from_state_dict(rank["drifted"]), twin)


def test_a_data_set_of_fewer_samples_than_ranks(ranks, tmp_path):
    twin = prune_own(OwnSamples(2), 1, tmp_path)
    for rank in ranks:
        check_masks(plp.MaskSet.from_state_dict(rank["two samples"]), twin)


def test_a_rank_without_a_sample_selects_as_the_others_do(ranks):
    alone = plp.score(Backwards(), plp.SNIP(), share(0, 1), loss)
    assert list(alone) == ["first.weight", "second.weight"]
    for rank in ranks:
        check_close(rank["backwards"], alone)


def test_a_step_that_fails_on_one_rank_is_an_error_on_all(ranks):
    for rank, result in enumerate(ranks):
        assert "bad sample" in result["step"]
        assert rank == 1 or "rank 1 failed with RuntimeError" in result["step"]


def test_data_that_one_rank_cannot_read_are_an_error_on_all(ranks):
    for rank, result in enumerate(ranks):
        assert "disk gone" in result["data"]
        assert rank == 1 or "rank 1 failed with OSError" in result["data"]


def test_a_failure_on_one_rank_is_an_error_on_all(ranks):
    for rank, result in enumerate(ranks):
        assert "finite loss; found nan" in result["loss"]
        assert rank == 1 or "rank 1 failed" in result["loss"]


def test_other_masks_on_one_rank_are_an_error_on_all(ranks):
    for rank in ranks:
        for error in (rank["first masks"], rank["resumed masks"], rank["later masks"]["error"]):
            assert "Expected the same masks on every rank" in error
            assert "on ranks [1]" in error
        assert rank["later masks"]["sparsity"] == ranks[0]["gradual"]["sparsity"][:2]


def test_ranks_prune_by_a_file_that_is_the_same_for_all(ranks):
    scores = plp.score(module(), plp.Magnitude())
    expected = inverted(plp.Global()(scores, 0.7), scores)
    run = plp.RunFolder(ranks[0]["folder"] / "logs" / f"{len(ranks)} ranks")
    for rank in ranks:
        assert plp.MaskSet.from_state_dict(rank["file"]["masks"]) == expected == run.masks()
        assert "Expected the same scores in" in rank["file"]["error"]
        assert "on ranks [1]" in rank["file"]["error"]
    check_close(run.scores(), scores)
