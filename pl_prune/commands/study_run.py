"""One training of `pl-prune study`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from io import StringIO
from typing import Any, TextIO

from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from pl_prune.callbacks.base import PruningCallback
from pl_prune.callbacks.report import SparsityReport
from pl_prune.cli import PruneCLI
from pl_prune.core.types import PruneError
from pl_prune.runs.folder import RunFolder
from pl_prune.runs.outcome import cause_of
from pl_prune.runs.spec import Spec, arguments


class StudyRun(PruneCLI):
    """One run of a study: quiet, resumable, and reported.

    A run of several processes starts anew as a command of its own, `python -m pl_prune.commands.study_run`: Lightning
    starts the other processes with the arguments of the first, and those of a study would take other runs.
    """

    _alone = True

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return what is parsed: `fit` alone, for the arguments of each command take their time."""
        return {"fit": PruneCLI.subcommands()["fit"]}

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        trainer = super()._instantiate_trainer(config, callbacks)
        if self._alone and trainer.world_size > 1:
            raise _Several
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
            RuntimeError: If a run of several processes fails.
            KeyboardInterrupt: If the user ends it.
        """
        run.path.mkdir(parents=True, exist_ok=True)
        own = {
            "trainer.logger": {
                "class_path": "lightning.pytorch.loggers.CSVLogger",
                "init_args": {"save_dir": str(run.path.parent), "name": "", "version": run.path.name},
            },
            "trainer.enable_progress_bar": False,
            "trainer.enable_model_summary": False,
        }
        resume = ["--weights=null", "--ckpt_path", str(run.checkpoint)] if run.checkpoint else []
        log = run.path / "log.txt"
        begin = len(log.read_text()) if log.is_file() else 0
        status = 0
        with (
            _refusals(spec, lambda: log.read_text()[begin:]),
            log.open("a") as said,
            redirect_stderr(said),
            warnings.catch_warnings(),
        ):
            for known in ("Experiment logs directory", "Checkpoint directory", "The dirpath has changed"):
                warnings.filterwarnings("ignore", known)  # the folder is this run's own
            if spec.masks:
                warnings.filterwarnings("ignore", ".*its masks are not, so pruned")  # they come beside the weights
            words = ["fit", *spec.words, *arguments(own), *resume]
            try:
                cls(args=words)
            except _Several:
                status = _in_a_process_of_its_own(words, said)
        if status:
            error = _told_by(log.read_text()[begin:], status)
            raise error

    @classmethod
    def check(cls, specs: Iterable[Spec]) -> None:
        """Parse the settings of one run of every row, and of one run for every value of the grid.

        Args:
            specs: The runs that are left.

        Raises:
            PruneError: If `pl-prune fit` or the pruning callback does not take them, or this process was started as one of several.
        """
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise PruneError(
                f"Expected one process to share the runs out; found that {os.environ['WORLD_SIZE']} were started together, as by torchrun. "
                "Start the command by itself: it starts the processes that a run asks for (trainer.devices)."
            )
        seen: set[str] = set()
        parsed: _Parsed | None = None
        for spec in specs:
            told = {spec.row, *arguments(spec.settings)}
            if told <= seen:
                continue
            seen |= told
            said = StringIO()
            with _refusals(spec, said.getvalue), redirect_stderr(said):
                words = ["fit", *spec.words]
                if parsed is None:
                    parsed = _Parsed(args=words)
                else:
                    parsed.parse_arguments(parsed.parser, words)
                _build(parsed.config.fit.prune)


class _Several(Exception):
    """A run asks for several processes."""


class _Launched(StudyRun):
    """A run in a command of its own."""

    _alone = False


def _in_a_process_of_its_own(words: Sequence[str], said: TextIO) -> int:
    """Run a command of its own to its end.

    Returns:
        Its exit status.

    Raises:
        KeyboardInterrupt: If the user ends it; the command has ended then, too.
    """
    said.flush()
    process = subprocess.Popen([sys.executable, "-m", __name__, *words], stdout=said, stderr=said)
    try:
        return process.wait()
    except KeyboardInterrupt:
        with suppress(subprocess.TimeoutExpired):  # the terminal has told it as well
            process.wait(10)
        process.terminate()
        raise


def _told_by(log: str, status: int) -> PruneError | RuntimeError:
    """Return the error that a process ended with, from its log, in which several processes may speak."""
    found = re.findall(r"^(?:\[rank\d+\]: )?([\w.]+(?:Error|Exception)): (.*)", log, re.MULTILINE)
    if not found:
        return RuntimeError(f"its process ended with status {status}; look at log.txt in its folder")
    name, words = found[-1]
    return PruneError(words) if name.endswith(".PruneError") else RuntimeError(f"{name}: {words}")


class _Parsed(StudyRun):
    """A run of which nothing is built."""

    def instantiate_classes(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def _build(prune: Any) -> None:
    """Build a pruning callback, which looks at its settings then."""
    if prune is not None:
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--prune", type=PruningCallback)
        parser.instantiate_classes(parser.parse_object({"prune": prune}))


@contextmanager
def _refusals(spec: Spec, said: Callable[[], str]) -> Iterator[None]:
    """Turn the parser's exit into an error that says what it said."""
    try:
        yield
    except (ArgumentError, ValueError) as error:  # of a class that does not take its settings
        raise PruneError(f"{cause_of(error)} It was given for {spec.key!r}.") from error
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # what Lightning makes of it
            raise KeyboardInterrupt from error
        refusal = " ".join(said().rpartition("error: ")[2].split())
        if refusal.startswith("Expected "):  # in our own words
            raise PruneError(f"{refusal} It was given for {spec.key!r}.") from error
        raise PruneError(
            f"Expected settings that `pl-prune fit` takes for {spec.key!r}; found {refusal!r}. Try `pl-prune fit`."
        ) from error


if __name__ == "__main__":
    _Launched(args=sys.argv[1:])
