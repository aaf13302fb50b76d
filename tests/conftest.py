"""Fixtures that many tests share. Lightning is imported where it is used: the process that hands out tests needs none."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


@pytest.fixture
def fit(tmp_path: Any) -> Callable[..., tuple[LightningModule, Trainer]]:
    """Fit a module under callbacks and return it with its trainer."""
    from fake_module import TinyModule, tiny_loader
    from lightning.pytorch import Trainer, seed_everything

    def run(
        *callbacks: Any, module: LightningModule | None = None, ckpt_path: Any = None, seed: int = 3, **trainer: Any
    ):
        seed_everything(seed, verbose=False)
        module = TinyModule() if module is None else module
        settings: dict[str, Any] = {
            "max_epochs": 2,
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": tmp_path,
        }
        trainer_ = Trainer(**{**settings, **trainer}, callbacks=list(callbacks))
        trainer_.fit(module, tiny_loader(), tiny_loader(16), ckpt_path=ckpt_path)
        return module, trainer_

    return run


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """For fixtures of every scope, as sums are rounded by the number of threads; over tiny tensors threads only wait."""
    import torch

    torch.set_num_threads(1)
