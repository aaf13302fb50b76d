"""Synaptic flow."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pl_prune.core.criterion import Criterion
from pl_prune.core.neutral import neutral_norms
from pl_prune.core.probe import Probe
from pl_prune.core.types import PruneError, Scores, check_count

_ADVICE = (
    "SynFlow is not defined for this network's activations (sigmoid, GELU, softmax, attention): use another criterion."
)


@dataclass(frozen=True)
class SynFlow(Criterion):
    """Score every entry by w dR/dw for R = 1^T f(1) with absolute weights: the flow of ones through it.

    In float64, without biases and with norm layers as the identity, so that the scores of every cut through the
    network sum to R. No data: of a batch only the shape is
    used.

    Args:
        rounds: How many times to score and prune.

    Source:
        Tanaka et al., Pruning neural networks without any data by iteratively conserving synaptic flow, equation 3
        and algorithm 1. Divergences: the original keeps batch norm
        with absolute statistics, which is no longer homogeneous once a mean is not zero; it computes in float32,
        which overflows in deep networks. The density schedule is the
        original's; that in the code of Gollini Navarrete et al. is inverted, which empties nearly all layers.
    """

    rounds: int = 100
    needs_loss: ClassVar[bool] = False

    @property
    def cost(self) -> str:
        """Rounds of one made-up sample."""
        return f"{self.rounds} passes of one sample"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("SynFlow.rounds", self.rounds)

    def __call__(self, probe: Probe) -> Scores:
        """Score the network as it is masked now.

        Args:
            probe: The model, its parameters and a batch.

        Returns:
            Non-negative float64 scores.

        Raises:
            PruneError: If the model takes integers, cannot be run, or its flow is not homogeneous or overflows.
        """
        weights = {name: p.detach().abs().double() for name, p in probe.model.named_parameters()}
        weights = {name: torch.zeros_like(w) if name.endswith("bias") else w for name, w in weights.items()}
        leaves = {name: weights[name].requires_grad_() for name in probe.params}
        buffers = {name: b.abs().double() for name, b in probe.model.named_buffers() if b.is_floating_point()}
        ones = self._ones(probe)
        default = torch.get_default_dtype()
        fast = torch.backends.mha.get_fastpath_enabled()

        def flow(x: Tensor) -> Tensor:
            output = torch.func.functional_call(probe.model, {**weights, **buffers}, (x,))
            return torch.stack([
                o.sum() for o in tree_leaves(output) if isinstance(o, Tensor) and o.is_floating_point()
            ]).sum()

        try:
            torch.set_default_dtype(torch.float64)
            torch.backends.mha.set_fastpath_enabled(False)
            with neutral_norms(probe.model):
                total = flow(ones)
                with torch.no_grad():
                    doubled = flow(2 * ones)
        except (TypeError, NotImplementedError, AttributeError) as error:
            raise PruneError(
                f"Expected {type(probe.model).__name__}.forward(inputs) to run; found {type(error).__name__}: {error}. "
                "SynFlow needs it: define it, or use another criterion."
            ) from error
        finally:
            torch.set_default_dtype(default)
            torch.backends.mha.set_fastpath_enabled(fast)
        once, twice = total.item(), doubled.item()
        if not math.isfinite(twice):
            raise PruneError(
                f"Expected a finite flow; found {twice} in float64. Lower the initial weights' scale, or use another criterion."
            )
        if abs(twice - 2 * once) > 1e-6 * abs(twice):
            raise PruneError(
                f"Expected a flow that doubles with its input, as with ReLU and no softmax; found {twice:.6g} for twice the "
                f"input of {once:.6g}. {_ADVICE}"
            )
        grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        scores = {
            name: torch.zeros_like(w) if g is None else w.detach() * g
            for (name, w), g in zip(leaves.items(), grads, strict=True)
        }
        negative = [name for name, score in scores.items() if float(score.min()) < -1e-6 * float(score.abs().max())]
        if negative:
            raise PruneError(
                f"Expected a flow that grows with every weight; found one that shrinks with weights of {negative[0]}. {_ADVICE}"
            )
        return scores

    def _ones(self, probe: Probe) -> Tensor:
        if not probe.batches:
            raise PruneError(
                "Expected a batch on every rank, for its shape; found a rank without one. Pass at least one sample each."
            )
        batch = probe.batches[0]
        inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
        if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
            found = inputs.dtype if isinstance(inputs, Tensor) else type(inputs).__name__
            raise PruneError(
                f"Expected batches of (inputs, ...) with floating-point inputs; found {found}. SynFlow feeds ones in their place: "
                "give the module `scoring_dataloader()` with such batches, or use another criterion."
            )
        return torch.ones_like(inputs[:1], dtype=torch.float64)
