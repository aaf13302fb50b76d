"""The interface of a criterion."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from pl_prune.core.types import Scores

if TYPE_CHECKING:
    from pl_prune.core.probe import Probe


class Criterion(ABC):
    """Score every prunable entry; higher = keep.

    A criterion is a frozen dataclass whose fields are its hyper-parameters. It never sees a target sparsity, a rank or a mask.

    Attributes:
        needs_data: Whether the scores depend on a batch.
    """

    needs_data: ClassVar[bool] = True

    @abstractmethod
    def __call__(self, probe: Probe) -> Scores:
        """Score the parameters of the probe.

        Args:
            probe: The model, its prunable parameters and, where there is data, its loss.

        Returns:
            Scores of the names and shapes of `probe.params`.
        """
