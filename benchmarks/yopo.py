"""YOPO's factorisations of a ResNet-20, a ResNet-18 and a VGG-19 whole, rank 7, against scikit-learn's, on the same matrices.

All start from the same factors and run on the same number of threads; both rows of a network compare

* 200 multiplicative updates, ours / scikit-learn's: limit 1;
* the squared error, summed over the layers, that those 200 updates reach: HALS, in as many iterations as it needs for
  it, over our 200 updates: limit 1/3, and over scikit-learn's coordinate descent in as many as that needs: limit 1;
* peak memory beside the model and the scores, in copies of the largest layer: limit 3; of tensors, and resident, in which a
  few MB are those of libraries (the ResNet-20's largest layer has 0.15 MB).

Beside our seconds stand those of the paper's Table 8, on a GPU. Each contender runs in a process of its own, in turn: two
OpenMP runtimes in one process slow each other down up to fourfold, whichever of them spins. With --cpu-time all run here, on
one thread.

    python benchmarks/yopo.py [--device cuda] [--repeats 5] [--cpu-time]
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache, partial
from multiprocessing import get_context

import timing
import torch
from sklearn.decomposition import non_negative_factorization
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

import pl_prune as plp
from pl_prune.core.probe import Probe
from pl_prune.criteria import yopo
from pl_prune.criteria.factorise import factorise
from pl_prune.models import VGG, ResNet

NETWORKS: dict[str, tuple[Callable[[], nn.Module], float]] = {
    "ResNet-20": (lambda: ResNet(20), 3.90),
    "ResNet-18": (lambda: ResNet(18), 10.29),
    "VGG-19": (lambda: VGG(19), 10.16),
}
UPDATES, MOST = 200, 300
Problem = tuple[list[Tensor], Tensor, Tensor]
Matrix = tuple[Tensor, Tensor, Tensor]


def network(name: str, device: str) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[name][0]().to(device)


def problems(model: nn.Module) -> list[Problem]:
    """Every portion of matrices that YOPO fits together, with the factors it starts from."""
    found: list[Problem] = []
    yopo.factorise = lambda a, v, h, *_: found.append(copy((a, v, h)))
    try:
        plp.score(model, plp.YOPO())
    finally:
        yopo.factorise = factorise
    return found


def copy(problem: Problem) -> Problem:
    matrices, v, h = problem
    return [a.clone() for a in matrices], v.clone(), h.clone()


def singles(portions: list[Problem]) -> list[Matrix]:
    """One matrix after another, as scikit-learn takes them: A (o, d), W (o, r) and H (r, d)."""
    found: list[Matrix] = []
    for matrices, v, h in portions:
        for a, own_v, own_h in zip([a for stack in matrices for a in stack.cpu()], v.cpu(), h.cpu(), strict=True):
            found.append((a, own_v[:, : len(a)].T.contiguous(), own_h[:, : a.shape[1]].contiguous()))
    return found


def scikit(matrices: list[Matrix], solver: str, iterations: int) -> list[Matrix]:
    def fit(a: Tensor, w: Tensor, h: Tensor) -> Matrix:
        new_w, new_h, _ = non_negative_factorization(
            a.numpy(), w.numpy().copy(), h.numpy().copy(), n_components=len(h), init="custom",
            solver=solver, tol=0, max_iter=iterations,
        )  # fmt: skip
        return a, torch.from_numpy(new_w), torch.from_numpy(new_h)

    return [fit(*matrix) for matrix in matrices]


def error(matrices: list[Matrix]) -> float:
    return sum(float(torch.linalg.vector_norm(a - w @ h).double() ** 2) for a, w, h in matrices)


def errors_of_hals(portions: list[Problem]) -> Iterator[float]:
    portions = list(map(copy, portions))
    while True:
        for portion in portions:
            factorise(*portion, 1, "hals")
        yield error(singles(portions))


def errors_of_descent(matrices: list[Matrix]) -> Iterator[float]:
    while True:
        matrices = scikit(matrices, "cd", 1)
        yield error(matrices)


def needed(errors: Iterator[float], target: float) -> int:
    for iterations in range(1, MOST):
        if next(errors) <= target:
            return iterations
    raise SystemExit(f"no error of {target} within {MOST} iterations")


def peak(name: str, device: str, solver: yopo.Solver, tensors: bool) -> int:
    """Peak of one scoring, without the scores it returns: of torch's tensors, or of resident memory."""
    torch.manual_seed(0)
    small = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 2))
    criterion = plp.YOPO(solver=solver, iterations=3)
    plp.score(small.to(device), criterion)  # libraries are loaded at the first call
    model = network(name, device)
    kept: list[dict[str, Tensor]] = []
    run = lambda: kept.append(plp.score(model, criterion))  # noqa: E731
    found = timing.peak_tensors(run) if tensors and device == "cpu" else timing.peak_bytes(run, device)
    return found - sum(s.numel() * s.element_size() for s in kept[0].values())


@cache
def prepared(name: str, device: str) -> tuple[Probe, list[Matrix]]:
    model = network(name, device)
    return Probe(model, plp.Select()(model), None, []), singles(problems(model))


def run(name: str, device: str, contender: str, iterations: int) -> None:
    probe, matrices = prepared(name, device)
    if contender.startswith("scikit-learn"):
        scikit(matrices, contender.split()[1], iterations)
    else:
        plp.YOPO(solver=contender, iterations=iterations)(probe)
        timing.now(device)


def main() -> None:
    options = timing.parse(__doc__, repeats=5)
    with threadpool_limits(torch.get_num_threads()):
        for name, (_, paper) in NETWORKS.items():
            compare(name, paper, options.device, options.repeats, options.cpu_time)


def compare(name: str, paper: float, device: str, repeats: int, alone: bool) -> None:
    model = network(name, device)
    portions = problems(model)
    matrices = singles(portions)
    reached = list(map(copy, portions))
    for portion in reached:
        factorise(*portion, UPDATES)
    target = error(singles(reached))
    sweeps, descents = needed(errors_of_hals(portions), target), needed(errors_of_descent(matrices), target)
    largest = max(p.numel() for p in plp.Select()(model).values())
    print(
        f"\n{name}: {len(matrices)} layers in {len(portions)} portions; {sweeps} iterations of HALS, {descents} of descent"
    )

    counts = {"mu": UPDATES, "hals": sweeps, "scikit-learn mu": UPDATES, "scikit-learn cd": descents}
    if alone:
        times = timing.interleaved({k: partial(run, name, device, k, n) for k, n in counts.items()}, repeats, device)
    else:
        os.environ["GOMP_SPINCOUNT"] = "300000"  # libgomp's own choice, which `timing` takes away
        with ExitStack() as open_:
            own = {k: open_.enter_context(get_context("spawn").Pool(1)) for k in counts}
            calls = {k: partial(own[k].apply, run, (name, device, k, n)) for k, n in counts.items()}
            times = timing.interleaved(calls, repeats)
    timing.ratio(times, "mu", "scikit-learn mu", "1", f"{name}: {UPDATES} updates, ours / scikit-learn's")
    timing.ratio(times, "hals", "mu", "0.333", f"{name}: HALS / {UPDATES} updates of ours, to their error")
    timing.ratio(times, "hals", "scikit-learn cd", "1", f"{name}: HALS / scikit-learn's descent, to the same error")
    for solver in ("mu", "hals"):
        taken = sorted(times[solver])[len(times[solver]) // 2]
        timing.line(f"{name}: seconds of {solver}; the paper's on a GPU", f"{taken:.2f}", "", f"paper {paper}")
    for solver in ("mu", "hals"):
        copies, resident = (
            timing.in_fresh_process(peak, name, device, solver, t) / (4 * largest) for t in (True, False)
        )
        note = f"resident {resident:.2f}"
        timing.line(f"{name}: peak memory of {solver}, copies of the largest layer", f"{copies:.2f}", "3", note)


if __name__ == "__main__":
    main()
