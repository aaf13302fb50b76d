"""Eight cases in which pruning goes wrong, through Lightning's `ModelPruning` and through pl_prune, as a Markdown table.

Both get the same module, data, optimizer, seed and number of epochs. Both are asked to prune half once, after the first
epoch and by magnitude, and to set what is left back to its initial values (the default of `ModelPruning`):

* `ModelPruning("l1_unstructured", amount=0.5, apply_pruning=first_epoch)`, and
* `pl_prune.GradualPruning(Magnitude(), OneShot(0.5, start=BATCHES), rewind_to=0)`, what one would migrate to.

For pruning in every epoch these are `apply_pruning=True` and `Cubic(0.5, end=2 * BATCHES, every=BATCHES)`.
Numbers are fractions of zeros among what a tool prunes by default: weights and biases for `ModelPruning`, the weights
without the output layer for pl_prune. Where a setting of `ModelPruning` or the order of callbacks decides, both are shown.

Under DDP two processes train on different samples, with one seed or, as where augmentation is to differ, with one each,
and prune at random and by what else is named.

    python benchmarks/beside_model_pruning.py
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import lightning
import torch
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, ModelPruning, StochasticWeightAveraging
from torch import Tensor, nn
from torch.multiprocessing import start_processes
from torch.utils.data import DataLoader, TensorDataset

import pl_prune as plp

ASKED = 0.5
BATCHES = 4  # optimizer steps in an epoch
SEED = 1
LIGHTNING, OURS = "Lightning's ModelPruning", "pl_prune"
Found = dict[str, Any]  # under which circumstances -> a fraction, or what happened
Make = Callable[[], Callback]


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-2)


class NetWithMask(Net):
    """The module of a user who has a mask of his own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("attention_mask", torch.ones(4, 4).tril())


class SeedPerRank(Callback):
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        torch.manual_seed(SEED + trainer.global_rank)


def first_epoch(epoch: int) -> bool:
    return epoch == 0


def model_pruning(**settings: Any) -> ModelPruning:
    defaults = {"pruning_fn": "l1_unstructured", "amount": ASKED, "apply_pruning": first_epoch}
    return ModelPruning(**{**defaults, **settings})


def gradual(**settings: Any) -> plp.GradualPruning:
    defaults = {"criterion": plp.Magnitude(), "schedule": plp.OneShot(ASKED, start=BATCHES), "rewind_to": 0}
    return plp.GradualPruning(**{**defaults, **settings})


def loader(ranks: int) -> DataLoader:
    n = 16 * BATCHES * ranks
    inputs = torch.randn(n, 16, generator=torch.Generator().manual_seed(SEED))
    return DataLoader(TensorDataset(inputs, torch.arange(n) % 4), batch_size=16)


def fit(
    *callbacks: Callback,
    folder: Path,
    epochs: int = 3,
    net: type[Net] = Net,
    ranks: int = 1,
    ckpt_path: Path | None = None,
) -> Net:
    seed_everything(SEED, verbose=False)
    module = net()
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        logger=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=list(callbacks),
    )
    trainer.fit(module, loader(ranks), ckpt_path=ckpt_path)
    return module


def fit_and_save(pruner: Callback, folder: Path, net: type[Net] = Net) -> tuple[Net, dict[str, Tensor]]:
    """Return the module after two epochs, and the `state_dict` of the checkpoint that the last of them ends with."""
    module = fit(pruner, ModelCheckpoint(folder, "last"), folder=folder, net=net, epochs=2)
    return module, torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]


def prunable(pruner: Callback) -> list[str]:
    if isinstance(pruner, plp.GradualPruning):
        return list(pruner.masks)
    return [name for name, _ in Net().named_parameters() if name.endswith(tuple(pruner._parameter_names))]


def zeros(pruner: Callback, module: Net) -> dict[str, Tensor]:
    return {name: module.get_parameter(name).detach() == 0 for name in prunable(pruner)}


def fraction(masks: Iterable[Tensor]) -> float:
    return torch.cat([mask.flatten() for mask in masks]).double().mean().item()


def sparsity(pruner: Callback, **settings: Any) -> float:
    """Fit, and return the fraction of zeros in the final model."""
    return fraction(zeros(pruner, fit(pruner, **settings)).values())


def outcome(action: Callable[[], Any]) -> Any:
    """What an action returns, or how it fails."""
    try:
        return action()
    except plp.PruneError as error:
        return f"refused: {one_line(error)}"
    except Exception as error:
        return f"{type(error).__name__}: {one_line(error)}"


def one_line(error: Exception, most: int = 90) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= most else text[:most] + "..."


def resume(make: Make, folder: Path) -> Found:
    first = make()
    _, saved = fit_and_save(first, folder)
    return {
        "in the checkpoint": fraction(saved[name] == 0 for name in prunable(first)),
        "after the resume": outcome(lambda: sparsity(make(), folder=folder, ckpt_path=folder / "last.ckpt")),
        "without a resume": sparsity(make(), folder=folder),
    }


def load_strictly(make: Make, folder: Path) -> Found:
    _, saved = fit_and_save(make(), folder)
    Net().load_state_dict(saved, strict=True)
    return {"": "loads"}


def average(averaging: Callable[[], Callback], make: Make, folder: Path) -> Found:
    def run(step: int) -> float:
        callbacks = [make(), averaging()]
        return fraction(zeros(callbacks[0], fit(*callbacks[::step], folder=folder)).values())

    return {"pruner first": outcome(lambda: run(1)), "average first": outcome(lambda: run(-1))}


def keep_a_buffer(make: Make, folder: Path) -> Found:
    module, saved = fit_and_save(make(), folder, NetWithMask)
    return {"in the module": buffer_in(module.state_dict()), "in the checkpoint": buffer_in(saved)}


def buffer_in(state: dict[str, Tensor]) -> str:
    if "attention_mask" not in state:
        return "missing"
    return "unchanged" if torch.equal(state["attention_mask"], NetWithMask().attention_mask) else "changed"


def three_epochs(make: Make, folder: Path) -> Found:
    return {"": sparsity(make(), folder=folder)}


def biases(make: Make, folder: Path) -> Found:
    def at_zero(module: Net) -> float:
        return fraction(p.detach() == 0 for name, p in module.named_parameters() if name.endswith("bias"))

    seed_everything(SEED, verbose=False)
    return {"at first": at_zero(Net()), "at the end": at_zero(fit(make(), folder=folder))}


def on_every_rank() -> dict[str, dict[str, list[Callback]]]:
    """What two processes fit, one after the other; the pruner comes first."""
    random = partial(model_pruning, pruning_fn="random_unstructured")
    return {
        LIGHTNING: {
            "random (one seed)": [random()],
            "random (a seed per rank)": [random(), SeedPerRank()],
            "magnitude (a seed per rank)": [model_pruning(), SeedPerRank()],
        },
        OURS: {
            "random (one seed)": [gradual(criterion=plp.Random())],
            "random (a seed per rank)": [gradual(criterion=plp.Random()), SeedPerRank()],
            "magnitude (a seed per rank)": [gradual(), SeedPerRank()],
            "SNIP (a seed per rank)": [gradual(criterion=plp.SNIP()), SeedPerRank()],
        },
    }


def run_rank(rank: int, folder: Path) -> None:
    """Fit all of them as one of two processes, and save where the zeros are."""
    os.environ["LOCAL_RANK"] = str(rank)  # tells Lightning that all processes have been started
    result = {
        tool: {what: zeros(callbacks[0], fit(*callbacks, folder=folder, ranks=2)) for what, callbacks in runs.items()}
        for tool, runs in on_every_rank().items()
    }
    torch.save(result, folder / f"rank{rank}.pt")


def run_ranks(folder: Path) -> None:
    """Fork both from a process that has imported everything, which takes longer than all the fits."""
    os.environ["MASTER_PORT"] = str(find_free_network_port())
    start_processes(run_rank, (folder,), nprocs=2, start_method="fork")


def two_ranks() -> dict[str, Found]:
    """Start both processes, and return for each tool the fraction of entries that are zero on one rank alone."""
    with TemporaryDirectory() as folder:
        env = {**os.environ, "PYTHONWARNINGS": "ignore"}
        command = [sys.executable, __file__, folder]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240, check=False)
        if done.returncode:
            raise RuntimeError(f"two ranks failed: {done.stderr[-3000:]}")
        one, other = (torch.load(Path(folder) / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    return {
        tool: {
            what: fraction(mask ^ other[tool][what][name] for name, mask in masks.items())
            for what, masks in runs.items()
        }
        for tool, runs in one.items()
    }


class Case(NamedTuple):
    measure: Callable[[Make, Path], Found]
    lightning: dict[str, Make]  # by setting
    ours: Make = gradual


def cases() -> dict[str, Case]:
    default: dict[str, Make] = {"": model_pruning}
    permanent = {
        f"make_pruning_permanent={value}": partial(model_pruning, make_pruning_permanent=value)
        for value in (True, False)
    }
    selections = {"": model_pruning, "weights alone": partial(model_pruning, parameter_names=["weight"])}
    always = {"": partial(model_pruning, apply_pruning=True)}
    cubic = partial(gradual, schedule=plp.Cubic(ASKED, end=2 * BATCHES, every=BATCHES))
    swa = partial(StochasticWeightAveraging, 1e-2, swa_epoch_start=1)
    return {
        "zeros after `fit(ckpt_path=...)`": Case(resume, default),
        "strict load of the checkpoint into the plain module": Case(load_strictly, permanent),
        "zeros of the final model under `EMAWeightAveraging`": Case(partial(average, EMAWeightAveraging), selections),
        "zeros of the final model under `StochasticWeightAveraging`": Case(partial(average, swa), selections),
        "the module's own buffer `attention_mask`": Case(keep_a_buffer, permanent),
        f"zeros after 3 epochs of pruning, {ASKED} asked for": Case(three_epochs, always, cubic),
        "zeros among the biases": Case(biases, default),
    }


def measure_all() -> dict[str, dict[str, Found]]:
    """What was found, by title of the case and by tool."""
    with ThreadPoolExecutor(1) as beside:
        ranks = beside.submit(two_ranks)
        found = {
            title: {
                LIGHTNING: by_setting(case.measure, case.lightning),
                OURS: by_setting(case.measure, {"": case.ours}),
            }
            for title, case in cases().items()
        }
        return {**found, "entries that are zero on one of two DDP ranks alone": ranks.result()}


def by_setting(measure: Callable[[Make, Path], Found], settings: dict[str, Make]) -> Found:
    found: Found = {}
    for setting, make in settings.items():
        with TemporaryDirectory() as folder:
            result = outcome(lambda make=make, folder=folder: measure(make, Path(folder)))
        result = result if isinstance(result, dict) else {"": result}
        brackets = f"({setting})" if setting else ""
        found.update({f"{where} {brackets}".strip(): value for where, value in result.items()})
    return found


def table(found: dict[str, dict[str, Found]]) -> list[str]:
    rows = [["case", LIGHTNING, OURS], ["---"] * 3]
    rows += [[title, cell(tools[LIGHTNING]), cell(tools[OURS])] for title, tools in found.items()]
    return [f"| {' | '.join(row)} |" for row in rows]


def cell(found: Found) -> str:
    """Name the circumstances of each result once."""
    where: dict[str, list[str]] = {}
    for circumstances, value in found.items():
        text = f"{value:.3f}" if isinstance(value, float) else str(value).replace("|", "\\|")
        where.setdefault(text, []).append(circumstances)
    return "; ".join(f"{', '.join(names)}: {text}".removeprefix(": ") for text, names in where.items())


def main() -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    if len(sys.argv) > 1:
        run_ranks(Path(sys.argv[1]))
        return
    rows = table(measure_all())
    print(f"lightning {lightning.__version__}, torch {torch.__version__}; {ASKED} asked for; numbers are fractions\n")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
