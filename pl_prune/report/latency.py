"""How long a network takes as it is, and how long with nothing pruned; how long several take."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor, nn

from pl_prune.core.masks import MaskSet
from pl_prune.core.sandbox import untouched

_WARM_UP = 3


@dataclass(frozen=True)
class Latency:
    """Seconds of one forward pass, measured in turn with and without pruned weights.

    Args:
        dense: Quartiles with the pruned weights filled in.
        masked: Quartiles of the network as it is.
        batch: Samples in the batch.
        threads: CPU threads of torch.
        device: What it ran on.
        repeats: Passes of each.
    """

    dense: tuple[float, float, float]
    masked: tuple[float, float, float]
    batch: int
    threads: int
    device: str
    repeats: int


def measure_latency(
    model: nn.Module, masks: MaskSet, run: Callable[[], object], batch: int, repeats: int = 20
) -> Latency:
    """Time forward passes, dense and masked in turn, so that a busy machine slows both alike.

    Zeros do not speed up a dense kernel: expect the same time, unless channels were removed in earnest.

    Args:
        model: The network; left as it was.
        masks: What is kept.
        run: Executes it on one batch.
        batch: Samples in that batch.
        repeats: Passes of each kind, after three of warm-up.

    Returns:
        Median and quartiles, and where they were measured.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    times: dict[bool, list[float]] = {True: [], False: []}
    with untouched(model), torch.no_grad(), _pruned(model, masks) as pruned:
        for number in range(_WARM_UP + repeats):
            for dense in (True, False) if number % 2 else (False, True):
                for p, gone, size in pruned:  # written both times: neither finds a warmer cache
                    p.masked_fill_(gone, size if dense else 0.0)
                _wait(device)
                start = perf_counter()
                run()
                _wait(device)
                times[dense].append(perf_counter() - start)
    filled, masked = (_quartiles(times[kind][_WARM_UP:]) for kind in (True, False))
    return Latency(filled, masked, batch, torch.get_num_threads(), device_name(device), repeats)


def time_in_turn(
    runs: Mapping[str, Callable[[], object]], device: torch.device, repeats: int = 20
) -> dict[str, tuple[float, float, float]]:
    """Time several things in turn, so that a busy machine slows all alike.

    Args:
        runs: What to time, by name.
        device: Where it computes.
        repeats: Runs of each, after three of warm-up.

    Returns:
        Quartiles of the seconds of one run, by name.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(_WARM_UP + repeats):
        for name in list(runs)[:: -1 if number % 2 else 1]:
            _wait(device)
            start = perf_counter()
            runs[name]()
            _wait(device)
            times[name].append(perf_counter() - start)
    return {name: _quartiles(found[_WARM_UP:]) for name, found in times.items()}


@contextmanager
def _pruned(model: nn.Module, masks: MaskSet) -> Iterator[list[tuple[Tensor, Tensor, float]]]:
    """Give the pruned parameters, what is gone of them and how large their weights are; put them back afterwards."""
    params = [(p, ~masks[name].to(p.device)) for name, p in model.named_parameters() if name in masks]
    before = [p.detach().clone() for p, _ in params]
    try:
        yield [(p, gone, float(p.square().mean().sqrt()) or 1.0) for p, gone in params]
    finally:
        for (p, _), value in zip(params, before, strict=True):
            p.copy_(value)


def _quartiles(times: list[float]) -> tuple[float, float, float]:
    low, middle, high = (
        torch.tensor(times, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
    )
    return low, middle, high


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    """Name a processor, as Linux does.

    Args:
        device: Of torch.

    Returns:
        Its make, and of a CPU the number of cores.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo") as file:
            models = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        models = []
    return f"{device.type} ({models[0] if models else 'of unknown make'}, {os.cpu_count()} cores)"
