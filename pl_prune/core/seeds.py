"""Random numbers that a seed and a parameter's name decide, whatever else is drawn."""

from __future__ import annotations

import hashlib

import torch

from pl_prune.core.types import plain


def seed_of(seed: int, name: str) -> int:
    """Return a seed of its own for one purpose, the same in every process.

    Args:
        seed: The seed.
        name: The parameter's name, or another word; what `torch.compile` puts into it does not count.

    Returns:
        56 bits.
    """
    return int.from_bytes(hashlib.sha256(f"{seed} {plain(name)}".encode()).digest()[:7], "big")


def generator_of(seed: int, name: str) -> torch.Generator:
    """Return a generator of its own for one parameter, the same in every process.

    Args:
        seed: The seed.
        name: The parameter's name; what `torch.compile` puts into it does not count.

    Returns:
        A generator on the CPU.
    """
    return torch.Generator().manual_seed(seed_of(seed, name))
