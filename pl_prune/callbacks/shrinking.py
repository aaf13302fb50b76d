"""What a run of HESSO says and writes: progress, a warning about the learning rate, and the smaller network."""

from __future__ import annotations

from collections.abc import Iterable

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer

from pl_prune.callbacks.group_bridge import GroupBridge
from pl_prune.callbacks.report import run_folder
from pl_prune.core.groups import ParameterGroups
from pl_prune.core.masks import MaskSet
from pl_prune.core.samples import Samples
from pl_prune.core.select import Select
from pl_prune.optim.hesso import Hesso
from pl_prune.structure.manifest import save_shrunk
from pl_prune.structure.shrink import shrink


class Rates:
    """The highest learning rate known of, and a warning where pruning ends far below it."""

    def __init__(self) -> None:
        self.peak = 0.0

    def note(self, optimizers: Iterable[Optimizer]) -> None:
        """Look at the rates of now, and at those that schedulers start from or aim at.

        Args:
            optimizers: The optimizers.
        """
        seen = [float(g.get(k, 0)) for o in optimizers for g in o.param_groups for k in ("lr", "initial_lr", "max_lr")]
        self.peak = max([self.peak, *seen])

    def warn(self, optimizers: Iterable[Optimizer]) -> None:
        """Warn if the rates of now are below a tenth of the peak.

        Args:
            optimizers: The optimizers.
        """
        rate = max((float(group["lr"]) for o in optimizers for group in o.param_groups), default=0.0)
        if rate < 0.1 * self.peak:
            rank_zero_warn(
                f"HESSO: the learning rate is {rate:.2g} when the last unit is zero, and was or would be {self.peak:.2g} at its peak. "
                "What is left has to learn to do without the others: prune earlier, or let the schedule decay later."
            )


def group_sparsity(hesso: Hesso) -> float:
    """Return the fraction of units that are zero.

    Args:
        hesso: What knows them.

    Returns:
        In [0, 1).
    """
    return int((hesso.status == 2).sum()) / max(len(hesso.status), 1)


def is_logged(trainer: Trainer) -> bool:
    """Say whether loggers get the values of the optimizer step to come.

    Args:
        trainer: The trainer.

    Returns:
        Whether it is one of every `log_every_n_steps`.
    """
    every = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return bool(every) and (trainer.global_step + 1) % every == 0


def log_progress(pl_module: LightningModule, hesso: Hesso, left: tuple[int, int], held: float) -> None:
    """Log how far pruning is, to the progress bar and to all loggers.

    Args:
        pl_module: The module.
        hesso: What knows.
        left: Parameters and multiply-accumulates of the network without the units that are zero.
        held: Which share of all saliency units that are shrinking held at the last step that was logged.
    """
    values = {
        "units_shrinking": int((hesso.status == 1).sum()),
        "norm_left": hesso.norm_left(),
        "saliency_chosen": hesso.share,
        "saliency_shrinking": held if hesso.running else 0.0,
        "params": left[0],
        "macs": left[1],
    }
    pl_module.log("group_sparsity", group_sparsity(hesso), on_step=True, on_epoch=False, prog_bar=True)
    pl_module.log_dict({f"hesso/{k}": float(v) for k, v in values.items()}, on_step=True, on_epoch=False)


def write_small(trainer: Trainer, pl_module: LightningModule, masks: MaskSet, groups: ParameterGroups) -> None:
    """Slice the units that are zero off a copy, and write it as `small.safetensors` into the run's folder.

    Args:
        trainer: The trainer, at the end of a fit.
        pl_module: The module.
        masks: The masks in force.
        groups: The groups they are of.
    """
    bridge = GroupBridge(trainer, pl_module, Select(), Samples())
    inputs = bridge.example_inputs()
    if trainer.is_global_zero:
        with bridge.quiet():
            small = shrink(pl_module, masks, inputs, groups)
        path = save_shrunk(small, run_folder(trainer) / "small")
        rank_zero_info(f"The smaller network is in {str(path)!r}.")
