"""What `import pl_prune` and `python -m pl_prune --help` cost, in fresh interpreters, interleaved.

* `import pl_prune` after `import lightning.pytorch`: limit 0.15 s more, the first use of a callback included. The
  difference of two processes is of the size of a busy machine's noise; the same is therefore timed inside one, too;
* `python -m pl_prune --help`: limit 1.5 s of wall time, and neither torch nor lightning is imported.

    python benchmarks/startup.py [--repeats 7]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from statistics import median

import timing

LIGHTNING = "import lightning.pytorch"
OURS = f"{LIGHTNING}, pl_prune"
CALLBACK = f"{OURS}; pl_prune.PruneAtInit"
HELP = "python -m pl_prune --help"
INSIDE = f"{LIGHTNING}; import time; t = time.perf_counter(); import pl_prune; {{}}; print(time.perf_counter() - t)"


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], check=True, capture_output=True, text=True)


def inside(use: str, repeats: int) -> list[float]:
    return [float(python("-c", INSIDE.format(use)).stdout) for _ in range(repeats)]


def show(what: str, value: float, rounds: list[float], limit: str = "") -> None:
    timing.line(
        what,
        timing.seconds(value),
        limit,
        f"rounds {timing.seconds(min(rounds))} .. {timing.seconds(max(rounds))}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    print(f"Python {sys.version.split()[0]}, medians of {options.repeats} fresh interpreters\n")

    programs = {statement: ("-c", statement) for statement in ("pass", "import pl_prune", LIGHTNING, OURS, CALLBACK)}
    programs[HELP] = ("-m", "pl_prune", "--help")
    times = timing.interleaved(
        {name: lambda p=program: python(*p) for name, program in programs.items()}, options.repeats
    )
    for base, ours in (("pass", ["import pl_prune"]), (LIGHTNING, [OURS, CALLBACK])):
        show(base, median(times[base]), times[base])
        for more in ours:
            difference = [a - b for a, b in zip(times[more], times[base], strict=True)]
            show(f"  more: {more}", median(times[more]) - median(times[base]), difference, "0.15 s")
    for use in ("pass", "pl_prune.PruneAtInit"):
        rounds = inside(use, options.repeats)
        show(f"after it, in its process: import pl_prune; {use}", median(rounds), rounds, "0.15 s")
    show(HELP, median(times[HELP]), times[HELP], "1.5 s")

    trace = python("-X", "importtime", *programs[HELP]).stderr.splitlines()
    modules = {text.rpartition("|")[2].strip().partition(".")[0] for text in trace}
    timing.line("imported by it, of torch and lightning", ", ".join(modules & {"torch", "lightning"}) or "none", "none")


if __name__ == "__main__":
    main()
