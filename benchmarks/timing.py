"""What the benchmarks share: interleaved timing, peak memory, and a ratio printed beside its limit."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import torch

Times = dict[str, list[float]]


def interleaved(functions: dict[str, Callable[[], object]], repeats: int, device: str = "cpu") -> Times:
    """Time every function once per round, forwards and backwards in turn, after one round of warm-up; seconds."""
    times: Times = {name: [] for name in functions}
    for round_ in range(repeats + 1):
        for name in list(functions) if round_ % 2 else reversed(functions):
            start = now(device)
            functions[name]()
            if round_:
                times[name].append(now(device) - start)
            else:
                now(device)
    return times


def now(device: str = "cpu") -> float:
    """Seconds, once the device has done all it was asked to."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def ratio(times: Times, ours: str, peer: str, limit: str, what: str | None = None) -> None:
    """Print median over median; beside it the ratios of single rounds, whose spread is the noise, and of the best times."""
    rounds = sorted(a / b for a, b in zip(times[ours], times[peer], strict=True))
    line(
        what or f"{ours} / {peer}",
        f"{median(times[ours]) / median(times[peer]):.3f}",
        limit,
        f"rounds {rounds[0]:.3f} .. {rounds[-1]:.3f}, best {min(times[ours]) / min(times[peer]):.3f}; "
        f"{seconds(times[ours])} / {seconds(times[peer])}",
    )


def seconds(values: list[float]) -> str:
    return f"{median(values):.3f} s" if median(values) >= 1 else f"{median(values) * 1e3:.1f} ms"


def line(what: str, value: str, limit: str = "", note: str = "") -> None:
    print(f"{what:<66} {value:>9}   {'limit ' + limit if limit else '':<13} {note}".rstrip(), flush=True)


def in_fresh_process(function: Callable[..., int], *args: object) -> int:
    """Run a module-level function in a new interpreter: peak memory must not hide in what an earlier run had allocated."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def peak_bytes(function: Callable[[], object], device: str = "cpu") -> int:
    """Peak of memory over what was there before the call; on CPU, of resident memory as Linux counts it."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # free memory that malloc holds back would hide as much of the peak
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts from here
    before = _status("VmRSS")
    function()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(text.split()[1]) * 1024 for text in lines if text.startswith(key))
