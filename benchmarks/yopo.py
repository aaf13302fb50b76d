"""YOPO's factorisations of a ResNet-20, a ResNet-18 and a VGG-19 whole, rank 7, against scikit-learn's, on the same matrices.

All start from the same factors and run on the same number of threads; both rows of a network compare

* 200 multiplicative updates, ours / scikit-learn's: limit 1;
* the squared error, summed over the layers, that those 200 updates reach: HALS, in as many iterations as it needs for
  it, over our 200 updates: limit 1/3, and over scikit-learn's coordinate descent in as many as that needs: limit 1;
* peak memory beside the model and the scores, in copies of the largest layer: limit 3.

Beside our seconds stand those of the paper's Table 8, on a GPU. Memory of less than a few MB is that of libraries: the
ResNet-20's largest layer has 0.15 MB.

    python benchmarks/yopo.py [--device cuda] [--repeats 5] [--cpu-time]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

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


def peak(name: str, device: str, solver: yopo.Solver) -> int:
    """Peak of one scoring, without the scores it returns."""
    torch.manual_seed(0)
    small = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 2))
    criterion = plp.YOPO(solver=solver, iterations=3)
    plp.score(small.to(device), criterion)  # libraries are loaded at the first call
    model = network(name, device)
    kept: list[dict[str, Tensor]] = []
    found = timing.peak_bytes(lambda: kept.append(plp.score(model, criterion)), device)
    return found - sum(s.numel() * s.element_size() for s in kept[0].values())


def main() -> None:
    options = timing.parse(__doc__, repeats=5)
    with threadpool_limits(torch.get_num_threads()):
        for name, (_, paper) in NETWORKS.items():
            compare(name, paper, options.device, options.repeats)


def compare(name: str, paper: float, device: str, repeats: int) -> None:
    model = network(name, device)
    portions = problems(model)
    matrices = singles(portions)
    reached = list(map(copy, portions))
    for portion in reached:
        factorise(*portion, UPDATES)
    target = error(singles(reached))
    sweeps, descents = needed(errors_of_hals(portions), target), needed(errors_of_descent(matrices), target)
    probe = Probe(model, plp.Select()(model), None, [])
    largest = max(p.numel() for p in probe.params.values())
    print(
        f"\n{name}: {len(matrices)} layers in {len(portions)} portions; {sweeps} iterations of HALS, {descents} of descent"
    )

    times = timing.interleaved(
        {
            "mu": lambda: plp.YOPO(iterations=UPDATES)(probe),
            "hals": lambda: plp.YOPO(solver="hals", iterations=sweeps)(probe),
            "scikit-learn mu": lambda: scikit(matrices, "mu", UPDATES),
            "scikit-learn cd": lambda: scikit(matrices, "cd", descents),
        },
        repeats,
        device,
    )
    timing.ratio(times, "mu", "scikit-learn mu", "1", f"{name}: {UPDATES} updates, ours / scikit-learn's")
    timing.ratio(times, "hals", "mu", "0.333", f"{name}: HALS / {UPDATES} updates of ours, to their error")
    timing.ratio(times, "hals", "scikit-learn cd", "1", f"{name}: HALS / scikit-learn's descent, to the same error")
    for solver in ("mu", "hals"):
        taken = sorted(times[solver])[len(times[solver]) // 2]
        timing.line(f"{name}: seconds of {solver}; the paper's on a GPU", f"{taken:.2f}", "", f"paper {paper}")
    for solver in ("mu", "hals"):
        copies = timing.in_fresh_process(peak, name, device, solver) / (4 * largest)
        timing.line(f"{name}: peak memory of {solver}, copies of the largest layer", f"{copies:.2f}", "3")


if __name__ == "__main__":
    main()
