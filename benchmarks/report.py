"""The page of a study of 200 runs: limits 10 s and 5 MB.

Thirteen rows at five sparsities with three seeds, and five dense runs, each with 60 epochs of metrics, a report of its layers with
latency, and the scores and masks of a ResNet-18 (21 layers, 11.2 million entries); other networks by --millions. Scores
differ by row and masks by row and seed; runs that the page need not tell apart share files on the disk.

    python benchmarks/report.py [--millions 11] [--repeats 3] [--keep FOLDER]
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from statistics import median

import timing
import torch

from pl_prune.core.allocate import Global
from pl_prune.core.store import save_masks, save_scores
from pl_prune.criteria.magnitude import Magnitude
from pl_prune.report.html import write_report
from pl_prune.report.sparsity import layer_sparsity

ROWS, SPARSITIES, SEEDS, DENSE, EPOCHS = 13, (0.5, 0.8, 0.9, 0.95, 0.98), 3, 5, 60
SHARES = [1, *[4] * 4, 8, *[16] * 3, 32, *[64] * 3, 128, *[256] * 3, 512, 512]
"""Of the entries, by layer: about those of a ResNet-18."""


def shapes(entries: float) -> dict[str, tuple[int, ...]]:
    unit = entries / sum(SHARES)
    widths = [max(1, round((unit * share / 9) ** 0.5)) for share in SHARES]
    return {f"network.layers.{i}.conv.weight": (w, w, 3, 3) for i, w in enumerate(widths)}


def build(folder: Path, entries: float) -> None:
    generator = torch.Generator().manual_seed(0)
    layers = shapes(entries)
    weights = {name: torch.randn(shape, generator=generator).abs() for name, shape in layers.items()}
    for row in range(ROWS):
        label = "magnitude" if row == 0 else f"criterion {row}"
        method = "Magnitude()" if row == 0 else f"Criterion{row}()"
        noisy = {n: w * torch.randn(w.shape, generator=generator).abs() ** (row / 4) for n, w in weights.items()}
        scores = folder / f"scores_{row}"
        criterion = Magnitude() if row == 0 else None
        save_scores(scores, noisy, {"weights": "the same", "criterion": criterion})
        for sparsity in SPARSITIES:
            for seed in range(SEEDS):
                moved = {n: s * (1 + 0.1 * seed * torch.rand_like(s)) for n, s in noisy.items()} if seed else noisy
                needed = seed < 2 and sparsity == SPARSITIES[-1]
                masks = Global()(moved, sparsity) if needed else None
                add(folder, label, {"prune.sparsity": sparsity}, seed, f"{method} at sparsity {sparsity}, Global()",
                    0.95 - 0.01 * row * sparsity + 0.002 * seed, layers, scores, masks)  # fmt: skip
    for seed in range(DENSE):
        add(folder, "dense", {}, seed, "dense", 0.955 + 0.001 * seed, layers, None, None)
    for row in range(ROWS):
        (folder / f"scores_{row}").unlink()


def add(folder, row, settings, seed, method, last, layers, scores, masks) -> None:
    key = f"{row.replace(' ', '_')}_{'_'.join(map(str, settings.values()))}_seed={seed}"
    run = folder / "runs" / key
    run.mkdir(parents=True)
    sparsity = next(iter(settings.values()), 0.0)
    found = [
        {"name": x.name, "shape": x.shape, "kept": x.kept, "total": x.total, "empty_rows": x.empty_rows}
        for x in layer_sparsity(masks)
    ] if masks else [
        {"name": n, "shape": s, "kept": int((1 - sparsity) * torch.Size(s).numel()), "total": torch.Size(s).numel(), "empty_rows": 0}
        for n, s in layers.items()
    ]  # fmt: skip
    total = sum(x["total"] for x in found)
    cost = {
        "params": total,
        "params_kept": int(total * (1 - sparsity)),
        "macs": 500 * total,
        "macs_kept": int(400 * total * (1 - sparsity)),
    }
    times = [0.0030 + 0.0001 * seed, 0.0031 + 0.0001 * seed, 0.0034]
    latency = {"dense": times, "masked": times, "batch": 2, "threads": 1, "device": "a made-up device", "repeats": 20}
    (run / "report.json").write_text(json.dumps({"layers": found, "cost": cost, "path": True, "latency": latency}))
    curve = [
        {"epoch": e, "step": 10 * e, "val/acc": last * (1 - 0.5 ** (e + 1)), "val/loss": 0.5**e} for e in range(EPOCHS)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in curve))
    if scores:
        os.link(scores, run / "scores.safetensors")
    if masks:
        save_masks(run / "masks.safetensors", masks)
    result = {
        "method": method,
        "sparsity": sparsity,
        "seed": seed,
        "epochs": EPOCHS,
        "steps": 600,
        "metrics": {"val/acc": last},
    }
    result |= {"seconds": 100.0 + seed, "pruning_seconds": 1.0, "peak_bytes": 2**30}
    (run / "result.json").write_text(json.dumps(result))
    record = {"key": key, "row": row, "settings": settings, "best": last + 0.001, "last": last, **result}
    with (folder / "results.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--millions", type=float, default=11.2, help="entries of the network (default 11.2)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--keep", help="an empty folder for the study and its page; default: a temporary one")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), {options.millions} million entries")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.keep or temporary)
        build(folder, options.millions * 1e6)
        runs = len((folder / "results.jsonl").read_text().splitlines())
        wall, cpu = [], []
        for _ in range(options.repeats):
            start, start_cpu = time.perf_counter(), time.process_time()
            page = write_report(folder)
            wall.append(time.perf_counter() - start)
            cpu.append(time.process_time() - start_cpu)
        timing.line(
            f"the page of {runs} runs",
            timing.seconds(median(wall)),
            "10 s",
            f"first {wall[0]:.1f} s, CPU {median(cpu):.1f} s",
        )
        timing.line(
            "its size", f"{page.stat().st_size / 1e6:.2f} MB", "5 MB", f"{page.read_text().count('<figure>')} figures"
        )
        shots = sum(file.stat().st_size for file in (folder / "report_figures").iterdir())
        timing.line("its figures as PNG, beside it", f"{shots / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
