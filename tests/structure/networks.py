"""Small networks with one difficulty each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Wired(nn.Module):
    """Modules and a function that wires them."""

    def __init__(self, wire: Callable[..., Tensor], **modules: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.wire = wire
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.wire(self, x)


def conv(a: int, b: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(a, b, options.pop("kernel", 3), padding=options.pop("padding", 1), **options)


def head(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5))


def between(middle: Callable[[Tensor], Tensor], channels: int = 8) -> Wired:
    """A convolution, something, a convolution, a head."""
    return Wired(
        lambda m, x: m.head(m.second(middle(m.first(x)))),
        first=conv(3, channels),
        second=conv(channels, 6),
        head=head(6),
    )


def around(module: nn.Module, channels: int = 8) -> Wired:
    return Wired(
        lambda m, x: m.head(m.second(m.middle(m.first(x)))),
        first=conv(3, channels),
        middle=module,
        second=conv(channels, 6),
        head=head(6),
    )


def residual() -> Wired:
    def wire(m: Any, x: Tensor) -> Tensor:
        x = F.relu(m.n0(m.c0(x)))
        x = F.relu(x + m.n2(m.c2(F.relu(m.n1(m.c1(x))))))
        return m.head(x)

    norms = {f"n{i}": nn.BatchNorm2d(8) for i in range(3)}
    return Wired(wire, c0=conv(3, 8), c1=conv(8, 8), c2=conv(8, 8), head=head(8), **norms)


def dense() -> Wired:
    def wire(m: Any, x: Tensor) -> Tensor:
        a = m.c0(x)
        b = m.c1(F.relu(m.n1(a)))
        return m.head(m.c2(F.relu(m.n2(torch.cat([a, b], 1)))))

    return Wired(
        wire, c0=conv(3, 8), c1=conv(8, 4), c2=conv(12, 6), n1=nn.BatchNorm2d(8), n2=nn.BatchNorm2d(12), head=head(6)
    )


def flattened() -> nn.Sequential:
    return nn.Sequential(
        conv(3, 8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 16, 10), nn.ReLU(), nn.Linear(10, 5)
    )


def squeeze_excite() -> Wired:
    def wire(m: Any, x: Tensor) -> Tensor:
        x = m.first(x)
        return m.head(m.second(x * torch.sigmoid(m.up(F.relu(m.down(x.mean((2, 3), keepdim=True)))))))

    return Wired(
        wire,
        first=conv(3, 8),
        down=conv(8, 4, kernel=1, padding=0),
        up=conv(4, 8, kernel=1, padding=0),
        second=conv(8, 6),
        head=head(6),
    )


def shuffle(x: Tensor) -> Tensor:
    return x.view(x.shape[0], 2, x.shape[1] // 2, *x.shape[2:]).transpose(1, 2).flatten(1, 2)


def encoder(norm_first: bool = True) -> Wired:
    layer = nn.TransformerEncoderLayer(24, 4, 20, batch_first=True, norm_first=norm_first)
    stack = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return Wired(
        lambda m, x: m.out(m.stack(m.embed(x.flatten(2).transpose(1, 2))).mean(1)),
        embed=nn.Linear(3, 24),
        stack=stack,
        out=nn.Linear(24, 5),
    )


def grouped_query() -> Wired:
    """Four query heads on two key heads of three features, one of the projections fused."""

    def wire(m: Any, x: Tensor) -> Tensor:
        x = m.embed(x.flatten(2).transpose(1, 2))
        q = m.q(x).unflatten(2, (-1, 3)).transpose(1, 2)
        k, v = m.kv(x).unflatten(2, (2, -1, 3)).permute(2, 0, 3, 1, 4)
        k, v = (t.repeat_interleave(2, 1) for t in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + m.proj(mixed)
        return m.out((F.silu(m.gate(x)) * m.up(x)) @ m.down.weight.T)

    linears = {
        "embed": nn.Linear(3, 8),
        "q": nn.Linear(8, 12, bias=False),
        "kv": nn.Linear(8, 12),
        "proj": nn.Linear(12, 8),
        "gate": nn.Linear(8, 10),
        "up": nn.Linear(8, 10),
        "down": nn.Linear(10, 8, bias=False),
        "out": nn.Linear(8, 5),
    }
    return Wired(wire, **linears)


def reused() -> Wired:
    return Wired(
        lambda m, x: m.head(m.same(F.relu(m.same(F.relu(m.first(x)))))), first=conv(3, 8), same=conv(8, 8), head=head(8)
    )


def auxiliary() -> Wired:
    """Another head in training, behind a norm that takes no single sample then."""

    def wire(m: Any, x: Tensor) -> Any:
        x = F.relu(m.first(x))
        y = m.norm(m.second(x).mean((2, 3)))
        return (m.head(y), m.extra(x)) if m.training else m.head(y)

    return Wired(wire, first=conv(3, 8), second=conv(8, 6), norm=nn.BatchNorm1d(6), head=nn.Linear(6, 5), extra=head(8))


# name -> network, sizes of the groups that are exact
EXACT: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    "batch norm": (lambda: around(nn.Sequential(nn.BatchNorm2d(8), nn.ReLU())), {"first": 8, "second": 6}),
    "residual": (residual, {"c0": 8, "c1": 8}),
    "concatenation": (dense, {"c0": 8, "c1": 4, "c2": 6}),
    "flatten": (flattened, {"0": 8, "4": 10}),
    "squeeze and excite": (squeeze_excite, {"first": 8, "down": 4, "second": 6}),
    "depthwise": (lambda: around(conv(8, 8, groups=8)), {"first": 8, "second": 6}),
    "grouped": (
        lambda: around(nn.Sequential(conv(8, 12, groups=4), conv(12, 8))),
        {"first": 2, "middle.0": 3, "middle.1": 8, "second": 6},
    ),
    "group norm": (lambda: around(nn.GroupNorm(4, 8)), {"first": 4, "second": 6}),
    "instance norm": (lambda: around(nn.InstanceNorm2d(8, affine=True)), {"first": 8, "second": 6}),
    "prelu": (lambda: around(nn.PReLU(8)), {"first": 8, "second": 6}),
    "transposed": (lambda: around(nn.ConvTranspose2d(8, 8, 2, 2)), {"first": 8, "middle": 8, "second": 6}),
    "channel shuffle": (lambda: between(shuffle), {"first": 4, "second": 6}),
    "gated half": (lambda: between(lambda x: F.glu(torch.cat([x, x], 1), 1)), {"first": 8, "second": 6}),
    "chunk": (
        lambda: between(lambda x: torch.cat([x.chunk(2, 1)[1].relu(), x.chunk(2, 1)[0]], 1)),
        {"first": 4, "second": 6},
    ),
    "module reused": (reused, {"first": 8}),
    "encoder": (
        encoder,
        {f"stack.layers.{i}.{part}": n for i in range(2) for part, n in (("self_attn", 4), ("linear1", 20))},
    ),
    "grouped queries": (grouped_query, {"embed": 8, "q": 2, "gate": 10, "down": 8}),
    "auxiliary head": (auxiliary, {"first": 8, "second": 6}),
    "frozen norms": (lambda: frozen_norm(), {"second": 6}),
}


def frozen_norm() -> nn.Module:
    model = around(nn.BatchNorm2d(8))
    model.middle.requires_grad_(False)
    return model


def scattered() -> Wired:
    """A matrix of numbers, each of which scales a channel of its own."""
    return Wired(
        lambda m, x: m.head(m.second((m.table * m.table).flatten().view(1, 8, 1, 1) * m.first(x))),
        first=conv(3, 8),
        second=conv(8, 6),
        head=head(6),
        table=nn.Parameter(torch.ones(2, 4)),
    )


# name -> network, what the reason of `first` says; its second convolution stays prunable
VIOLATIONS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "softmax over channels": (lambda: between(lambda x: x.softmax(1)), "softmax"),
    "constant added": (lambda: between(lambda x: x.relu() + 1), "zeroed units still change the outputs"),
    "sigmoid": (lambda: between(torch.sigmoid), "zeroed units still change the outputs"),
    "norm without weights": (lambda: around(nn.BatchNorm2d(8, affine=False)), "leaves a constant"),
    "group norm of one group": (lambda: around(nn.GroupNorm(1, 8)), "one unit"),
    "mean over channels": (lambda: between(lambda x: x - x.mean(1, keepdim=True)), "mean"),
    "sorted channels": (lambda: between(lambda x: x.sort(1).values), "sort"),
    "fixed reshape": (
        lambda: between(lambda x: x.view(-1, 8, x.shape[2], x.shape[3])),
        "does not run without its units",
    ),
    "fixed constant": (lambda: between(lambda x: x * torch.linspace(1, 2, 8).view(1, 8, 1, 1)), "does not run"),
    "cumulative sum": (lambda: between(lambda x: x.cumsum(1)), "cumsum"),
    "input added": (lambda: between(lambda x: x[:, :3] + x.new_ones(1), 3), "zeroed units"),
    "table of channels": (scattered, "table is shared by its units in a way that cannot be sliced"),
    "unknown operator": (lambda: between(lambda x: torch.fft.fft(x, dim=1).real), "operator"),
}
