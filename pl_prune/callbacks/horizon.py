"""How far a fit goes, for callbacks that prune while it runs."""

from __future__ import annotations

from math import ceil, inf

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException


def steps_left(trainer: Trainer) -> float:
    """Return how many optimizer steps the fit still has, infinite where nobody knows.

    Args:
        trainer: A trainer in a fit.

    Returns:
        Their number.
    """
    try:
        steps = trainer.estimated_stepping_batches
    except MisconfigurationException:  # accumulation that changes from epoch to epoch
        return inf
    averaging = any(getattr(cb, "_model_contains_batch_norm", False) for cb in trainer.callbacks)  # type: ignore[attr-defined]
    if averaging and trainer.num_training_batches < inf:
        # StochasticWeightAveraging adds an epoch that trains nothing, for the batch norms.
        epochs = (trainer.max_epochs or 0) - 1
        steps = min(steps, epochs * ceil(trainer.num_training_batches / trainer.accumulate_grad_batches))
    return steps - trainer.global_step if steps >= 0 else inf


def warn_of_trial(samples: int, steps: float) -> None:
    """Warn if CRIC may take more than half of a fit.

    Args:
        samples: How many optimizer steps it takes at most.
        steps: How many the fit still has.
    """
    if samples > steps / 2:
        rank_zero_warn(
            f"CRIC may take {samples} of the {steps:.0f} optimizer steps of this fit, and nothing is trained in these. Lower "
            "cric.max_cycles or cric.sampling_steps, or train longer."
        )


def warn_of_best(trainer: Trainer, last: int) -> None:
    """Warn if the best checkpoint may be one of a network that is not pruned to the end.

    Args:
        trainer: A trainer in a fit.
        last: The optimizer step at which pruning ends.
    """
    selecting = [cb for cb in trainer.checkpoint_callbacks if isinstance(cb, ModelCheckpoint) and cb.monitor]
    if selecting:
        rank_zero_warn(
            f"ModelCheckpoint keeps the best {selecting[0].monitor!r}, which may be that of a network not yet pruned to the end "
            f"(step {last}). Look at its group_sparsity, or use the last checkpoint, which save_last=True keeps."
        )
