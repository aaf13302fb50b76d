"""`ScoreSharpness`: how sharp the loss is in the space of scores while they are learned, and how far masks have moved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from pl_prune.adversarial.score_state import Scored
from pl_prune.adversarial.scored import ScoredWeights
from pl_prune.adversarial.sharpness import largest_eigenvalue, loss_difference, mask_stability
from pl_prune.callbacks.adversarial import AdversarialTraining
from pl_prune.callbacks.bridge import Bridge
from pl_prune.callbacks.refusals import refuse_other_lightning
from pl_prune.callbacks.score_learning import ScoreLearning
from pl_prune.core import sync
from pl_prune.core.batch import batch_size
from pl_prune.core.masks import MaskSet
from pl_prune.core.samples import Samples
from pl_prune.core.types import PruneError, check_count, check_positive, check_type


class ScoreSharpness(Callback):
    """Measure at the ends of epochs what `S2AP` is to make small, beside `S2AP` or `ScoreLearning`.

    Logged are `sharpness/largest_eigenvalue` (of the straight-through Hessian; of weights' scores, not of channels'),
    `sharpness/loss_difference_RHO`, and the Hamming distance to the masks at initialisation: `stability/hamming` of all entries,
    `stability/hamming_of_kept` of those kept. The loss is what `training_step` returns in evaluation mode, in the parameters' precision, on
    the same samples every time; beside `AdversarialTraining` it is the robust one, with examples that are made once a time. Every rank
    reads all samples. A fit is bit for bit what it is without this callback.

    Each time costs `iterations` + 1 double backward passes over the samples, 21 forward and backward passes for each radius, and one
    attack. The graph of all samples together is held meanwhile, and up to about 50 bytes for each selected weight.

    Args:
        every_n_epochs: Measure after every so many epochs; the values stand until the next time.
        iterations: Of the power iteration.
        rhos: Radii of the loss difference, as fractions of each score's absolute value; none: no loss difference.
        samples: Which samples of the scoring data to read.
        seed: Of the vector that the power iteration starts from.

    Raises:
        PruneError: If an argument is not of its kind.

    Source:
        S2AP, section 4.3 and appendix C; the radii are those of table 13. Divergence: the paper averages eigenvalues over all batches of an
        epoch.
    """

    def __init__(
        self,
        every_n_epochs: int = 1,
        iterations: int = 10,
        rhos: tuple[float, ...] = (0.001, 0.0025, 0.005, 0.0075, 0.01),
        samples: Samples = Samples(total=128, batch_size=128),
        seed: int = 0,
    ) -> None:
        check_count("every_n_epochs", every_n_epochs)
        check_count("iterations", iterations)
        check_type("samples", samples, Samples, "for example pl_prune.Samples(total=128)")
        if not isinstance(rhos, (tuple, list)):
            raise PruneError(f"Expected rhos to be several radii; found {rhos!r}. Write ({rhos!r},) for one.")
        for rho in rhos:
            check_positive("each of rhos", rho)
        self.every_n_epochs, self.iterations, self.rhos = every_n_epochs, iterations, tuple(rhos)
        self.samples, self.seed = samples, seed
        self._first: MaskSet | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a fit that learns no scores.

        Args:
            trainer: The trainer.
            pl_module: The module.
            stage: fit, validate, test or predict.
        """
        refuse_other_lightning(trainer)
        if stage == "fit":
            self._first = None
            _learning(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return the first masks, packed.

        Returns:
            Tensors and plain containers only.
        """
        return {} if self._first is None else {"first": self._first.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the first masks of a checkpoint.

        Args:
            state_dict: What `state_dict` returned.
        """
        self._first = MaskSet.from_state_dict(state_dict["first"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the masks at initialisation.

        Args:
            trainer: The trainer.
            pl_module: The module.
        """
        if self._first is None:
            if trainer.global_step:
                rank_zero_warn(
                    "Expected the first masks in the checkpoint; found none, since the run began without ScoreSharpness. "
                    "Hamming distances count from here."
                )
            self._first = _scored(trainer).masks().to("cpu")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure and log.

        Args:
            trainer: The trainer.
            pl_module: The module.
        """
        if (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            for name, value in sync.agreed(lambda: self._measure(trainer, pl_module)).items():
                pl_module.log(name, value, sync_dist=True)

    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        scored = _scored(trainer)
        assert self._first is not None
        bridge = Bridge(trainer, pl_module, _learning(trainer).select, self.samples)
        with bridge.quiet():
            batches = bridge._read(bridge.find_loader(), self.samples, share=False)
            sizes = [batch_size(batch) for batch in batches]

            def loss() -> Tensor:
                parts = [bridge.loss(pl_module, batch) * n for batch, n in zip(batches, sizes, strict=True)]
                return sum(parts[1:], parts[0]) / sum(sizes)

            for p in scored.params.values():
                p.requires_grad_()
            found = {}
            with _attacked_once(trainer):
                if isinstance(scored, ScoredWeights):
                    found["sharpness/largest_eigenvalue"] = largest_eigenvalue(scored, loss, self.iterations, self.seed)
                for rho in self.rhos:
                    found[f"sharpness/loss_difference_{rho:g}"] = loss_difference(scored, loss, rho)
        distance, of_kept = mask_stability(self._first, scored.masks().to("cpu"))
        return {**found, "stability/hamming": distance, "stability/hamming_of_kept": of_kept}


def _learning(trainer: Trainer) -> ScoreLearning:
    """Return the trainer's callback that learns scores."""
    found = [cb for cb in trainer.callbacks if isinstance(cb, ScoreLearning)]  # type: ignore[attr-defined]
    if len(found) != 1:
        raise PruneError(
            f"Expected one callback that learns scores, S2AP or ScoreLearning, beside ScoreSharpness; found {len(found)}. "
            f"{'Leave ScoreSharpness out' if found else 'Add one, or leave ScoreSharpness out'}."
        )
    return found[0]


def _scored(trainer: Trainer) -> Scored:
    scored = _learning(trainer).scored
    assert scored is not None
    return scored


@contextmanager
def _attacked_once(trainer: Trainer) -> Iterator[None]:
    """Let batches keep the adversarial examples that they first get, while the network moves."""
    attacker = next((cb for cb in trainer.callbacks if isinstance(cb, AdversarialTraining)), None)  # type: ignore[attr-defined]
    if attacker is None:
        yield
        return
    attack, made = attacker.examples, dict[int, Tensor]()

    def examples(trainer: Trainer, pl_module: LightningModule, batch: Any) -> Tensor:
        if id(batch) not in made:
            made[id(batch)] = attack(trainer, pl_module, batch)
        return made[id(batch)]

    attacker.examples = examples  # type: ignore[method-assign]
    try:
        yield
    finally:
        del attacker.examples
