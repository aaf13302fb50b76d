"""Run by `test_ddp.py` in two processes: prune by every criterion, train three steps, save what each rank got."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import TinyModule, tiny_data, tiny_loader
from criteria_list import criteria

import pl_prune as plp
from pl_prune.core.warmup import pooled_moments, set_statistics

SAMPLES = plp.Samples(total=21, batch_size=4)


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def module() -> TinyModule:
    torch.manual_seed(0)
    return TinyModule()


def share(rank: int, size: int) -> list:
    """Uneven shares, cut unevenly."""
    x, y = tiny_data().tensors
    mine = SAMPLES.indices(tiny_data())[rank::size]
    return [(x[part], y[part]) for part in (mine[:3], mine[3:])]


def trainer_of(callback: Callback, devices: int, folder: Path, steps: int) -> Trainer:
    return Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[callback],
    )


def warm_up(devices: int, folder: Path) -> dict[str, Tensor]:
    """The buffers after a warm-up on three batches, without a training step."""
    net = module()
    trainer_of(plp.BatchNormWarmup(batches=3), devices, folder, 0).fit(net, tiny_loader(), tiny_loader(16))
    return dict(net.named_buffers())


def warm_up_synced(rank: int, size: int) -> dict[str, Tensor]:
    """The same on SyncBatchNorm, which DDP wraps on a GPU alone: what the callback calls, with three batches."""
    net = nn.SyncBatchNorm.convert_sync_batchnorm(module())
    batches = [tiny_data()[16 * i : 16 * i + 16] for i in range(3)][rank::size]
    moments, done = pooled_moments(net, batches, lambda batch: net(batch[0]))
    set_statistics(net, moments, done)
    return dict(net.named_buffers())


def prune(criterion: plp.Criterion, devices: int, folder: Path) -> tuple[TinyModule, Trainer, plp.PruneAtInit]:
    pruner = plp.PruneAtInit(criterion, 0.7, plp.ERK(), samples=SAMPLES)
    trainer = trainer_of(pruner, devices, folder, 3)
    net = module()
    trainer.fit(net, tiny_loader(), tiny_loader(16))
    return net, trainer, pruner


if __name__ == "__main__":
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    result = {}
    for criterion in criteria():
        net, trainer, pruner = prune(criterion, 2, out)
        rank = trainer.global_rank
        result[type(criterion).__name__] = {
            "masks": pruner.masks.state_dict(),
            "zeros": {name: net.get_parameter(name).detach() == 0 for name in pruner.masks},
            "scores": plp.score(module(), criterion, share(rank, 2), loss),
        }
    result["buffers"] = {False: warm_up(2, out), True: warm_up_synced(rank, 2)}
    x, y = tiny_data().tensors
    mine = [(x[:3], y[:3])] if rank == 0 else [(x[3:8], y[3:8]), (x[8:11], y[8:11])]
    result["rank after rank"] = {
        "gnb": plp.score(module(), plp.GaussNewtonDiagonal(probes=4), mine, loss),
        "per sample": plp.score(module(), plp.HutchinsonDiagonal(probes=2, probe_per="sample"), mine, loss),
    }
    failing = [(torch.full((2, 1, 8, 8), float("nan")), torch.zeros(2, dtype=torch.long))] if rank else share(rank, 2)
    try:
        plp.score(module(), plp.SNIP(), failing, loss)
    except plp.PruneError as error:
        result["error"] = str(error)
    torch.save(result, out / f"rank{rank}.pt")
