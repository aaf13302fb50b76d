"""Two ranks cut alike, as one process does, train and resume."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from launch import launch
from structured_job import cut


def test_two_ranks_cut_as_one_process_does_and_resume(tmp_path):
    launch([Path(__file__).with_name("structured_job.py"), tmp_path, 2])
    ranks = [torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in range(2)]
    _, pruner, _ = cut(str(tmp_path), 1)
    for state in ranks:
        assert state["cut"] == pruner.state_dict()["cuts"]
        assert len(state["first"]["net.0.weight"]) < 8 or len(state["first"]["net.3.weight"]) < 8
        for part in ("first", "again"):
            for name, tensor in state[part].items():
                if "running" not in name:  # each rank's own
                    assert torch.equal(tensor, ranks[0][part][name]), name
    assert not torch.equal(ranks[0]["first"]["net.9.weight"], ranks[0]["again"]["net.9.weight"])
