"""Exact global selection against `torch.topk`, on the 25.5 million scores of a ResNet-50.

* one selection, exact and with ties by index, over one `torch.topk(flat, 5 %, sorted=False)`: limit 0.7;
* ten nested masks (ten sparsities) over one such topk: limit 5;
* peak memory beyond the scores, masks included, in flat float32 copies of the scores: limit 3.

The usual code (flatten, topk, scatter, split) stands beside each; equal scores are the worst case of both.

With `--device cuda` it also checks that CPU and CUDA give the same masks, ties included.

    python benchmarks/selection.py [--device cuda] [--repeats 7] [--cpu-time]
"""

from __future__ import annotations

import timing
import torch
from torch import Tensor

import pl_prune
from pl_prune.core.types import prune_count

SPARSITY = 0.95
TEN = [0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.97, 0.98, 0.99]
KINDS = {
    "|w g|": lambda n: torch.randn(n) * torch.randn(n),
    "ties": lambda n: torch.randn(n).mul_(100).round_(),
    "all equal": torch.ones,
}


def resnet50_shapes() -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7)]
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [(width, channels, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            shapes += [(4 * width, channels, 1, 1)] if block == 0 else []
            channels = 4 * width
    return [*shapes, (1000, 2048)]


def make_scores(kind: str, device: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        f"layer{i}": KINDS[kind](torch.Size(shape).numel()).abs_().view(shape).to(device)
        for i, shape in enumerate(resnet50_shapes())
    }


def flatten(scores: dict[str, Tensor]) -> Tensor:
    return torch.cat([score.flatten() for score in scores.values()])


def topk(flat: Tensor) -> object:
    return torch.topk(flat, flat.numel() // 20, sorted=False)


def flat_topk(scores: dict[str, Tensor]) -> object:
    """The usual code: flatten, topk, scatter, split; which of the tied entries are kept is not defined."""
    flat = flatten(scores)
    keep = torch.zeros_like(flat, dtype=torch.bool)
    keep[torch.topk(flat, flat.numel() // 20, sorted=False).indices] = True
    return [
        part.clone().view(s.shape)
        for part, s in zip(keep.split([s.numel() for s in scores.values()]), scores.values(), strict=True)
    ]


def peak(selection: str, device: str) -> int:
    scores = make_scores("|w g|", device)
    small = {"a": torch.rand(1000, device=device)}
    pl_prune.Global()(small, SPARSITY), flat_topk(small)  # libraries are loaded at the first call
    functions = {
        "one": lambda: pl_prune.Global()(scores, SPARSITY),
        "ten": lambda: [pl_prune.Global()(scores, s) for s in TEN],
        "flat": lambda: flat_topk(scores),
    }
    return timing.peak_bytes(functions[selection], device)


def main() -> None:
    options = timing.parse(__doc__, repeats=7)
    allocation = pl_prune.Global()
    size = sum(torch.Size(shape).numel() for shape in resnet50_shapes())
    print(f"{size:,} scores in {len(resnet50_shapes())} tensors\n")
    for kind in KINDS:
        scores = make_scores(kind, options.device)
        flat = flatten(scores)
        times = timing.interleaved(
            {
                "one selection": lambda s=scores: allocation(s, SPARSITY),
                "one topk": lambda f=flat: topk(f),
                "usual code": lambda s=scores: flat_topk(s),
                "ten nested masks": lambda s=scores: [allocation(s, sparsity) for sparsity in TEN],
            },
            options.repeats,
            options.device,
        )
        timing.ratio(times, "one selection", "one topk", "0.7", f"scores {kind}: one selection / one topk")
        timing.ratio(times, "ten nested masks", "one topk", "5", f"scores {kind}: ten nested masks / one topk")
        timing.ratio(times, "one selection", "usual code", "", f"scores {kind}: one selection / usual code with topk")
        check(kind, scores, options.device)
        del scores, flat

    copy = 4 * size
    for selection, what, limit in (
        ("one", "peak memory in flat copies: one selection", "3"),
        ("ten", "peak memory in flat copies: ten masks, all held", ""),
        ("flat", "peak memory in flat copies: usual code with topk", ""),
    ):
        timing.line(what, f"{timing.in_fresh_process(peak, selection, options.device) / copy:.2f}", limit)


def check(kind: str, scores: dict[str, Tensor], device: str) -> None:
    """The masks are exact, nested, and the same on CPU and device."""
    size = sum(score.numel() for score in scores.values())
    on_cpu = {name: score.cpu() for name, score in scores.items()}
    wider = None
    for sparsity in TEN:
        masks = pl_prune.Global()(scores, sparsity)
        kept = sum(n for n, _ in masks.counts().values())
        if kept != size - prune_count(sparsity, size):
            raise SystemExit(f"scores {kind}, sparsity {sparsity}: {kept} of {size} kept")
        if wider is not None and masks.intersect(wider) != masks:
            raise SystemExit(f"scores {kind}, sparsity {sparsity}: not nested")
        if torch.device(device).type != "cpu" and pl_prune.Global()(on_cpu, sparsity) != masks:
            raise SystemExit(f"scores {kind}, sparsity {sparsity}: CPU and {device} differ")
        wider = masks
    same = "" if torch.device(device).type == "cpu" else f", equal on CPU and {device}"
    print(f"scores {kind}: counts exact, masks nested{same}\n")


if __name__ == "__main__":
    main()
