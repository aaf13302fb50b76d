"""Two processes learn the scores and masks of one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import pl_prune as plp

sys.path.insert(0, str(Path(__file__).parent))
import scores_job
from launch import launch

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step`")


def test_two_ranks_learn_what_one_process_does(tmp_path):
    launch([Path(__file__).with_name("scores_job.py"), tmp_path, 2])
    ranks = [torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in range(2)]
    for name in scores_job.CALLBACKS:
        module, pruner = scores_job.train(str(tmp_path), 1, name)
        for rank in ranks:
            assert plp.MaskSet.from_state_dict(rank[name]["masks"]) == pruner.masks, name
            for key, value in module.state_dict().items():
                torch.testing.assert_close(rank[name]["weights"][key], value, rtol=1e-9, atol=1e-12)
                assert torch.equal(rank[name]["weights"][key], ranks[0][name]["weights"][key])
