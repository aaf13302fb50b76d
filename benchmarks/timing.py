"""What the benchmarks share: options, interleaved timing, peak memory, and a ratio printed beside its limit.

To be imported before torch: OpenMP threads that wait for each other sleep here instead of spinning (OMP_WAIT_POLICY in
the environment overrides it). On idle cores that costs code of many short operations about half as much again; on cores
that other programs use too, spinning makes such code ten times slower, and one long single-threaded operation not at all.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
import torch

Times = dict[str, list[float]]
_clock = time.perf_counter


def parse(doc: str, repeats: int, **more: int) -> argparse.Namespace:
    """Read --device, --repeats, --cpu-time and further integer options, given by their defaults."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cpu-time", action="store_true", help="CPU time of one thread: for a machine that others use")
    for name, default in {"repeats": repeats, **more}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    options = parser.parse_args()
    if options.cpu_time:
        global _clock
        _clock = time.process_time
        torch.set_num_threads(1)
    clock = f"CPU time of {torch.get_num_threads()}" if options.cpu_time else f"wall time, {torch.get_num_threads()}"
    print(f"torch {torch.__version__} on {options.device}, {clock} thread(s), {options.repeats} interleaved rounds")
    return options


def now(device: str = "cpu") -> float:
    """Seconds, once the device has done all it was asked to."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return _clock()


def interleaved(functions: dict[str, Callable[[], object]], repeats: int, device: str = "cpu") -> Times:
    """Time every function once per round, forwards and backwards in turn, after one round of warm-up; seconds."""
    times: Times = {name: [] for name in functions}
    for round_ in range(repeats + 1):
        for name in list(functions) if round_ % 2 else reversed(functions):
            start = now(device)
            functions[name]()
            taken = now(device) - start
            if round_:
                times[name].append(taken)
    return times


def ratio(times: Times, ours: str, peer: str, limit: str = "", what: str = "") -> None:
    """Print median over median; beside it the ratios of single rounds, whose spread is the noise, and of the best times."""
    rounds = sorted(a / b for a, b in zip(times[ours], times[peer], strict=True))
    line(
        what or f"{ours} / {peer}",
        f"{median(times[ours]) / median(times[peer]):.3g}",
        limit,
        f"{seconds(median(times[ours]))} / {seconds(median(times[peer]))}; "
        f"rounds {rounds[0]:.3g} .. {rounds[-1]:.3g}, best {min(times[ours]) / min(times[peer]):.3g}",
    )


def seconds(value: float) -> str:
    return f"{value:.3f} s" if abs(value) >= 1 else f"{value * 1e3:.1f} ms"


def line(what: str, value: str, limit: str = "", note: str = "") -> None:
    print(f"{what:<68} {value:>8}  {'limit ' + limit if limit else '':<14} {note}".rstrip(), flush=True)


def in_fresh_process(function: Callable[..., int], *args: object) -> int:
    """Run a module-level function in a new interpreter: its peak must not hide in memory that is held already."""
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


def peak_tensors(function: Callable[[], object]) -> int:
    """Peak of what torch has allocated on the CPU during a call, in bytes: where resident memory is mostly that of libraries."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = profiler.profiler.kineto_results.events()
    held = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(text.split()[1]) * 1024 for text in lines if text.startswith(key))
