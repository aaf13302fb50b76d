"""Gradient signal preservation."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar, Literal

from pl_prune.core.criterion import Criterion
from pl_prune.core.neutral import batch_norms_in_training
from pl_prune.core.probe import Probe
from pl_prune.core.types import Scores, check_positive


@dataclass(frozen=True)
class GraSP(Criterion):
    """Score every entry by w (H g), to first order the loss of gradient norm when it is removed.

    w (H g) is w times the gradient of |g|^2 / 2: the entries of the lowest scores, whose removal raises the norm of the
    gradient most, go first.

    Args:
        temperature: Divides the logits of the cross-entropy; 1 keeps the module's own loss.
        inverted: Score by -w (H g), as the code of Gollini Navarrete et al. does, which keeps what the authors of
            GraSP remove.
        bn_mode: "eval" uses running statistics, so that cutting the data otherwise changes nothing; "train" uses
            those of each batch and differentiates through them, as the
            official code does.

    Source:
        Wang et al., Picking winning tickets before training by preserving gradient flow, equation 8. Divergences from
        the official code: evaluation mode by default; the
        final layer is not re-initialised; g is over the prunable weights. In that of Gollini Navarrete et al. the
        sign is inverted, there is no temperature, and g spans
        all parameters.
    """

    temperature: float = 200.0
    inverted: bool = False
    bn_mode: Literal["eval", "train"] = "eval"
    needs_logits: ClassVar[bool] = True
    curvature: ClassVar[str] = "Hessian times gradient"

    @property
    def cost(self) -> str:
        """A gradient and a Hessian product with it."""
        return "1 pass, 1 Hessian product"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("GraSP.temperature", self.temperature)

    def __call__(self, probe: Probe) -> Scores:
        """Take one gradient over all data, then one Hessian product with it.

        Args:
            probe: The model, its parameters and its data.

        Returns:
            Signed scores in float32, or float64 for float64 parameters.
        """
        tempered = probe.tempered(self.temperature)
        with batch_norms_in_training(probe.model) if self.bn_mode == "train" else nullcontext():
            tempered = tempered.fresh() if self.bn_mode == "train" else tempered
            product = tempered.hvp(tempered.grads())
        sign = -1 if self.inverted else 1
        return {name: sign * w * product[name] for name, w in probe.weights().items()}
