"""Random numbers that a seed and a parameter's name decide, whatever else is drawn."""

from __future__ import annotations

import hashlib

import torch

from pl_prune.core.types import plain


def generator_of(seed: int, name: str) -> torch.Generator:
    """Return a generator of its own for one parameter, the same in every process.

    Args:
        seed: The seed.
        name: The parameter's name; what `torch.compile` puts into it does not count.

    Returns:
        A generator on the CPU.
    """
    key = hashlib.sha256(f"{seed} {plain(name)}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:7], "big"))
