"""`robust_accuracy`: an evaluation under attack that cannot be misused, in chunks that outlive an interruption."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor, nn

from pl_prune.adversarial.chunk import Judge, Protocol, unseen
from pl_prune.adversarial.statistics import RobustAccuracy, read_flags
from pl_prune.adversarial.suite import attack_version
from pl_prune.core import sync
from pl_prune.core.types import PruneError

Track = Callable[[Iterable[Any], str], Iterable[Any]]


def robust_accuracy(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float = 8 / 255,
    preset: Literal["fast", "standard", "untargeted", "pgd"] = "fast",
    seed: int = 0,
    norm: Literal["linf", "l2"] = "linf",
    chunk_size: int = 250,
    folder: str | Path | None = None,
) -> RobustAccuracy:
    """Measure accuracy without and under attack.

    The model is attacked in evaluation mode and in its own precision, without autocast, and is as before at the end. In a
    distributed job the ranks share the chunks, and every rank gets the whole result.

    Args:
        model: Maps images to logits; its normalisation is inside (`NormalizedModel`).
        x: Images (N, C, H, W) in [0, 1], the same on every rank.
        y: Labels (N,).
        eps: Radius of the attacks; 0 for no attack.
        preset: Which attacks: see `Protocol`.
        seed: Of the attacks' random starts.
        norm: "linf" or "l2".
        chunk_size: Images attacked at a time.
        folder: Keeps one file for each finished chunk, so that the same call goes on after an interruption; other models and
            settings may share it.

    Returns:
        Accuracies with their intervals.
    """
    return evaluate(
        model, Protocol(eps, preset, norm, seed, chunk_size), len(x), lambda part: (x[part], y[part]), folder
    )


def evaluate(
    model: nn.Module,
    protocol: Protocol,
    count: int,
    read: Callable[[slice], tuple[Any, Any]],
    folder: str | Path | None = None,
    track: Track | None = None,
) -> RobustAccuracy:
    """Measure accuracy on images that are read chunk by chunk.

    Args:
        model: Maps images to logits.
        protocol: How.
        count: Number of images.
        read: Returns images and labels of a slice of them.
        folder: Keeps one file for each finished chunk.
        track: Wraps an iterable and a label, to show progress.

    Returns:
        The same on every rank.

    Raises:
        PruneError: If there is no image, or model, images, labels or files cannot be used.
    """
    if not count:
        raise PruneError("Expected images to attack; found none. Pass at least one, with its label.")
    settings: dict[str, Any] = {
        **asdict(protocol),
        "attack": attack_version(protocol.preset) if protocol.eps else "none",
    }
    size = protocol.chunk_size
    slices = [slice(start, min(start + size, count)) for start in range(0, count, size)]
    rank, ranks = sync.rank_and_size()

    def chunks() -> list[tuple[int, dict[str, Any]]]:
        with unseen(model) as run:
            judge = Judge(model, run, protocol, settings, Path(folder) if folder else None, count)
            mine: Iterable[int] = range(rank, len(slices), ranks)
            return [(i, judge(i, *read(slices[i]))) for i in (track(mine, "chunks under attack") if track else mine)]

    found = sync.agreed(chunks)
    if ranks > 1:
        shares: list[Any] = [None] * ranks
        dist.all_gather_object(shares, found)
        found = [chunk for share in shares for chunk in share]
    ordered = [chunk for _, chunk in sorted(found, key=lambda pair: pair[0])]
    images = hashlib.sha256("".join(chunk["images"] for chunk in ordered).encode()).hexdigest()
    names = list(ordered[0]["survived"])
    return RobustAccuracy(
        settings,
        images,
        _joined(chunk["correct"] for chunk in ordered),
        {name: _joined(chunk["survived"][name] for chunk in ordered) for name in names},
    )


def _joined(parts: Iterable[str]) -> tuple[bool, ...]:
    return read_flags("".join(parts))
