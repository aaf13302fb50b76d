"""`PruneCLI`: LightningCLI with the key `prune`, and the commands built on it."""

from __future__ import annotations

import json
import sys
import warnings
from contextlib import redirect_stderr
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

import pl_prune
from pl_prune.callbacks.base import PruningCallback, pruning_callbacks
from pl_prune.callbacks.gradual import GradualPruning
from pl_prune.callbacks.record import RunRecord, refuse_finished
from pl_prune.callbacks.report import SparsityReport, make_report
from pl_prune.core.files import load_weights
from pl_prune.core.select import Select
from pl_prune.core.types import PruneError
from pl_prune.runs.folder import RunFolder
from pl_prune.runs.plan import Spec


class PruneCLI(LightningCLI):
    """LightningCLI whose key `prune` holds the pruning callback, so that a sweep can say `--prune.sparsity=0.9`.

    The key `weights` names a file of weights to start from. Takes the arguments of `LightningCLI`. Without `prune`, the
    run is dense. A second run may overwrite the saved
    configuration of the first, which every sweep needs.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["save_config_kwargs"] = {"overwrite": True, **(kwargs.get("save_config_kwargs") or {})}
        super().__init__(*args, **kwargs)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, without the warning that `args` and the process's own arguments differ: here one is made from the other.

        Args:
            parser: The parser.
            args: A list of arguments, a dict or a namespace; None for those of the process.
        """
        if isinstance(args, list):
            self.config = parser.parse_args(args)
        else:
            super().parse_arguments(parser, args)

    def instantiate_classes(self) -> None:
        """Build everything, then load `weights`.

        Raises:
            PruneError: If `weights` meets `ckpt_path`, or does not fit.
        """
        super().instantiate_classes()
        weights = self._get(self.config, "weights")
        if weights:
            if self._get(self.config, "ckpt_path"):
                raise PruneError(
                    "Expected --weights or --ckpt_path; found both. --ckpt_path resumes a run with its optimizer and masks, "
                    "--weights (null switches it off) starts a new one from weights alone."
                )
            load_weights(self.model, weights)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        callbacks = [cb for cb in callbacks if cb is not None]  # `--prune=null`
        return super()._instantiate_trainer(
            config, [*callbacks, RunRecord()] if self.subcommand == "fit" else callbacks
        )

    def before_fit(self) -> None:
        """Refuse a finished run's folder before a logger opens it, which would empty its files."""
        refuse_finished(self.trainer)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the keys `prune` and `weights`.

        Args:
            parser: The parser of one command.
        """
        parser.add_argument(
            "--weights",
            type=str | None,
            help="file of weights to start from: a checkpoint of any run, a state_dict, or .safetensors; "
            "optimizer and schedule start afresh",
        )
        parser.add_lightning_class_args(PruningCallback, "prune", subclass_mode=True, required=False)
        parser.set_defaults({"prune": {"class_path": "pl_prune.Dense"}})


class Inspect(PruneCLI):
    """Parse a recipe for `fit`, score and prune as it would, print the report, and train nothing."""

    def before_instantiate_classes(self) -> None:
        """Switch off what would leave files."""
        self.config.fit.trainer.logger = False
        self.config.fit.trainer.enable_model_summary = False
        self.save_config_callback = None

    def fit(self, model: Any, **kwargs: Any) -> None:
        """Run the fit up to its first step.

        Args:
            model: The module.
            **kwargs: The other arguments of `Trainer.fit`.
        """
        self.trainer.callbacks.append(_ShowReport())  # type: ignore[attr-defined]
        self.trainer.fit_loop.epoch_loop.max_steps = 0
        self.trainer.num_sanity_val_steps = 0
        self.trainer.fit(model, **kwargs)


class StudyRun(PruneCLI):
    """One run of a study: quiet, resumable, and reported."""

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        trainer = super()._instantiate_trainer(config, callbacks)
        present: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if not any(isinstance(cb, SparsityReport) for cb in present):
            present.append(SparsityReport())
        if not any(isinstance(cb, ModelCheckpoint) and cb.save_last for cb in present):
            present.append(ModelCheckpoint(save_last=True))  # checkpoint callbacks come last
        return trainer

    @classmethod
    def train(cls, spec: Spec, run: RunFolder) -> None:
        """Train a run to its end, from its last checkpoint where there is one.

        Args:
            spec: What to run.
            run: Its folder.

        Raises:
            PruneError: If the configuration cannot be parsed.
        """
        run.path.mkdir(parents=True, exist_ok=True)
        values = {
            **spec.values,
            "trainer.logger": {
                "class_path": "lightning.pytorch.loggers.CSVLogger",
                "init_args": {"save_dir": str(run.path.parent), "name": "", "version": run.path.name},
            },
            "trainer.enable_progress_bar": False,
            "trainer.enable_model_summary": False,
        }
        settings = run.path / "settings.json"
        settings.write_text(json.dumps(values, indent=1))
        words = [word for file in (*spec.config, str(settings)) for word in ("--config", file)]
        resume = ["--ckpt_path", str(run.checkpoint)] if run.checkpoint else []
        log = run.path / "log.txt"
        try:
            with log.open("a") as said, redirect_stderr(said), warnings.catch_warnings():
                for known in ("Experiment logs directory", "Checkpoint directory", "The dirpath has changed"):
                    warnings.filterwarnings("ignore", known)  # the folder is this run's own
                cls(args=["fit", *words, *resume])
        except SystemExit as error:
            last = log.read_text().strip().splitlines()[-1:]
            raise PruneError(
                f"Expected settings that `pl-prune fit` takes for {spec.key!r}; found {''.join(last)!r}. Try `pl-prune fit`."
            ) from error


class _ShowReport(Callback):
    """Write the report to the standard output, once every other callback has pruned."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pruning = pruning_callbacks(trainer)
        if not any(cb.masks for cb in pruning if trainer.ckpt_path or not isinstance(cb, GradualPruning)):
            raise PruneError(
                "Expected a recipe that prunes at the start of the fit; found none. Add `--prune PruneAtInit`, or look at a run that "
                "prunes while it trains with `--ckpt_path`."
            )
        text = make_report(trainer, pl_module, Select()).text()
        if trainer.is_global_zero:
            sys.stdout.write(text + "\n")


for _name in pl_prune.__all__:  # jsonargparse resolves short class names among imported classes alone
    getattr(pl_prune, _name)
