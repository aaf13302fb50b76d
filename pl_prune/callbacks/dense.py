"""`Dense`: the baseline that prunes nothing."""

from __future__ import annotations

from pl_prune.callbacks.base import PruningCallback
from pl_prune.callbacks.bridge import Bridge
from pl_prune.core.masks import MaskSet
from pl_prune.core.samples import Samples


class Dense(PruningCallback):
    """Prune nothing: the explicit dense twin of a run, bit for bit the run without a callback."""

    def __init__(self) -> None:
        super().__init__(select=None, samples=Samples())

    @property
    def method(self) -> str:
        """The method and its settings, in one line."""
        return "dense"

    def make_masks(self, bridge: Bridge) -> MaskSet:
        """Make empty masks; never called in a fit.

        Args:
            bridge: The module, its data and its loss.

        Returns:
            No mask.
        """
        return MaskSet({})
