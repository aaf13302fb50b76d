"""`Probe`: what a criterion may ask of a model and its data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pl_prune.core import sync
from pl_prune.core.types import Params, PruneError, Scores

T = TypeVar("T")
Loss = Callable[[nn.Module, Any], Tensor]


def _silent(items: Iterable[T], _: str) -> Iterator[T]:
    return iter(items)


class Probe:
    """Derivatives of the mean loss, over all samples of all batches and of all ranks.

    Every quantity is the same however the samples are cut into batches, as long as samples do not interact
    (norm layers in evaluation mode, a loss that is a mean over samples).

    Args:
        model: The network, in the mode it is to be scored in.
        params: Its prunable parameters.
        loss: `loss(model, batch)`, the mean loss of a batch; None where there is no data.
        batches: The batches of this rank; a rank may have none.
        track: Wraps an iterable and a label, to show progress.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Params,
        loss: Loss | None = None,
        batches: Sequence[Any] = (),
        track: Callable[[Iterable[Any], str], Iterable[Any]] = _silent,
    ) -> None:
        self.model = model
        self.params = params
        self.batches = batches
        self._loss = loss
        self._track = track

    def grads(self) -> Scores:
        """Return the gradient of the mean loss.

        Returns:
            Tensors of the names and shapes of `params`, in float32, or float64 for float64 parameters; zeros for a
            parameter that the loss does not depend on.

        Raises:
            PruneError: If there is no data, or a loss is not a finite scalar that depends on the parameters.
        """
        params = list(self.params.values())
        total = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in params]
        count = torch.zeros((), dtype=torch.float64)
        error = None
        try:
            for batch in self._track(self._need_batches(), "gradients"):
                size = batch_size(batch)
                grads = torch.autograd.grad(self._mean_loss(batch), params, allow_unused=True)
                for sum_, grad in zip(total, grads, strict=True):
                    if grad is not None:
                        sum_.add_(grad, alpha=size)
                count += size
        except Exception as caught:
            error = caught
        sync.agree(error)
        count = count.to(total[0].device, total[0].dtype)
        sync.sum_([*total, count])
        samples = float(count)
        if not samples:
            raise PruneError("Expected at least one sample on some rank; found none. Pass batches that are not empty.")
        return {name: sum_.div_(samples) for name, sum_ in zip(self.params, total, strict=True)}

    def _need_batches(self) -> Sequence[Any]:
        if self._loss is None or (not self.batches and sync.rank_and_size()[1] == 1):
            missing = "a loss function" if self._loss is None else "batches"
            raise PruneError(
                f"Expected batches and a loss function, which this criterion needs; found no {missing}. Pass both."
            )
        return self.batches

    def _mean_loss(self, batch: Any) -> Tensor:
        assert self._loss is not None
        loss = self._loss(self.model, batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
            found = (
                f"a tensor of shape {tuple(loss.shape)} and {loss.dtype}" if isinstance(loss, Tensor) else f"{loss!r}"
            )
            raise PruneError(
                f"Expected the loss of a batch to be a scalar tensor, its mean; found {found}. Reduce it with `.mean()`."
            )
        if not loss.isfinite():
            raise PruneError(
                f"Expected a finite loss; found {loss.item()}. Look at the inputs and at the initial weights; "
                "a loss that overflows in half precision needs float32 weights."
            )
        if not loss.requires_grad:
            raise PruneError(
                "Expected a loss that depends on the prunable parameters; found one without a gradient. Remove `detach` or `no_grad`."
            )
        return loss.reshape(())


def batch_size(batch: Any) -> int:
    """Return the number of samples of a batch: the first dimension of its first tensor.

    Args:
        batch: Tensors in any nesting of tuples, lists and dicts.

    Returns:
        The number of samples.

    Raises:
        PruneError: If no tensor has a dimension.
    """
    for leaf in tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.ndim:
            return leaf.shape[0]
    raise PruneError(
        f"Expected a batch that holds a tensor whose first dimension counts samples; found {type(batch).__name__}."
    )
