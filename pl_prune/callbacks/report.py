"""`SparsityReport`: what a run's masks left, said at the start and written at the end."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from pl_prune.callbacks.base import PruningCallback, pruning_callbacks
from pl_prune.callbacks.bridge import Bridge
from pl_prune.callbacks.loggers import can_draw, log_picture, log_table, takes_pictures
from pl_prune.callbacks.refusals import refuse_orphans, refuse_other_lightning
from pl_prune.core.batch import batch_size
from pl_prune.core.masks import MaskSet
from pl_prune.core.samples import Samples
from pl_prune.core.select import Select
from pl_prune.core.types import PruneError
from pl_prune.report.canvas import Picture
from pl_prune.report.collapse import find_path
from pl_prune.report.cost import measure_cost
from pl_prune.report.curves import density_figure
from pl_prune.report.latency import Latency, measure_latency
from pl_prune.report.sparsity import layer_sparsity
from pl_prune.report.table import PruningReport
from pl_prune.report.units import Units


class SparsityReport(Callback):
    """Report every layer, the whole model's parameters and MACs, and whether a path is left from input to output.

    The table is shown when training starts, and at the end if masks have changed since; then the report, with the run's
    last metrics, goes to `report.json`, its layers to `layers.csv`, and a picture of their density, where there is a logger, to
    `density.png`. What is said of the masks is checked against the zeros measured in the weights. Scalars go to the loggers as
    `sparsity/...`; wandb and TensorBoard get table and picture too, whenever the table is shown. Pictures need the extra
    `report`, and are left out without it. Without a pruning callback the dense network is reported.

    Args:
        folder: Where `report.json` goes; None: the run's folder (`save_dir/name/version` of the logger), else the
            trainer's
            root folder.
        select: Which parameters to list when nothing prunes.
        latency: Whether to time the forward pass with its loss at the end, on two samples, masked and dense in turn; 46
            passes. Masks alone do not speed it up, and this shows it.
    """

    def __init__(self, folder: str | None = None, select: Select = Select(), latency: bool = False) -> None:
        self.folder = folder
        self.select = select
        self.latency = latency
        self._shown = 0.0

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse to resume when the checkpoint holds masks that no callback takes.

        Args:
            trainer: The trainer.
            pl_module: The module.
            checkpoint: The whole checkpoint.
        """
        refuse_orphans(trainer, checkpoint, {cb.state_key for cb in pruning_callbacks(trainer)})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the table.

        Args:
            trainer: The trainer.
            pl_module: The module.
        """
        refuse_other_lightning(trainer)
        report = make_report(trainer, pl_module, self.select)
        self._shown = report.sparsity
        _show(trainer, report)
        scalars = {
            "sparsity/prunable": report.sparsity,
            "sparsity/model": 1 - report.cost.params_kept / report.cost.params,
            "sparsity/collapsed_layers": float(len(report.collapsed())),
        }
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write `report.json`, and show the table again if the masks have changed.

        Args:
            trainer: The trainer.
            pl_module: The module.
        """
        report = make_report(trainer, pl_module, self.select)
        if report.sparsity != self._shown:
            _show(trainer, report)
        content = report.to_dict()
        if self.latency:
            content["latency"] = asdict(_latency(trainer, pl_module, self.select))
        if trainer.is_global_zero and not trainer.fast_dev_run:
            folder = Path(self.folder) if self.folder else run_folder(trainer)
            folder.mkdir(parents=True, exist_ok=True)
            part = folder / "report.json.part"
            part.write_text(json.dumps(content, indent=1))
            part.replace(folder / "report.json")
            with (folder / "layers.csv").open("w", newline="") as file:
                csv.writer(file).writerows(_layer_table(report))
            if trainer.loggers and can_draw():
                (folder / "density.png").write_bytes(_picture(report).png)


def _show(trainer: Trainer, report: PruningReport) -> None:
    """Show the table, here and in the loggers."""
    rank_zero_info("\n" + report.text())
    head, *rows = _layer_table(report)
    log_table(trainer, "sparsity/layers", head, rows)
    if takes_pictures(trainer):
        log_picture(trainer, "sparsity/density", _picture(report))


def _layer_table(report: PruningReport) -> list[list[Any]]:
    """Write what is left of every layer, or of its units where those have been sliced off, in plain numbers under a head."""
    if (units := _sliced(report)) is not None:
        return [["name", "kept", "total"], *([name, *counts] for name, counts in units.items())]
    layers = [{**layer, "shape": "x".join(map(str, layer["shape"]))} for layer in report.to_dict()["layers"]]
    return [list(layers[0]), *(list(layer.values()) for layer in layers)] if layers else [["name"]]


def _picture(report: PruningReport) -> Picture:
    if (units := _sliced(report)) is not None:
        return density_figure(units, "units")
    return density_figure({layer.name: (layer.kept, layer.total) for layer in report.layers}, "entries")


def _sliced(report: PruningReport) -> dict[str, tuple[int, int]] | None:
    """Return the units of a network that others have been sliced off from, and nothing of which is masked."""
    return report.units.layers if report.units and report.units.sliced and not report.sparsity else None


def run_folder(trainer: Trainer) -> Path:
    """Return the run's own folder, by the rule by which `ModelCheckpoint` finds it; loggers' `log_dir` may be shared by runs.

    Args:
        trainer: The trainer.

    Returns:
        `save_dir/name/version` of its logger, or its root folder without one.
    """
    logger = trainer.logger
    if logger is None:
        return Path(trainer.default_root_dir)
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return Path(logger.save_dir or trainer.default_root_dir) / str(logger.name) / version


def make_report(trainer: Trainer, pl_module: LightningModule, select: Select) -> PruningReport:
    """Report the network as the trainer's pruning callbacks left it.

    Args:
        trainer: A trainer in a fit.
        pl_module: Its module.
        select: Which parameters to list when nothing prunes.

    Returns:
        The report.

    Raises:
        PruneError: If a pruned weight is not zero.
    """
    bridge = Bridge(trainer, pl_module, select, Samples())
    pruning = [cb for cb in pruning_callbacks(trainer) if cb.masks is not None]
    bridge.find_loader()
    with bridge.quiet():
        example = bridge.example()
        masks = _masks(trainer) or MaskSet.ones_like(bridge.prunable())
        live = dict(pl_module.named_parameters())
        measured = MaskSet.from_zeros({name: live[name] for name in masks})
        wrong = [name for name in masks if bool((measured[name] & ~masks[name].to(live[name].device)).any())]
        if wrong:
            raise PruneError(
                f"Expected zeros wherever the masks prune; found other weights in {', '.join(wrong[:5])}. Something writes weights "
                "outside the optimizers: mask them there, or leave that layer dense with `select.exclude`."
            )
        cost = measure_cost(pl_module, masks, lambda: bridge.loss(pl_module, example), batch_size(example))
        units = next((found for cb in pruning if (found := units_of(cb)) is not None), None)
        if units is not None and units.sliced:  # the whole network is what there was before
            cost = replace(cost, params=units.cost.params, macs=units.cost.macs)
        return PruningReport(
            method="; ".join(cb.method for cb in pruning) or "dense",
            layers=layer_sparsity(masks),
            cost=cost,
            path=find_path(pl_module, masks, bridge.loss, example),
            zeros=sum(total - kept for kept, total in measured.counts().values()),
            metrics={name: float(value) for name, value in sorted(trainer.callback_metrics.items())},
            units=units,
        )


def units_of(callback: PruningCallback) -> Units | None:
    """Count what a callback has left of whole units.

    Args:
        callback: The callback.

    Returns:
        The counts; None where it does not prune units.
    """
    return None if callback.units is None else Units.of(*callback.units, sliced=not callback.masks)


def _masks(trainer: Trainer) -> MaskSet:
    masks = MaskSet({})
    for callback in pruning_callbacks(trainer):
        masks = masks if callback.masks is None else masks.intersect(callback.masks)
    return masks


def _latency(trainer: Trainer, pl_module: LightningModule, select: Select) -> Latency:
    """Time the network on every rank, as they run side by side in training too."""
    bridge = Bridge(trainer, pl_module, select, Samples())
    bridge.find_loader()
    with bridge.quiet():
        example = bridge.example()
        return measure_latency(pl_module, _masks(trainer), lambda: bridge.loss(pl_module, example), batch_size(example))
