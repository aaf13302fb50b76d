"""The interface of a criterion."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal, get_args, get_origin, get_type_hints

from pl_prune.core.types import Scores, check_choice

if TYPE_CHECKING:
    from pl_prune.core.probe import Probe


class Criterion(ABC):
    """Score every prunable entry; higher = keep.

    A criterion is a frozen dataclass whose fields are its hyper-parameters. It never sees a target sparsity, a rank
    or a mask.

    Attributes:
        needs_data: Whether a batch is needed, be it for its shape alone.
        needs_loss: Whether the loss of the batches is needed.
        needs_logits: Whether the model must return logits for `batch[0]`, and `batch[1]` hold class labels.
        uses_gradients: Whether anything is differentiated.
        curvature: Which second derivatives are used or estimated, in words.
        can_return: Whether an entry that one round pruned may be kept by the next.
        layerwise_only: Whether scores order the entries of a layer and compare nothing between layers, so that only an
            allocation with a budget for each layer may select by them.
        rounds: How many times the network is scored, each time as masked so far.
    """

    needs_data: ClassVar[bool] = True
    needs_loss: ClassVar[bool] = True
    needs_logits: ClassVar[bool] = False
    uses_gradients: ClassVar[bool] = True
    curvature: ClassVar[str] = "none"
    can_return: ClassVar[bool] = False
    layerwise_only: ClassVar[bool] = False
    rounds: int = 1

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            if get_origin(kind) is Literal:
                check_choice(f"{type(self).__name__}.{name}", getattr(self, name), get_args(kind))

    @property
    def cost(self) -> str:
        """What scoring takes; a pass is one forward and backward pass over the scoring samples."""
        return "1 pass"

    @abstractmethod
    def __call__(self, probe: Probe) -> Scores:
        """Score the parameters of the probe.

        Args:
            probe: The model, its prunable parameters and, where there is data, its loss.

        Returns:
            Scores of the names and shapes of `probe.params`.
        """
