from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from conftest import tiny_data
from criteria_list import criteria
from ddp_job import loss, module, prune, share, warm_up, warm_up_synced

import pl_prune as plp


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    job = Path(__file__).with_name("ddp_job.py")
    env = {**os.environ, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, job, folder], env=env, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("criterion", criteria(), ids=lambda c: type(c).__name__)
def test_two_processes_are_one(ranks, criterion, tmp_path):
    name = type(criterion).__name__
    _, _, alone = prune(criterion, 1, tmp_path)
    scores = plp.score(module(), criterion, share(0, 1), loss)
    assert sum(len(batch[1]) for batch in share(0, 2)) == 11
    for rank in ranks:
        masks = plp.MaskSet.from_state_dict(rank[name]["masks"])
        assert masks == alone.masks
        for parameter, score in scores.items():
            torch.testing.assert_close(
                rank[name]["scores"][parameter], score, rtol=1e-6, atol=1e-6 * float(score.abs().max())
            )
            assert torch.equal(rank[name]["zeros"][parameter], ~masks[parameter])


@pytest.mark.parametrize("synced", [False, True], ids=["BatchNorm", "SyncBatchNorm"])
def test_batch_norms_are_warmed_up_over_all_ranks(ranks, synced, tmp_path):
    alone = warm_up_synced(0, 1) if synced else warm_up(1, tmp_path)
    assert alone["net.1.num_batches_tracked"] == 3
    for rank in ranks:
        torch.testing.assert_close(rank["buffers"][synced], alone, rtol=1e-6, atol=1e-7)


def test_ranks_may_hold_any_share_of_the_samples(ranks):
    x, y = tiny_data().tensors
    criteria = {
        "gnb": plp.GaussNewtonDiagonal(probes=4),
        "per sample": plp.HutchinsonDiagonal(probes=2, probe_per="sample"),
    }
    for name, criterion in criteria.items():
        alone = plp.score(module(), criterion, [(x[:11], y[:11])], loss)
        for rank in ranks:
            for parameter, score in alone.items():
                found = rank["rank after rank"][name][parameter]
                torch.testing.assert_close(found, score, rtol=1e-5, atol=1e-6 * float(score.abs().max()))


def test_a_failure_on_one_rank_is_an_error_on_both(ranks):
    assert "finite loss; found nan" in ranks[1]["error"]
    assert "rank 1 failed" in ranks[0]["error"]
    assert "finite loss; found nan" in ranks[0]["error"]
