"""`EpochShuffle`: an order of samples that a resumed run repeats."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sized

import torch
from torch.utils.data import Sampler


class EpochShuffle(Sampler[int]):
    """Shuffle anew in every epoch, by the run's seed, a seed of its own and the epoch's number alone.

    Runs of other seeds (Lightning's `seed_everything`) see other orders, so that a spread over seeds has all of it.
    Lightning calls `set_epoch`, so that a run resumed at an epoch's end sees the same order as an uninterrupted one.

    Args:
        data: What to shuffle.
        seed: Another order under the same seed of the run.
    """

    def __init__(self, data: Sized, seed: int = 0) -> None:
        self.data = data
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next.

        Args:
            epoch: Its number, from 0.
        """
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        run = int(os.environ.get("PL_GLOBAL_SEED", 0))
        generator = torch.Generator().manual_seed((run * 1_009 + self.seed) * 1_000_003 + self.epoch)
        return iter(torch.randperm(len(self.data), generator=generator).tolist())

    def __len__(self) -> int:
        return len(self.data)
