"""What `import pl_prune` and `python -m pl_prune --help` cost, in fresh interpreters, interleaved.

* `import pl_prune` beside `import lightning.pytorch`: limit 0.15 s more, the first use of a callback included;
* `python -m pl_prune --help`: limit 1.5 s of wall time, and neither torch nor lightning is imported.

    python benchmarks/startup.py [--repeats 7]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from statistics import median

from timing import interleaved, line, seconds

LIGHTNING = "import lightning.pytorch"
OURS = "import lightning.pytorch, pl_prune"


def run(*arguments: str) -> str:
    """Run the interpreter to its end and return what it wrote to stderr."""
    return subprocess.run([sys.executable, *arguments], check=True, capture_output=True, text=True).stderr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()

    times = interleaved(
        {
            "nothing": lambda: run("-c", ""),
            "import pl_prune": lambda: run("-c", "import pl_prune"),
            "python -m pl_prune --help": lambda: run("-m", "pl_prune", "--help"),
            LIGHTNING: lambda: run("-c", LIGHTNING),
            OURS: lambda: run("-c", OURS),
            f"{OURS}; pl_prune.PruneAtInit": lambda: run("-c", f"{OURS}; pl_prune.PruneAtInit"),
        },
        options.repeats,
    )
    base, plain = times[LIGHTNING], times["nothing"]
    print(f"Python {sys.version.split()[0]}, medians of {options.repeats} fresh interpreters\n")
    line(LIGHTNING, seconds(base), note=_range(base))
    for statement in (OURS, f"{OURS}; pl_prune.PruneAtInit"):
        more = [ours - theirs for ours, theirs in zip(times[statement], base, strict=True)]
        line(f"more for {statement}", f"{median(times[statement]) - median(base):+.3f} s", "0.15 s", _range(more))
    line(
        "more for import pl_prune alone, over an empty program",
        f"{median(times['import pl_prune']) - median(plain):+.3f} s",
        "0.15 s",
    )
    wall = times["python -m pl_prune --help"]
    line("python -m pl_prune --help", seconds(wall), "1.5 s", _range(wall))

    imported = {
        text.rpartition("|")[2].strip().partition(".")[0]
        for text in run("-X", "importtime", "-m", "pl_prune", "--help").splitlines()
    }
    heavy = sorted(imported & {"torch", "lightning", "numpy"})
    line("imported by it, of torch, lightning and numpy", ", ".join(heavy) or "none", "none")


def _range(values: list[float]) -> str:
    return f"rounds {min(values):.3f} .. {max(values):.3f} s"


if __name__ == "__main__":
    main()
