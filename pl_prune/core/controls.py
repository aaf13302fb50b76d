"""Controls that a score has to beat: the same layer densities, with what the score says of single weights destroyed."""

from __future__ import annotations

from typing import Literal

import torch

from pl_prune.core.initialise import Init, initialise_
from pl_prune.core.masks import MaskSet
from pl_prune.core.seeds import generator_of
from pl_prune.core.topk import top_k
from pl_prune.core.types import Params, Scores

Control = Literal["shuffle", "reinitialise", "invert"]


def inverted(masks: MaskSet, scores: Scores) -> MaskSet:
    """Keep the lowest scores of each parameter instead of the highest; ties go to the lower flat index.

    Args:
        masks: Masks that say how many entries to keep.
        scores: Scores of their names and shapes.

    Returns:
        Masks that keep as many entries of each parameter.

    Source:
        Frankle et al., Pruning Neural Networks at Initialization: Why Are We Missing the Mark?, section 5 (inversion).
        Divergence: they invert the order over the whole network, which also moves the layer densities, so that a
        difference could come from either; here each layer keeps its density.

    >>> inverted(MaskSet({"a": torch.tensor([True, False, False])}), {"a": torch.tensor([3.0, 2.0, 1.0])})["a"]
    tensor([False, False,  True])
    """
    counts = masks.counts()
    return MaskSet({name: top_k([-scores[name]], kept)[0] for name, (kept, _) in counts.items()})


@torch.no_grad()
def reinitialise_(params: Params, init: Init | None = None, seed: int = 0) -> None:
    """Draw other weights in place, as if masks had been made for another initialisation.

    Args:
        params: The parameters, dense.
        init: The distribution that they were drawn from; None: a normal one of each parameter's own mean and standard
            deviation.
        seed: Seed; with it, a parameter's name and size alone decide what is drawn.

    Source:
        Frankle et al., Pruning Neural Networks at Initialization: Why Are We Missing the Mark?, section 5
        (reinitialization).
    """
    for name, parameter in params.items():
        generator = generator_of(seed, name)
        if init is not None:
            initialise_({name: parameter}, init, generator.initial_seed())
            continue
        values = parameter.detach().double()
        mean, std = values.mean(), values.std(correction=0)
        drawn = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(drawn.to(values.device) * std + mean)
