"""`PruneCLI`: LightningCLI with the key `prune`, and the commands built on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import yaml  # type: ignore[import-untyped]
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger

import pl_prune
from pl_prune.callbacks.adversarial import AdversarialTraining
from pl_prune.callbacks.base import PruningCallback, pruning_callbacks
from pl_prune.callbacks.gradual import GradualPruning
from pl_prune.callbacks.hesso import HESSO
from pl_prune.callbacks.loggers import log_settings, refuse_wandb
from pl_prune.callbacks.record import RunRecord, refuse_finished
from pl_prune.callbacks.report import make_report, run_folder
from pl_prune.core.files import load_weights
from pl_prune.core.select import Select
from pl_prune.core.types import PruneError
from pl_prune.report.table import PruningReport
from pl_prune.spelling import explain


class PruneCLI(LightningCLI):
    """LightningCLI whose key `prune` holds the pruning callback, so that a sweep can say `--prune.sparsity=0.9`.

    The key `adversarial` holds `AdversarialTraining`, if training is to be adversarial (`--adversarial.loss.beta=6`).
    The key `weights` names a file of weights to start from. Takes the arguments of `LightningCLI`. Without `prune`, the
    run is dense. A second run may overwrite the saved
    configuration of the first, which every sweep needs.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["save_config_kwargs"] = {"overwrite": True, **(kwargs.get("save_config_kwargs") or {})}
        kwargs.setdefault("parser_class", _Parser)
        if len(args) < 3:  # it may be given by position
            kwargs.setdefault("save_config_callback", _SaveConfig)
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
            load_weights(self.model, weights, bool(self._get(self.config, "new_head")))

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        callbacks = [cb for cb in callbacks if cb is not None]  # `--prune=null`
        return super()._instantiate_trainer(
            config, [*callbacks, RunRecord()] if self.subcommand == "fit" else callbacks
        )

    def before_fit(self) -> None:
        """Refuse a finished run's folder before a logger opens it, which would empty its files, and a fit of nothing.

        Raises:
            PruneError: If `limit_train_batches` is 0.
        """
        if self.trainer.limit_train_batches == 0:
            raise PruneError(
                "Expected batches to train on; found trainer.limit_train_batches=0. Leave it out, or look at the masks "
                "with `pl-prune inspect`."
            )
        refuse_finished(self.trainer)

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except Exception as error:
            refuse_wandb(error)
            raise

    def _spare_logs(self) -> None:
        """Keep a logger from emptying the metrics of an earlier run."""
        self.trainer.loggers = [
            _Silent(logger.save_dir, logger.name, logger.version)
            if isinstance(logger, CSVLogger) and Path(logger.log_dir, "metrics.csv").is_file()
            else logger
            for logger in self.trainer.loggers
        ]

    before_validate = before_test = before_predict = _spare_logs

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the keys `prune`, `adversarial`, `weights` and `new_head`.

        Args:
            parser: The parser of one command.
        """
        parser.add_argument(
            "--weights",
            type=str | None,
            help="file of weights to start from: a checkpoint of any run, a state_dict, or .safetensors; "
            "optimizer and schedule start afresh",
        )
        parser.add_argument(
            "--new_head",
            type=bool,
            default=False,
            help="with --weights: let the output layer keep its own weights, for another number of classes",
        )
        parser.add_lightning_class_args(PruningCallback, "prune", subclass_mode=True, required=False)
        parser.add_lightning_class_args(AdversarialTraining, "adversarial", subclass_mode=True, required=False)
        parser.set_defaults({"prune": {"class_path": "pl_prune.Dense"}, "adversarial": None})


class Inspect(PruneCLI):
    """Parse a recipe for `fit`, score and prune as it would, and train nothing.

    Attributes:
        report: What `fit` would have started with; None on every process but the first.
    """

    report: PruningReport | None = None

    def before_instantiate_classes(self) -> None:
        """Switch off what would leave files, and what shows the progress of a training."""
        self.config.fit.trainer.logger = False
        self.config.fit.trainer.enable_model_summary = False
        self.config.fit.trainer.enable_progress_bar = False
        self.save_config_callback = None

    def before_fit(self) -> None:
        """Let a fit without batches pass: nothing is trained."""

    def fit(self, model: Any, **kwargs: Any) -> None:
        """Run the fit up to its first step.

        Args:
            model: The module.
            **kwargs: The other arguments of `Trainer.fit`.

        Raises:
            PruneError: If the fit ran in other processes.
        """
        maker = _MakeReport()
        self.trainer.callbacks.append(maker)  # type: ignore[attr-defined]
        self.trainer.fit_loop.epoch_loop.max_steps = 0
        self.trainer.num_sanity_val_steps = 0
        self.trainer.fit(model, **kwargs)
        if maker.report is None:
            raise PruneError(
                f"Expected a strategy that fits in this process; found {type(self.trainer.strategy).__name__}, which starts others. "
                "Add `--trainer.strategy=auto --trainer.devices=1`."
            )
        self.report = maker.report if self.trainer.is_global_zero else None


class _MakeReport(Callback):
    """Make the report, once every other callback has pruned."""

    report: PruningReport | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pruning = pruning_callbacks(trainer)
        if not any(
            cb.masks or cb.units for cb in pruning if trainer.ckpt_path or not isinstance(cb, (GradualPruning, HESSO))
        ):
            raise PruneError(
                "Expected a recipe that prunes at the start of the fit; found none. Add `--prune PruneAtInit`, or look at a run that "
                "prunes while it trains with `--ckpt_path`."
            )
        self.report = make_report(trainer, pl_module, Select())


class _Silent(CSVLogger):
    """Name the folder of a run, and write nothing into it."""

    @property
    def experiment(self) -> None:  # type: ignore[override]
        """No file is opened."""

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        pass

    def log_hyperparams(self, params: Any = None) -> None:
        pass

    def save(self) -> None:
        pass


class _SaveConfig(SaveConfigCallback):
    """Save the configuration once pruning has taken it: what is refused leaves none, and only a fit writes one.

    It goes into the run's own folder, and to the loggers under the names by which a command line or a sweep sets it.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        pass

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.already_saved or not trainer.is_global_zero:
            return
        if self.save_to_log_dir:
            folder = run_folder(trainer)
            folder.mkdir(parents=True, exist_ok=True)
            file = str(folder / self.config_filename)
            self.parser.save(self.config, file, skip_none=False, overwrite=self.overwrite, multifile=self.multifile)
        log_settings(trainer, yaml.safe_load(self.parser.dump(self.config, skip_none=False)))
        self.already_saved = True


class _Parser(LightningArgumentParser):
    """A parser that takes no abbreviated name, and says which one was meant where one of ours is mistyped."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        parser = getattr(ex, "subcommand_parser", None) or self
        ours = {"prune": PruningCallback, "adversarial": AdversarialTraining}
        kinds = {**dict.fromkeys(("model", "data", "optimizer", "lr_scheduler")), **ours}
        options = {action.dest for action in parser._actions}
        meant = explain(message, kinds, options) if self.exit_on_error else None  # the parser of a class within raises
        if meant is None:
            super().error(message, ex)
        self.exit(2, f"{parser.prog.replace(' [options]', '')}: error: {meant}\n")


for _name in pl_prune.__all__:  # jsonargparse resolves short class names among imported classes alone
    getattr(pl_prune, _name)
