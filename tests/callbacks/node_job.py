"""Run by `test_launchers.py`: prune by SNIP on one of two nodes ("node"), or in two spawned processes ("spawn")."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from ddp_job import prune

import pl_prune as plp

torch.set_num_threads(1)  # in spawned processes too, which import this file
LAUNCHES = {
    "node": {"devices": 1, "num_nodes": 2, "strategy": "ddp"},
    "spawn": {"devices": 2, "strategy": "ddp_spawn"},
}

if __name__ == "__main__":
    out, kind = Path(sys.argv[1]), sys.argv[2]
    net, trainer, pruner = prune(plp.SNIP(), folder=out, **LAUNCHES[kind])
    masks = None if pruner.masks is None else pruner.masks.state_dict()
    torch.save({"weights": net.state_dict(), "masks": masks}, out / f"{kind}{trainer.global_rank}.pt")
