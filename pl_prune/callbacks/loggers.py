"""What loggers are given beside metrics: pictures, tables and settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from io import BytesIO
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

from pl_prune.core.types import PruneError
from pl_prune.report.canvas import Picture


def takes_pictures(trainer: Trainer) -> bool:
    """Say whether pictures can be drawn, and a logger takes them.

    Args:
        trainer: The trainer.

    Returns:
        False on every rank but the first, which draws nothing.
    """
    takes = any(isinstance(logger, (WandbLogger, TensorBoardLogger)) for logger in trainer.loggers)
    return takes and can_draw() and trainer.is_global_zero


def can_draw() -> bool:
    """Say whether matplotlib is installed.

    Returns:
        Whether.
    """
    return find_spec("matplotlib") is not None


def log_picture(trainer: Trainer, name: str, picture: Picture) -> None:
    """Log a picture as an image, to wandb and TensorBoard; other loggers get none.

    Args:
        trainer: The trainer.
        name: The key.
        picture: The picture.
    """
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            caption = f"{picture.title}. {picture.caption}"
            logger.log_image(name, [_image(picture)], trainer.global_step, caption=[caption])
        elif isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
            import numpy as np

            logger.experiment.add_image(name, np.asarray(_image(picture)), trainer.global_step, dataformats="HWC")


def log_table(trainer: Trainer, name: str, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Log a table, to wandb as one that sorts and to TensorBoard as text; other loggers get none.

    Args:
        trainer: The trainer.
        name: The key.
        head: A name for each column.
        rows: A cell for each column.
    """
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_table(name, list(head), [list(row) for row in rows], step=trainer.global_step)
        elif isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
            lines = [head, ["---"] * len(head), *rows]
            text = "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)
            logger.experiment.add_text(name, text, trainer.global_step)


def log_settings(trainer: Trainer, settings: Mapping[str, Any]) -> None:
    """Log the resolved configuration of a command line, flat: a run of a sweep keeps the values that the sweep gave it.

    Args:
        trainer: The trainer, of the first rank.
        settings: The configuration, as plain data.
    """
    named = flat(settings)
    for logger in trainer.loggers:
        run = logger.experiment if isinstance(logger, WandbLogger) else None
        given = flat(dict(run.config)) if run is not None and run.sweep_id else {}
        logger.log_hyperparams({name: value for name, value in named.items() if name not in given})


def flat(settings: Mapping[str, Any], under: str = "") -> dict[str, Any]:
    """Name every setting as a command line does: a class by its key alone, and its arguments right below.

    Args:
        settings: Nested settings, as YAML has them.
        under: The key that they stand under.

    Returns:
        Values by dotted name; lists as they are.

    >>> flat({"prune": {"class_path": "pl_prune.PruneAtInit", "init_args": {"sparsity": 0.9}}})
    {'prune': 'pl_prune.PruneAtInit', 'prune.sparsity': 0.9}
    """
    found: dict[str, Any] = {}
    for key, value in settings.items():
        inside = key in ("class_path", "init_args", "dict_kwargs")
        name = under if inside else f"{under}.{key}" if under else key
        found |= flat(value, name) if isinstance(value, Mapping) and (value or inside) else {name: value}
    return found


def refuse_wandb(error: Exception) -> None:
    """Say what to do where wandb does not take a run.

    Args:
        error: What ended the run.

    Raises:
        PruneError: If it came from wandb.
    """
    if type(error).__module__.partition(".")[0] == "wandb":
        raise PruneError(
            f"Expected Weights & Biases to take the run; found {type(error).__name__}: {error} Run `wandb login` for a key, or set "
            "WANDB_MODE=offline (kept in a folder, for `wandb sync`) or WANDB_MODE=disabled."
        ) from error


def _cell(value: object) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _image(picture: Picture) -> Any:
    from PIL import Image

    return Image.open(BytesIO(picture.png)).convert("RGB")
