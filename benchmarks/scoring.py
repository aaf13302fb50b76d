"""Scores of a CIFAR ResNet-18 on 100 samples, against the published procedure: batch size 1, one sample after another.

Ratios are published / ours, each over the same samples, network and number of probes (limits are minima):

* HutchinsonPruning, 10 probes: limit 5.5; SNIP and GradNorm: 4; FisherPruning, per sample in both: 2;
* published HutchinsonPruning at 10 probes / GaussNewtonPruning ("gnb") at 10 probes, another estimate of the same
  diagonal: 20;
* SNIP / one plain forward and backward pass of the same 100 samples: limit 1.2 (a maximum);
* the bounds of the first line, which differ from machine to machine (1.5 times and more): a plain pass over the samples
  one by one / in batches, which no exact SNIP can beat by much, and HutchinsonPruning in batches by PyTorch's own double
  backward / ours;
* peak memory of HutchinsonPruning / that of one training step of the same batch size: limit 3 (a maximum).

and, of each curvature estimator, its correlation with the exact diagonal of the Hessian (which in this network, in
evaluation mode, is that of the Gauss-Newton matrix), its error and its time.

Ours takes the samples in batches of `Samples`' default size. The ratios to the published procedure depend on how idle
OpenMP threads wait: OMP_WAIT_POLICY=ACTIVE makes single samples faster.

    python benchmarks/scoring.py [--device cuda] [--repeats 3] [--samples 100] [--cpu-time]
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import timing
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import pl_prune as plp
from pl_prune.models import ResNet

PROBES = 10


def problem(device: str, samples: int) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """A network whose batch norms have seen data, and batches of noise images with labels."""
    torch.manual_seed(0)
    model = ResNet(18).to(device)
    x, y = torch.randn(samples, 3, 32, 32, device=device), torch.arange(samples, device=device) % 10
    with torch.no_grad():
        model.train()(x)
    size = plp.Samples().batch_size
    return model.eval(), list(zip(x.split(size), y.split(size), strict=True))


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1])


def one_by_one(batches: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    return [(x[i : i + 1], y[i : i + 1]) for x, y in batches for i in range(len(x))]


def published_gradient(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    model.zero_grad()
    for batch in one_by_one(batches):
        loss(model, batch).backward()
    return [p.grad.abs() for p in model.parameters() if p.grad is not None]


def published_snip(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    grads = published_gradient(model, batches)
    return [(p * g).abs() for p, g in zip(model.parameters(), grads, strict=True)]


def published_fisher(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    fisher = [torch.zeros_like(p) for p in model.parameters()]
    for batch in one_by_one(batches):
        model.zero_grad()
        loss(model, batch).backward()
        for f, p in zip(fisher, model.parameters(), strict=True):
            f += p.grad**2
    return [p.detach() ** 2 * f / 2 for f, p in zip(fisher, model.parameters(), strict=True)]


def published_hutchinson(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    return chunked_hutchinson(model, one_by_one(batches))


def chunked_hutchinson(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    params = list(model.parameters())
    diagonal = [torch.zeros_like(p) for p in params]
    for x, y in batches:
        grads = torch.autograd.grad(cross_entropy(model(x) / 200, y), params, create_graph=True)
        for _ in range(PROBES):
            z = [torch.randint_like(p, 2) * 2 - 1 for p in params]
            products = torch.autograd.grad(grads, params, z, retain_graph=True)
            for d, hz, v in zip(diagonal, products, z, strict=True):
                d += v * hz / PROBES
    return [p.detach() ** 2 * d / 2 for d, p in zip(diagonal, params, strict=True)]


def plain(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    model.zero_grad()
    for batch in batches:
        loss(model, batch).backward()


def training_step(device: str) -> int:
    model, ((x, y), *_) = problem(device, plp.Samples().batch_size)
    optimizer = torch.optim.SGD(model.train().parameters(), 0.1, momentum=0.9)

    def step() -> None:
        loss(model, (x, y)).backward()
        optimizer.step()

    return timing.peak_bytes(step, device)


def hutchinson(device: str) -> int:
    model, batches = problem(device, plp.Samples().batch_size)
    return timing.peak_bytes(lambda: plp.score(model, plp.HutchinsonPruning(probes=PROBES), batches, loss), device)


def memory(device: str) -> None:
    peaks = {f: timing.in_fresh_process(f, device) for f in (training_step, hutchinson)}
    note = " / ".join(f"{peak / 2**20:.0f} MiB" for peak in reversed(peaks.values()))
    ratio = peaks[hutchinson] / peaks[training_step]
    timing.line("peak memory: HutchinsonPruning / training step", f"{ratio:.3g}", "3", note)


def overlap(a: Tensor, b: Tensor) -> float:
    kept = [torch.zeros_like(s, dtype=torch.bool).index_fill_(0, s.topk(len(s) // 50).indices, True) for s in (a, b)]
    return float((kept[0] & kept[1]).sum() / (kept[0] | kept[1]).sum())


def estimators(device: str, samples: int) -> None:
    """One timed run of each; the relative error is |estimate - exact| / |exact|."""
    model, batches = problem(device, samples)
    print(
        f"\n{'diagonal of the Hessian by':<44}{'seconds':>9}{'correlation':>13}{'per second':>12}{'error':>9}{'top 2 %':>9}"
    )
    for temperature in (1.0, 200.0):
        gauss_newton = partial(plp.GaussNewtonDiagonal, temperature=temperature)
        exact = None
        for name, criterion in {
            "exact": gauss_newton(estimator="exact"),
            "gnb, 1 probe": gauss_newton(probes=1),
            "gnb, 10 probes": gauss_newton(probes=10),
            "gnb, a probe for each sample": gauss_newton(probes=samples),
            "sketch, 10 probes": gauss_newton(estimator="sketch", probes=10),
            "Hutchinson, 1 probe": plp.HutchinsonDiagonal(probes=1, temperature=temperature),
            "Hutchinson, 10 probes": plp.HutchinsonDiagonal(probes=10, temperature=temperature),
            **({"Fisher": plp.FisherDiagonal(), "squared gradient": plp.GradNorm()} if temperature == 1 else {}),
        }.items():
            start = timing.now(device)
            scores = plp.score(model, criterion, batches, loss)
            seconds = timing.now(device) - start
            flat = torch.cat([s.flatten() for s in scores.values()])
            flat = flat.square() if name == "squared gradient" else flat
            exact = flat if exact is None else exact
            correlation = float(torch.corrcoef(torch.stack([flat, exact]))[0, 1])
            error = float((flat - exact).norm() / exact.norm())
            print(
                f"{f'{name}, logits / {temperature:g}':<44}{seconds:>9.1f}{correlation:>13.3f}{correlation / seconds:>12.3f}"
                f"{error:>9.3g}{overlap(flat, exact):>9.2f}",
                flush=True,
            )


def speed(device: str, samples: int, repeats: int) -> None:
    model, batches = problem(device, samples)

    def ours(criterion: plp.Criterion) -> Callable[[], object]:
        return lambda: plp.score(model, criterion, batches, loss)

    times = timing.interleaved(
        {
            "published GradNorm": lambda: published_gradient(model, batches),
            "GradNorm": ours(plp.GradNorm()),
            "published SNIP": lambda: published_snip(model, batches),
            "SNIP": ours(plp.SNIP()),
            "plain": lambda: plain(model, batches),
            "plain one by one": lambda: plain(model, one_by_one(batches)),
            "published FP": lambda: published_fisher(model, batches),
            "FP": ours(plp.FisherPruning()),
            "gnb": ours(plp.GaussNewtonPruning(probes=PROBES)),
            "published HP": lambda: published_hutchinson(model, batches),
            "HP in batches": lambda: chunked_hutchinson(model, batches),
            "HP": ours(plp.HutchinsonPruning(probes=PROBES)),
        },
        repeats,
        device,
    )
    timing.ratio(times, "published HP", "HP", "5.5", f"HutchinsonPruning, {PROBES} probes: published / ours")
    timing.ratio(times, "published SNIP", "SNIP", "4", "SNIP: published / ours")
    timing.ratio(times, "published GradNorm", "GradNorm", "4", "GradNorm: published / ours")
    timing.ratio(times, "published FP", "FP", "2", "FisherPruning: published / ours")
    timing.ratio(times, "published HP", "gnb", "20", f"published Hutchinson / gnb, {PROBES} probes each")
    timing.ratio(times, "SNIP", "plain", "1.2", "SNIP / plain forward and backward")
    timing.ratio(times, "plain one by one", "plain", "", "plain forward and backward: one by one / in batches")
    timing.ratio(times, "HP in batches", "HP", "", "HutchinsonPruning: PyTorch's double backward in batches / ours")


def main() -> None:
    options = timing.parse(__doc__, repeats=3, samples=100)
    speed(options.device, options.samples, options.repeats)
    memory(options.device)
    estimators(options.device, options.samples)


if __name__ == "__main__":
    main()
