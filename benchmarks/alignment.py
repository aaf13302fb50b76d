"""Do parameters move along the Hessian's top eigenvectors? Appendix A of Gollini Navarrete et al., on digits 4 and 7.

A two-layer network, Xavier-uniform weights, zero biases, SGD (1e-4, momentum 0.9, weight decay 1e-4), batches of 256; its
exact Hessian over the train set at the start, and how the movement after the first step and after epochs 1 and 5 and the
last projects on the eigenvectors. The paper's network is 784-16-1 (12,577 parameters: `--side 28`); the default pools
the images to 14x14 (3,169), for a minute instead of half an hour on two cores. Without --data it takes scikit-learn's digits (8x8).

Beside the share of the squared movement along the first eigenvectors stand those of two controls: a random direction, and
one within the pixels that are ever lit, where alone a gradient can point.

    python benchmarks/alignment.py --data DATA_WITH_MNIST [--side 28] [--epochs 10] [--lr 1e-4] [--folder runs/alignment]
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor, nn

from pl_prune.report.alignment import Alignment, alignment, alignment_figure, eigenbasis
from pl_prune.report.attached import save_figure

TOPS = (1, 10, 100)


def load(root: str | None, side: int) -> tuple[Tensor, Tensor]:
    """Standardised images (n, pixels) of 4 and 7, and whether each is a 7."""
    if root is None:
        from sklearn.datasets import load_digits

        found = load_digits()
        images, labels = torch.tensor(found.images, dtype=torch.float32) / 16, torch.tensor(found.target)
        mean, std = images.mean(), images.std()
    else:
        from torchvision.datasets import MNIST

        found = MNIST(root, train=True)
        images, labels = found.data.float() / 255, found.targets
        mean, std = 0.1307, 0.3081
        images = nn.functional.adaptive_avg_pool2d(images[:, None], side)[:, 0] if side != 28 else images
    mine = (labels == 4) | (labels == 7)
    return ((images[mine] - mean) / std).flatten(1), (labels[mine] == 7).float()


def network(pixels: int, hidden: int) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(pixels, hidden), nn.ReLU(), nn.Linear(hidden, 1))
    for layer in (model[0], model[2]):
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    return model


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.binary_cross_entropy_with_logits(model(batch[0])[:, 0], batch[1])


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def train(model: nn.Module, x: Tensor, y: Tensor, options: argparse.Namespace) -> dict[str, dict[str, Tensor]]:
    """Parameters at the moments that are looked at."""
    optimizer = torch.optim.SGD(model.parameters(), options.lr, momentum=0.9, weight_decay=1e-4)
    generator = torch.Generator().manual_seed(1)
    moments = {}
    for epoch in range(1, options.epochs + 1):
        for places in torch.randperm(len(y), generator=generator).split(256):
            optimizer.zero_grad()
            loss_fn(model, (x[places], y[places])).backward()
            optimizer.step()
            moments.setdefault("the first step", copied(model))
        if epoch in (1, 5, options.epochs):
            moments[f"epoch {epoch}"] = copied(model)
    return moments


def controls(x: Tensor, before: dict[str, Tensor], basis: tuple[Tensor, Tensor]) -> dict[str, Alignment]:
    generator = torch.Generator().manual_seed(2)
    noise = {name: torch.randn(p.shape, generator=generator) for name, p in before.items()}
    lit = dict(noise, **{"0.weight": noise["0.weight"] * (x.std(0) > 0)})
    moved = {"a random direction": noise, "a random one, lit pixels": lit}
    return {what: alignment(basis, before, {n: before[n] + d[n] for n in before}) for what, d in moved.items()}


def line(what: str, found: Alignment) -> None:
    shares = "".join(f"{found.share(top):>9.2%}" for top in TOPS)
    print(f"{what:<28}{shares}{found.correlation():>14.2f}{float(found.squares.sum().sqrt()):>10.2e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="folder with MNIST; default: scikit-learn's digits")
    parser.add_argument("--side", type=int, default=14, help="pixels a side, of MNIST (default 14; the paper's: 28)")
    parser.add_argument("--hidden", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--folder", default="runs/alignment", help="where figures/alignment.png goes")
    options = parser.parse_args()
    x, y = load(options.data, options.side)
    model = network(x.shape[1], options.hidden)
    before = copied(model)
    start = time.perf_counter()
    basis = eigenbasis(model, loss_fn, [(x, y)])
    taken = time.perf_counter() - start
    moments = train(model, x, y, options)
    found = {what: alignment(basis, before, after) for what, after in moments.items()}
    right = float(((model(x)[:, 0] > 0) == (y > 0)).double().mean())
    values = basis[0]
    print(f"{len(y):,} images, {len(values):,} parameters, Hessian in {taken:.0f} s; at the end {right:.2%} right")
    curved = next(iter(found.values())).curved
    print(
        f"eigenvalues: largest {values[0]:.3g}, tenth {values[9]:.3g} in size; {int((values < 0).sum()):,} negative, {curved:,} not zero"
    )
    print(
        f"{'share of squared movement':<28}{''.join(f'  first{top:>3}'.rjust(9) for top in TOPS)}{'rank corr.':>14}{'length':>10}"
    )
    for what, one in {**found, **controls(x, before, basis)}.items():
        line(what, one)
    print(save_figure(options.folder, alignment_figure(found)))


if __name__ == "__main__":
    main()
