"""Running statistics of batch norms, pooled over data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm
from torch.nn.modules.batchnorm import _BatchNorm

from pl_prune.core import sync
from pl_prune.core.sandbox import untouched
from pl_prune.core.types import PruneError

_ASIDE: ContextVar[bool] = ContextVar("aside", default=False)


def tracking_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Find the batch norms that keep running statistics.

    Args:
        model: Any module.

    Returns:
        Modules by name.
    """
    return {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is not None}


def never_ran(model: nn.Module) -> bool:
    """Say whether no batch norm has seen a batch yet.

    Args:
        model: Any module.

    Returns:
        True if there is a tracking batch norm and all of them still count no batch.
    """
    counts = [m.num_batches_tracked for m in tracking_norms(model).values()]
    return bool(counts) and all(n is not None and not int(n) for n in counts)


@contextmanager
def uncounted() -> Iterator[None]:
    """Run passes that a warm-up does not measure, because they are not the training's own: those of an attack.

    Yields:
        None.
    """
    token = _ASIDE.set(True)
    try:
        yield
    finally:
        _ASIDE.reset(token)


def pooled_moments(
    model: nn.Module, batches: Iterable[Any], run: Callable[[Any], object]
) -> tuple[dict[str, Tensor], int]:
    """Measure the inputs of every batch norm over all batches and ranks, and leave the model as it was.

    Batches are normalised by their own statistics, as in training, so that one pass is right at every depth and the
    order of the batches has no influence. Everything but the batch norms is in evaluation mode.

    Args:
        model: The network.
        batches: The batches of this rank.
        run: Executes the network on a batch.

    Returns:
        For each batch norm (3, C) in float64: values per channel, their sum and their sum of squares; and the number of
        batches of all ranks.

    Raises:
        PruneError: If no rank has a batch, or a pass fails on any rank.

    Source:
        Gollini Navarrete et al. (What Scalable Second-Order Information Knows for Pruning at Initialization), section
        3:
        one pass with frozen weights. Divergence: their code keeps an exponential average of the last batches, with
        dropout active, and unfreezes frozen parameters.
    """
    norms = tracking_norms(model)
    moments = {name: torch.zeros(3, m.num_features, dtype=torch.float64) for name, m in norms.items()}
    count, error = 0, None

    def watched(name: str, norm: _BatchNorm) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            flat = x.detach().transpose(0, 1).flatten(1).double()
            n = torch.full((len(flat),), float(flat.shape[1]), dtype=torch.float64)
            if not _ASIDE.get():
                moments[name] += torch.stack([n, flat.sum(1).cpu(), flat.square().sum(1).cpu()])
            if flat.shape[1] < 2:  # one value has no variance
                return batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
            return batch_norm(x, None, None, norm.weight, norm.bias, training=True, eps=norm.eps)

        return forward

    try:
        with untouched(model):
            for name, norm in norms.items():
                norm.__dict__["forward"] = watched(name, norm)  # `untouched` takes it away again
            for batch in batches:
                run(batch)
                count += 1
    except Exception as caught:
        error = caught
    sync.agree(error)
    device = next(model.parameters()).device
    total = torch.tensor(float(count), device=device)
    moments = {name: m.to(device) for name, m in moments.items()}
    sync.sum_([total, *moments.values()])
    if not int(total):
        raise PruneError("Expected at least one batch to warm up on; found none. Pass data, or set bn_warmup='never'.")
    return moments, int(total)


@torch.no_grad()
def set_statistics(model: nn.Module, moments: dict[str, Tensor], batches: int) -> None:
    """Set running means and (unbiased) variances from pooled moments; a norm that never ran keeps its own.

    Args:
        model: The network.
        moments: What `pooled_moments` returned.
        batches: Number of batches, added to `num_batches_tracked`.
    """
    for name, norm in tracking_norms(model).items():
        n, total, squares = moments[name]
        if float(n.min()) > 1:
            assert norm.running_mean is not None
            assert norm.running_var is not None
            mean = total / n
            norm.running_mean.copy_(mean)
            norm.running_var.copy_((squares - n * mean.square()).clamp(min=0) / (n - 1))
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked += batches
