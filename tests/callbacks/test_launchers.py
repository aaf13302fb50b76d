from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from refusal import expect_refusal

sys.path.insert(0, str(Path(__file__).parent))
from ddp_job import module, prune
from launch import free_port, launch

import pl_prune as plp
from pl_prune.core.types import prune_count

JOB = Path(__file__).with_name("node_job.py")
WARNING = "returns the weights alone"


def zeros_of(weights, masks):
    """The masks that the weights show, of a state that loads strictly into the unpruned network."""
    net = module()
    net.load_state_dict(weights)
    return plp.MaskSet.from_zeros({name: net.get_parameter(name) for name in masks})


def test_two_nodes_prune_as_one_process(tmp_path):
    for last in (False, True):  # torchrun's rendezvous was seen to hang once in fifteen launches
        options = ["--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={free_port()}"]
        nodes = (["-m", "torch.distributed.run", *options, f"--node_rank={n}", JOB, tmp_path, "node"] for n in (0, 1))
        try:
            launch(*nodes, timeout=90)
            break
        except subprocess.TimeoutExpired:
            if last:
                raise
    _, _, alone = prune(plp.SNIP(), 1, tmp_path)
    for node in (0, 1):
        found = torch.load(tmp_path / f"node{node}.pt", weights_only=True)
        assert plp.MaskSet.from_state_dict(found["masks"]) == alone.masks
        assert zeros_of(found["weights"], alone.masks) == alone.masks


def test_the_spawn_launcher_gives_back_pruned_weights(tmp_path):
    (said,) = launch([JOB, tmp_path, "spawn"], warnings="always")
    assert said.count(WARNING) == 1
    _, _, alone = prune(plp.SNIP(), 1, tmp_path)
    found = torch.load(tmp_path / "spawn0.pt", weights_only=True)
    assert found["masks"] is None
    masks = zeros_of(found["weights"], alone.masks)
    kept, total = (sum(column) for column in zip(*masks.counts().values(), strict=True))
    assert total - kept == prune_count(0.7, total)
    assert masks == alone.masks


@pytest.mark.parametrize("kind", [FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy])
@pytest.mark.parametrize("callback", [plp.PruneAtInit, plp.GradualPruning, plp.Dense])
def test_strategies_that_shard_parameters_are_refused(callback, kind):
    trainer = Trainer(accelerator="cpu", devices=1, barebones=True)
    # set behind the trainer's back, which takes these on a GPU alone; DeepSpeed's constructor wants its package
    trainer._accelerator_connector.strategy = kind.__new__(kind) if kind is DeepSpeedStrategy else kind()
    pruner, net = callback(), module()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with expect_refusal(kind.__name__, "strategy='ddp'"):
        pruner.setup(trainer, net, "fit")
    assert pruner.masks is None
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
