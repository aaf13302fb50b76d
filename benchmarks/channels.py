"""What channels cost before any fine-tuning, by criterion: Figure 5 of IPPRO, its Table 4 and its Figure 2, on any recipe.

Channels of a trained network are scored, the same share of every layer is sliced off by each criterion, and the smaller
network is tested as it is. Beside the accuracies stand the rank correlations of the criteria's scores (over all channels, and the
mean of those within layers) and the magnitudes of the channels that each removes.

    python benchmarks/channels.py --config recipes/settings/resnet20_cifar10.yaml --weights CKPT --data.root DATA \
        [--ratios 0.1 0.2 0.3 0.4 0.5] [--per-class 100] [--draws 5] [--folder runs/channels]

Whatever else is given goes to `pl-prune fit`'s parser: --data.test_samples=1000, say.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable
from math import isnan
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pl_prune as plp
from pl_prune.cli import PruneCLI
from pl_prune.report.attached import save_figure
from pl_prune.report.canvas import Picture, band, draw, legend, legend_height, look
from pl_prune.report.entries import entries, rank_correlations, ranks
from pl_prune.report.saliency import correlation_figure

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CRITERIA = {
    "PROscore": plp.PROscore(),
    "PROscore, normalized": plp.PROscore(normalize=True),
    "L1": plp.ByGroup(plp.Magnitude()),
    "L2": plp.ByGroup(plp.Magnitude(), reduce="l2"),
    "Taylor": plp.Taylor(),
    "FPGM": plp.GeometricMedian(),
}
RANDOM = "random"
Scores = dict[str, Tensor]


class Parsed(PruneCLI):
    """A recipe's module, with its weights, and its data."""

    def fit(self, model: Any, **_: Any) -> None:
        """Train nothing."""


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def on_device(batches: Iterable[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    return [(x.to(DEVICE), y.to(DEVICE)) for x, y in batches]


@torch.no_grad()
def accuracy(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> float:
    model.eval()
    right = [(model(x).argmax(1) == y).sum() for x, y in batches]
    return float(sum(right)) / sum(len(y) for _, y in batches)


def timed_scores(model: nn.Module, groups: Any, batches: Any, draws: int) -> tuple[dict[str, Scores], dict[str, float]]:
    found, seconds = {}, {}
    named = {**CRITERIA, **{f"{RANDOM} {i}": plp.ByGroup(plp.Random(seed=i)) for i in range(draws)}}
    for name, criterion in named.items():
        start = time.perf_counter()
        found[name] = plp.score_groups(model, criterion, groups, batches, loss)
        seconds[name] = time.perf_counter() - start
    return found, seconds


def curves(model: nn.Module, groups: Any, scores: dict[str, Scores], ratios: list[float], data: Any) -> Any:
    """Accuracies by criterion and ratio, and the MACs that are left at each ratio."""
    found: dict[str, list[float]] = {name: [] for name in scores}
    macs = []
    for ratio in ratios:
        for name, units in scores.items():
            keep = plp.select_units(units, groups, 0.0, ratios={"*": ratio})
            small = plp.shrink(model, groups.expand(keep), data[0][0][:2], groups)
            found[name].append(accuracy(small, data))
        macs.append(groups.cost(keep)[1] / groups.cost({})[1])
        line = ", ".join(f"{name} {values[-1]:.4f}" for name, values in found.items())
        print(f"{ratio:.0%} of the channels, {macs[-1]:.1%} of the MACs left: {line}", flush=True)
    return found, macs


def summarised(found: dict[str, list[float]]) -> dict[str, list[tuple[float, float]]]:
    """Mean and standard deviation, the latter of the random draws alone."""
    draws = [values for name, values in found.items() if name.startswith(RANDOM)]
    told = {name: [(v, 0.0) for v in values] for name, values in found.items() if not name.startswith(RANDOM)}
    return {**told, RANDOM: [(mean(v), stdev(v) if len(v) > 1 else 0.0) for v in zip(*draws, strict=True)]}


def within_layers(one: Scores, other: Scores) -> float:
    """The mean rank correlation over layers."""
    whole = {root: torch.ones_like(score, dtype=torch.bool) for root, score in one.items()}
    pairs = [[entries("", {root: scores[root]}, whole) for scores in (one, other)] for root in one]
    return mean(rank_correlations(pair)[0][1] for pair in pairs)


def curve_figure(told: dict[str, list[tuple[float, float]]], ratios: list[float], dense: float) -> Picture:
    def paint(figure: Any) -> None:
        axes = figure.add_subplot()
        xs = [0.0, *(100 * r for r in ratios)]
        handles = []
        for place, values in enumerate(told.values()):
            middle = [100 * dense, *(100 * m for m, _ in values)]
            handles += axes.plot(xs, middle, **look(place))
            band(axes, xs, middle, [0.0, *(100 * d for _, d in values)], look(place)["color"])
        axes.set_xlabel("channels removed from every layer (%)")
        axes.set_ylabel("test accuracy without fine-tuning (%)")
        axes.grid(alpha=0.2)
        legend(figure, axes, handles, list(told))

    best = [max(told, key=lambda name: told[name][i][0]) for i in range(len(ratios))]
    caption = "Best at " + ", ".join(f"{r:.0%}: {name}" for r, name in zip(ratios, best, strict=True)) + "."
    return draw("without_finetuning", "Without fine-tuning", caption, 3.4 + legend_height(list(told)), paint)


def magnitude_figure(keeps: dict[str, Any], norms: Scores, ratio: float) -> Picture:
    """Figure 2, over all layers: how many channels go of each tenth of their layer's magnitudes."""
    tenth = {root: (ranks(norm) * (10 / len(norm))).long() for root, norm in norms.items()}
    every = torch.cat(list(tenth.values())).bincount(minlength=10)
    shares = {
        name: 100 * torch.cat([tenth[root][~keep[root]] for root in tenth]).bincount(minlength=10) / every
        for name, keep in keeps.items()
    }

    def paint(figure: Any) -> None:
        axes = figure.add_subplot()
        handles = []
        for place, share in enumerate(shares.values()):
            handles += axes.plot([5 + 10 * i for i in range(10)], share.tolist(), **look(place))
        axes.set_xlabel("percentile of the channel's L1 norm in its layer")
        axes.set_ylabel("removed (%)")
        axes.grid(alpha=0.2)
        legend(figure, axes, handles, list(keeps))

    caption = (
        f"At {ratio:.0%} of the channels of every layer. A flat line removes channels of small and large norms alike; "
        "of the larger half go "
        + ", ".join(f"{name} {float(share[5:].mean()):.0f} %" for name, share in shares.items())
        + "."
    )
    return draw("magnitudes", "Magnitudes of the channels that go", caption, 3.0 + legend_height(list(keeps)), paint)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.4, 0.5])
    parser.add_argument("--per-class", type=int, default=100, help="images of each class that are scored (default 100)")
    parser.add_argument("--draws", type=int, default=5, help="random prunings (default 5)")
    parser.add_argument("--folder", default="runs/channels", help="where results.json and figures go")
    options, recipe = parser.parse_known_args()
    cli = Parsed(args=["fit", *recipe, "--trainer.logger=false", "--prune=null"])
    model, data = cli.model.to(DEVICE).eval(), cli.datamodule
    data.setup("fit")
    batches = on_device(plp.Samples(options.per_class, batch_size=250).batches(data.scoring_dataloader()))
    tested = on_device(data.val_dataloader())
    groups = plp.trace_groups(model, batches[0][0][:2])
    dense = accuracy(model, tested)
    print(f"{sum(groups.sizes.values())} channels in {len(groups)} groups; whole: {dense:.4f}", flush=True)
    scores, seconds = timed_scores(model, groups, batches, options.draws)
    found, macs = curves(model, groups, scores, options.ratios, tested)
    told = summarised(found)
    names = list(CRITERIA)
    middle = options.ratios[len(options.ratios) // 2]
    keeps = {n: plp.select_units(scores[n], groups, 0.0, ratios={"*": middle}) for n in [*names, f"{RANDOM} 0"]}
    kept = [entries(name, scores[name], keeps[name]) for name in names]
    everywhere = rank_correlations(kept)
    layers = [[within_layers(scores[a], scores[b]) for b in names] for a in names]
    for what, table in (("over all channels", everywhere), ("within layers", layers)):
        print(f"rank correlation {what}")
        for name, line in zip(names, table, strict=True):
            print(f"  {name:<22}" + "".join(f"{value:>8.3f}" for value in line))
    figures = [
        curve_figure(told, options.ratios, dense),
        correlation_figure(kept),
        magnitude_figure(keeps, scores["L1"], middle),
    ]
    for figure in figures:
        if figure is not None:
            print(save_figure(options.folder, figure))
    results = {
        "dense": dense,
        "ratios": options.ratios,
        "macs_left": macs,
        "accuracy": {name: [{"mean": m, "std": d} for m, d in values] for name, values in told.items()},
        "seconds": seconds,
        "rank_correlation": {
            "criteria": names,
            "all": everywhere,
            "layers": [[None if isnan(v) else v for v in line] for line in layers],
        },
        "scored_per_class": options.per_class,
    }
    (Path(options.folder) / "results.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
