"""Run by `test_ddp.py` in two or three processes: prune by every criterion, train, save what each rank got."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count, islice
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1]))
from criteria_list import criteria
from fake_module import TinyModule, tiny_data, tiny_loader

import pl_prune as plp
from pl_prune.core.sync import rank_and_size
from pl_prune.core.warmup import pooled_moments, set_statistics
from pl_prune.data.shuffle import EpochShuffle

STRATEGIES = {1: "auto", 2: "ddp", 3: "ddp_find_unused_parameters_true"}
SAMPLES = plp.Samples(total=23, batch_size=4)  # 12 and 11; 8, 8 and 7
SCHEDULE = plp.Linear(final=0.8, start=1, end=6, every=1, initial=0.2)
NUMBERED = {
    "gnb": plp.GaussNewtonDiagonal(probes=4),
    "per sample": plp.HutchinsonDiagonal(probes=2, probe_per="sample"),
}


class Noting(plp.PruneAtInit):
    """Keep the scores that the masks are made from."""

    def make_masks(self, bridge):
        prune = bridge.prune

        def noting(*args, **kwargs):
            masks, self.scores = prune(*args, **kwargs)
            return masks, self.scores

        bridge.prune = noting
        return super().make_masks(bridge)


class Plain(TinyModule):
    """Without dropout and batch norm, so that ranks train as one process does on the batches of all."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__()
        self.net[1] = self.net[7] = nn.Identity()


class Turns(EpochShuffle):
    """One order of samples, of which the ranks take turns."""

    def __iter__(self):
        rank, size = rank_and_size()
        return islice(super().__iter__(), rank, None, size)

    def __len__(self):
        return super().__len__() // rank_and_size()[1]


class Watch(Callback):
    """How sparse the weights are that each batch meets, and whether its step keeps the zeros."""

    def __init__(self, pruner):
        self.pruner, self.sparsity, self.held = pruner, [], []

    def found(self, module):
        return plp.MaskSet.from_zeros({name: module.get_parameter(name) for name in self.pruner.masks})

    def on_train_batch_start(self, trainer, pl_module, *_):
        self.sparsity.append(self.found(pl_module).sparsity())

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.held.append(self.found(pl_module) == self.pruner.masks)


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def module() -> TinyModule:
    torch.manual_seed(0)
    return TinyModule()


def cut(indices: list[int]) -> list:
    """Batches of unlike sizes; none where there are no samples."""
    x, y = tiny_data().tensors
    return [(x[part], y[part]) for part in (indices[:3], indices[3:]) if part]


def share(rank: int, size: int) -> list:
    """Every size-th sample, cut unevenly."""
    return cut(SAMPLES.indices(tiny_data())[rank::size])


def block(rank: int, size: int) -> list:
    """Samples one after another, and none for the last rank."""
    ends = {2: (0, 23, 23), 3: (0, 5, 23, 23)}[size]
    return cut(SAMPLES.indices(tiny_data())[ends[rank] : ends[rank + 1]])


def trainer_of(devices: int, folder: Path, steps: int, *callbacks: Callback, **settings: Any) -> Trainer:
    defaults = {
        "max_steps": steps,
        "accelerator": "cpu",
        "devices": devices,
        "strategy": STRATEGIES[devices],
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
    }
    return Trainer(**{**defaults, **settings}, callbacks=list(callbacks))


def warm_up(devices: int, folder: Path, batches: int) -> dict[str, Tensor]:
    """The buffers after a warm-up, without a training step."""
    net = module()
    trainer_of(devices, folder, 0, plp.BatchNormWarmup(batches=batches)).fit(net, tiny_loader(), tiny_loader(16))
    return dict(net.named_buffers())


def warm_up_synced(rank: int, size: int, batches: int) -> dict[str, Tensor]:
    """The same on SyncBatchNorm, which DDP wraps on a GPU alone: what the callback calls."""
    net = nn.SyncBatchNorm.convert_sync_batchnorm(module())
    mine = [tiny_data()[16 * i : 16 * i + 16] for i in range(batches)][rank::size]
    moments, done = pooled_moments(net, mine, lambda batch: net(batch[0]))
    set_statistics(net, moments, done)
    return dict(net.named_buffers())


def prune(
    criterion: plp.Criterion, devices: int, folder: Path, samples: plp.Samples = SAMPLES, **settings: Any
) -> tuple[TinyModule, Trainer, Noting]:
    pruner = Noting(criterion, 0.7, plp.ERK(), samples=samples)
    trainer = trainer_of(devices, folder, 3, pruner, **settings)
    net = module()
    trainer.fit(net, tiny_loader(), tiny_loader(16))
    return net, trainer, pruner


def pruned_while_training(
    net: LightningModule, loader: DataLoader, devices: int, folder: Path, **settings: Any
) -> dict[str, Any]:
    """The masks at the end and what `Watch` saw, or the error that came in between."""
    pruner = plp.GradualPruning(plp.SNIP(), SCHEDULE, samples=SAMPLES)
    watch, error = Watch(pruner), ""
    try:
        trainer_of(devices, folder, 8, pruner, watch, **settings).fit(net, loader, tiny_loader(16))
    except plp.PruneError as caught:
        error = str(caught)
    return {"masks": pruner.masks.state_dict(), "sparsity": watch.sparsity, "held": watch.held, "error": error}


def as_in_one_process(devices: int, folder: Path) -> dict[str, Any]:
    """Train on batches of twelve over all ranks, in double precision: what sums in another order hardly differs."""
    data = tiny_data(48)
    loader = DataLoader(data, 12 // devices, sampler=Turns(data))
    return pruned_while_training(Plain(), loader, devices, folder, precision="64-true", use_distributed_sampler=False)


@contextmanager
def tampered(rank: int, time: int) -> Iterator[None]:
    """Flip an entry of the masks that rank 1 receives at the given time, counted from 1."""
    receive, times = plp.MaskSet.from_state_dict, count(1)

    def received(state):
        keep = dict(receive(state))
        if next(times) == time and rank == 1:
            next(iter(keep.values())).view(-1)[0].logical_not_()
        return plp.MaskSet(keep)

    with mock.patch.object(plp.MaskSet, "from_state_dict", received):
        yield


def refusal(run: Callable[[], Any]) -> str:
    try:
        run()
    except (plp.PruneError, OSError, RuntimeError) as error:
        return str(error)
    return ""


def scored(criterion: plp.Criterion, size: int, out: Path) -> dict[str, Any]:
    net, _, pruner = prune(criterion, size, out)
    rank, _ = rank_and_size()
    without = plp.score(module(), criterion, block(rank, size), loss) if criterion.needs_loss else {}
    return {
        "masks": pruner.masks.state_dict(),
        "zeros": {name: net.get_parameter(name).detach() == 0 for name in pruner.masks},
        "scores": plp.score(module(), criterion, share(rank, size), loss),
        "scores without a sample on the last rank": without,
    }


class Drifted(Callback):
    """Running statistics that are other ones on each rank, as they are between two forward passes."""

    def on_fit_start(self, trainer, pl_module):
        pl_module.net[1].running_mean += 0.3 * trainer.global_rank


def prune_drifted(size: int, out: Path) -> Noting:
    pruner = Noting(plp.SNIP(), 0.7, samples=SAMPLES, bn_warmup="never")
    trainer_of(size, out, 0, Drifted(), pruner).fit(module(), tiny_loader(), tiny_loader(16))
    return pruner


class OwnSamples(TinyModule):
    """Scored on as many samples as it is told, which one rank cannot read."""

    def __init__(self, count: int, unreadable_on: int | None = None):
        torch.manual_seed(0)
        super().__init__()
        self.count, self.unreadable_on = count, unreadable_on

    def scoring_dataloader(self):
        return DataLoader([self.sample(i) for i in range(self.count)] if self.unreadable_on is None else self, 4)

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if rank_and_size()[0] == self.unreadable_on:
            raise OSError("disk gone")
        return self.sample(index)

    def sample(self, index):
        return tiny_data()[index]


def prune_own(net: OwnSamples, size: int, out: Path) -> Noting:
    pruner = Noting(plp.SNIP(), 0.7, samples=plp.Samples(total=8))
    trainer_of(size, out, 1, pruner).fit(net, tiny_loader(), tiny_loader(16))
    return pruner


class Backwards(nn.Module):
    """Defined in another order than it runs."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__()
        self.head, self.first, self.second = nn.Linear(4, 4), nn.Linear(64, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.head(self.second(self.first(x.flatten(1)).relu()).relu())


def only_on_rank_one(model: nn.Module, batch: Any) -> Tensor:
    if rank_and_size()[0] == 1:
        raise RuntimeError("bad sample")
    return loss(model, batch)


def resumed_apart(rank: int, size: int, out: Path) -> str:
    """Resume from one file, of whose masks rank 1 reads others."""
    _, trainer, _ = prune(plp.SNIP(), size, out)
    trainer.save_checkpoint(out / f"apart{size}.ckpt")
    pruner = Noting(plp.SNIP(), 0.7, plp.ERK(), samples=SAMPLES)
    with tampered(rank, 1):
        again = trainer_of(size, out, 5, pruner)
        return refusal(lambda: again.fit(module(), tiny_loader(), tiny_loader(16), ckpt_path=out / f"apart{size}.ckpt"))


def pruned_by_file(rank: int, size: int, out: Path) -> dict[str, Any]:
    """Every rank reads a file of its own: first they are alike, then rank 1's is not."""
    file, scores = out / f"scores{rank}", plp.score(module(), plp.Magnitude())
    plp.save_scores(file, scores)
    pruner = plp.PruneAtInit(sparsity=0.7, scores=str(file), control="invert")
    recorded = {"logger": CSVLogger(out, name="logs", version=f"{size} ranks")}
    trainer_of(size, out, 2, plp.RunRecord(), pruner, **recorded).fit(module(), tiny_loader(), tiny_loader(16))
    if rank == 1:
        plp.save_scores(file, {name: -score for name, score in scores.items()})
    other = trainer_of(size, out, 1, plp.PruneAtInit(scores=str(file)))
    return {
        "masks": pruner.masks.state_dict(),
        "error": refusal(lambda: other.fit(module(), tiny_loader(), tiny_loader(16))),
    }


def rank_after_rank(rank: int, size: int) -> dict[str, dict[str, Tensor]]:
    """Scores that draw random numbers for each sample, where ranks do not take turns."""
    x, y = tiny_data().tensors
    batches = [(x[a:b], y[a:b]) for a, b in ((0, 3), (3, 8), (8, 11))]
    mine = batches[rank:] if rank == size - 1 else batches[rank : rank + 1]
    return {name: plp.score(module(), criterion, mine, loss) for name, criterion in NUMBERED.items()}


def main(out: Path, size: int) -> None:
    result: dict[str, Any] = {type(c).__name__: scored(c, size, out) for c in criteria()}
    rank, _ = rank_and_size()
    result["few"] = prune(plp.SNIP(), size, out, plp.Samples(total=size - 1))[2].masks.state_dict()
    for batches in (size - 1, size + 1):
        result["buffers", batches, False] = warm_up(size, out, batches)
        result["buffers", batches, True] = warm_up_synced(rank, size, batches)
    result["rank after rank"] = rank_after_rank(rank, size)
    result["gradual"] = pruned_while_training(module(), tiny_loader(64, 8), size, out)
    result["gradual, as in one process"] = as_in_one_process(size, out)
    broken = [(torch.full((2, 1, 8, 8), float("nan")), torch.zeros(2, dtype=torch.long))]
    result["loss"] = refusal(lambda: plp.score(module(), plp.SNIP(), broken if rank == 1 else share(rank, size), loss))
    result["drifted"] = prune_drifted(size, out).masks.state_dict()
    result["two samples"] = prune_own(OwnSamples(2), size, out).masks.state_dict()
    result["data"] = refusal(lambda: prune_own(OwnSamples(16, unreadable_on=1), size, out))
    result["backwards"] = plp.score(Backwards(), plp.SNIP(), block(rank, size), loss)
    result["step"] = refusal(lambda: plp.score(module(), plp.SNIP(), share(rank, size), only_on_rank_one))
    result["file"] = pruned_by_file(rank, size, out)
    result["resumed masks"] = resumed_apart(rank, size, out)
    with tampered(rank, 1):
        result["first masks"] = refusal(lambda: prune(plp.SNIP(), size, out))
    with tampered(rank, 3):
        result["later masks"] = pruned_while_training(module(), tiny_loader(64, 8), size, out)
    torch.save(result, out / f"rank{rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]))
