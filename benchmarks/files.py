"""Files of scores and masks, at the size of a ResNet-50 (25.5 million scores).

* `pl-prune mask` for ten sparsities over the same for one, from start to exit: limit 1.5;
* what a record of scores adds to a run (hash of the weights, scores written): limit 2 s;
* ten nested masks over one in memory, reading and writing, and `torch.sort` of the scores: for the reader;
* peak memory of reading, beyond nothing, in copies of the scores: limit 2.

    python benchmarks/files.py [--repeats 3] [--cpu-time]
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import timing
import torch
from selection import TEN, flatten, make_scores

import pl_prune
from pl_prune.core.archive import hash_tensors
from pl_prune.core.budgets import nested_masks


def command(file: Path, *sparsities: float) -> None:
    out = file.parent / "masks"
    words = ["mask", "--scores", str(file), "--out-dir", str(out), "--sparsity", *map(str, sparsities)]
    subprocess.run([sys.executable, "-m", "pl_prune", *words], check=True, stdout=subprocess.DEVNULL)


def record(file: Path, scores: dict[str, torch.Tensor]) -> None:
    pl_prune.save_scores(file, scores, {"weights": hash_tensors(scores)})


def reading(file: str) -> int:
    small = Path(file).with_name("small")
    pl_prune.save_scores(small, {"a": torch.rand(1000)}), pl_prune.load_scores(small)
    return timing.peak_bytes(lambda: pl_prune.load_scores(file))


def main() -> None:
    options = timing.parse(__doc__, repeats=3)
    scores = make_scores("|w g|", "cpu")
    allocation = pl_prune.Global()
    with tempfile.TemporaryDirectory() as folder:
        file, copy, masks = (Path(folder) / name for name in ("scores", "copy", "masks-alone"))
        pl_prune.save_scores(file, scores)
        mask, flat = allocation(scores, 0.95), flatten(scores)
        times = timing.interleaved(
            {
                "command, ten": lambda: command(file, *TEN),
                "command, one": lambda: command(file, 0.95),
                "ten masks": lambda: nested_masks(allocation, scores, TEN),
                "one mask": lambda: nested_masks(allocation, scores, [0.95]),
                "ten by layer": lambda: nested_masks(pl_prune.Layerwise(), scores, TEN),
                "one by layer": lambda: nested_masks(pl_prune.Layerwise(), scores, [0.95]),
                "one sort": flat.sort,
                "record": lambda: record(copy, scores),
                "load scores": lambda: pl_prune.load_scores(file),
                "save masks": lambda: pl_prune.save_masks(masks, mask),
            },
            options.repeats,
        )
        timing.ratio(times, "command, ten", "command, one", "1.5", "pl-prune mask, ten sparsities / one")
        timing.ratio(times, "ten masks", "one mask", "", "in memory: ten nested masks / one")
        timing.ratio(times, "ten by layer", "one by layer", "", "in memory, Layerwise: ten nested masks / one")
        timing.ratio(times, "ten masks", "one sort", "", "in memory: ten nested masks / one torch.sort of the scores")
        timing.line("a record of the scores in a run", timing.seconds(median(times["record"])), "2 s")
        timing.line("reading the scores", timing.seconds(median(times["load scores"])))
        timing.line("writing one file of masks", timing.seconds(median(times["save masks"])))
        peak = timing.in_fresh_process(reading, str(file)) / (4 * flat.numel())
        timing.line("peak memory of reading, in copies of the scores", f"{peak:.2f}", "2")


if __name__ == "__main__":
    main()
