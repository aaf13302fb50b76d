"""`Probe`: what a criterion may ask of a model and its data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pl_prune.core import sync
from pl_prune.core.batch import batch_size
from pl_prune.core.hessian import hessian_products
from pl_prune.core.loss import Loss, check_separable, checked_loss, class_logits
from pl_prune.core.persample import squared_sums
from pl_prune.core.types import Params, PruneError, Scores, score_dtype

T = TypeVar("T")
Track = Callable[[Iterable[Any], str], Iterable[Any]]


def _silent(items: Iterable[T], _: str) -> Iterator[T]:
    return iter(items)


class Probe:
    """Derivatives of the mean loss, over all samples of all batches and of all ranks.

    Every quantity is the same however the samples are cut into batches, as long as samples do not interact
    (norm layers in evaluation mode, a loss that is a mean over samples). What is asked for twice is computed once.

    Args:
        model: The network, in the mode it is to be scored in.
        params: Its prunable parameters.
        loss: `loss(model, batch)`, the mean loss of a batch; None where there is no data.
        batches: The batches of this rank; a rank may have none.
        track: Wraps an iterable and a label, to show progress.
        dense: The weights before any round pruned them, in the place of those of `params`.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Params,
        loss: Loss | None = None,
        batches: Sequence[Any] = (),
        track: Track = _silent,
        dense: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.model = model
        self.params = params
        self.batches = batches
        self._loss = loss
        self.track = track
        self.dense = dense or params
        self._known: dict[str, Scores] = {}
        self._tempered: dict[float, Probe] = {}

    def fresh(self, dense: Mapping[str, Tensor] | None = None) -> Probe:
        """Return a probe that knows nothing yet, for weights that have changed.

        Args:
            dense: The weights before any round pruned them.

        Returns:
            A probe of the same model and data.
        """
        return Probe(self.model, self.params, self._loss, self.batches, self.track, dense)

    def tempered(self, temperature: float) -> Probe:
        """Return a probe whose loss is the cross-entropy of `logits / temperature`.

        Args:
            temperature: Divides the logits; at 1 the user's own loss is kept.

        Returns:
            A probe of the same model and data.
        """
        if temperature == 1.0:
            return self
        if temperature not in self._tempered:

            def loss(_: nn.Module, batch: Any) -> Tensor:
                logits, labels = self.logits(batch)
                return cross_entropy(logits / temperature, labels)

            self._tempered[temperature] = Probe(self.model, self.params, loss, self.batches, self.track, self.dense)
        return self._tempered[temperature]

    def logits(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return the logits of a batch and its class labels.

        Args:
            batch: `(inputs, labels)`.

        Returns:
            Logits (N, C) and labels (N,).

        Raises:
            PruneError: If the batch is of another form, or the model does not map its inputs to class logits.
        """
        return class_logits(self.model, batch)

    def weights(self) -> Scores:
        """Return the weights in the precision of scores.

        Returns:
            Detached tensors in float32, or float64 for float64 parameters.
        """
        return {name: p.detach().to(score_dtype(p)) for name, p in self.params.items()}

    def zeros(self) -> list[Tensor]:
        """Return zeros in the precision of scores.

        Returns:
            Tensors in the order and shapes of `params`.
        """
        return [torch.zeros_like(p, dtype=score_dtype(p)) for p in self.params.values()]

    def grads(self) -> Scores:
        """Return the gradient of the mean loss.

        Returns:
            Tensors of the names and shapes of `params`, in float32, or float64 for float64 parameters; zeros for a
            parameter that the loss does not depend on.
        """
        return self.remember("gradients", lambda: self.mean("gradients", self._summed_grads))

    def squared_grads(self) -> Scores:
        """Return the mean, over samples, of the squared gradient of each sample's own loss: the diagonal of the empirical Fisher matrix.

        Returns:
            Tensors of the names and shapes of `params`.

        Raises:
            PruneError: If the loss of a batch is not the mean of its samples' losses.
        """

        def squares(batch: Any, size: int, first: int) -> Iterable[Tensor]:
            def summed(part: Any) -> Tensor:
                return self.batch_loss(part) * batch_size(part)

            assert self._loss is not None
            if not first:
                check_separable(self._loss, self.model, batch, size)
            return squared_sums(self.model, self.params, summed, batch, size)

        return self.remember("squared gradients", lambda: self.mean("squared gradients", squares))

    def squared_batch_grads(self) -> Scores:
        """Return the mean, over batches, of the squared gradient of each batch's mean loss. It depends on how the data are cut.

        Returns:
            Tensors of the names and shapes of `params`.
        """

        def squares(batch: Any, size: int, _: int) -> Iterable[Tensor]:
            return [(grad / size).square() for grad in self._summed_grads(batch, size)]

        batches = torch.tensor(float(len(self.batches)), device=next(iter(self.params.values())).device)
        sync.sum_([batches])
        share = self.numbering()[1] / float(batches)
        return {name: value * share for name, value in self.mean("squared batch gradients", squares).items()}

    def hvp(self, vector: Scores) -> Scores:
        """Multiply the Hessian of the mean loss, restricted to `params`, by a vector.

        Args:
            vector: Tensors of the names and shapes of `params`, the same on every rank.

        Returns:
            Tensors of the names and shapes of `params`.
        """

        def product(batch: Any, size: int, _: int) -> Iterable[Tensor]:
            (result,) = self.batch_hvps(batch, [list(vector.values())])
            return [hv * size for hv in result]

        return self.mean("Hessian products", product)

    def batch_hvps(self, batch: Any, vectors: Iterable[list[Tensor]]) -> Iterator[list[Tensor]]:
        """Multiply the Hessian of one batch's mean loss by vectors, on one graph.

        Args:
            batch: The batch.
            vectors: Tensors in the order of `params`.

        Returns:
            Products in the order of `params`, zeros where the second derivative vanishes.
        """
        return hessian_products(lambda: self.batch_loss(batch), list(self.params.values()), vectors)

    def remember(self, key: str, compute: Callable[[], Scores]) -> Scores:
        """Compute once what several criteria ask for.

        Args:
            key: Names the quantity.
            compute: Computes it.

        Returns:
            A copy, free to be changed.
        """
        if key not in self._known:
            self._known[key] = compute()
        return {name: value.clone() for name, value in self._known[key].items()}

    def numbering(self) -> tuple[Tensor, int]:
        """Number the samples of all ranks, in turns where the ranks hold them so, else rank after rank.

        Called by all ranks together.

        Returns:
            The numbers of this rank's samples, on the CPU, and how many samples there are.

        Raises:
            PruneError: If a batch is of no known size.
        """
        rank, size = sync.rank_and_size()
        counts = torch.zeros(size, device=next(iter(self.params.values())).device)
        error = None
        try:
            counts[rank] = sum(map(batch_size, self.batches))
        except PruneError as caught:
            error = caught
        sync.agree(error)
        sync.sum_([counts])
        held = [int(n) for n in counts]
        total, local = sum(held), torch.arange(held[rank])
        in_turns = held == [len(range(r, total, size)) for r in range(size)]
        return (rank + size * local if in_turns else sum(held[:rank]) + local), total

    def mean(self, label: str, contribution: Callable[[Any, int, int], Iterable[Tensor]]) -> Scores:
        """Sum what every batch contributes, over all batches and ranks, and divide by the number of samples.

        Args:
            label: What is computed, for the progress bar.
            contribution: `contribution(batch, size, first)` returns tensors in the order of `params`, summed over the
                batch's samples; `first` is the place of its first sample among this rank's.

        Returns:
            Tensors of the names and shapes of `params`, in float32, or float64 for float64 parameters.

        Raises:
            PruneError: If there is no data, or a contribution fails on any rank.
        """
        total = [torch.empty_like(p, dtype=score_dtype(p)) for p in self.params.values()]
        count, error = 0, None
        try:
            if self._loss is None or (not self.batches and sync.rank_and_size()[1] == 1):
                missing = "loss function" if self._loss is None else "batches"
                raise PruneError(
                    f"Expected batches and a loss function, which this criterion needs; found no {missing}. Pass both."
                )
            for batch in self.track(self.batches, label):
                size = batch_size(batch)
                for sum_, part in zip(total, contribution(batch, size, count), strict=True):
                    if count:
                        sum_.add_(part.detach())
                    else:
                        sum_.copy_(part.detach())
                count += size
        except Exception as caught:
            error = caught
        sync.agree(error)
        if not count:
            total = self.zeros()
        samples = torch.tensor(float(count), device=total[0].device, dtype=total[0].dtype)
        sync.sum_([*total, samples])
        if not float(samples):
            raise PruneError("Expected at least one sample on some rank; found none. Pass batches that are not empty.")
        return {name: sum_.div_(float(samples)) for name, sum_ in zip(self.params, total, strict=True)}

    def batch_loss(self, batch: Any) -> Tensor:
        """Return the mean loss of a batch.

        Args:
            batch: The batch.

        Returns:
            A finite scalar with a gradient.

        Raises:
            PruneError: If the loss is anything else.
        """
        assert self._loss is not None
        return checked_loss(self._loss, self.model, batch)

    def _summed_grads(self, batch: Any, size: int, _: int = 0) -> Iterable[Tensor]:
        params = list(self.params.values())
        loss = self.batch_loss(batch)
        grads = torch.autograd.grad(loss, params, torch.full_like(loss, size), allow_unused=True)
        if all(grad is None for grad in grads):
            raise PruneError(
                "Expected a loss that depends on the prunable parameters; found that it depends on none of them. "
                "Look at what the loss is computed from, or change the selection."
            )
        return (torch.zeros(()).to(p) if grad is None else grad for p, grad in zip(params, grads, strict=True))
