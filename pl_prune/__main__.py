"""The command `pl-prune`: `--help` answers without importing torch."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module

TRAINER = "training commands (all the options of LightningCLI, and --prune)"
COMMANDS = {
    TRAINER: {
        "fit": "train, pruned by the callback under the key `prune`",
        "validate": "validate a model",
        "test": "test a model",
        "predict": "predict with a model",
    },
    "pruning commands": {
        "inspect": "score as `fit` would, print the layer table and the collapse report, train nothing",
        "score": "score as `fit` would, write the scores to a file, train nothing",
        "mask": "make masks of any number of sparsities from one file of scores",
        "masks": "show a file of masks, or the difference of two",
        "transfer": "whether masks move to other data and other initial weights: DTI, I3, and the noise of training",
        "compare": "set finished runs side by side: pl-prune compare RUN_FOLDER RUN_FOLDER ...",
        "study": "run a grid of trainings, each once, on any number of processes, and print its table",
        "report": "write one HTML page about a study or a run: who won and why",
        "attack": "clean and robust accuracy of a checkpoint under AutoAttack, and of two side by side",
        "adversarial": "robust pretraining, mask search and fine-tuning by one stage file, resumed where it was interrupted",
        "groups": "which channels, heads and hidden units can leave, which layers stay whole and why, and what would be left",
        "export": "write a checkpoint as a file that runs elsewhere, sliced where masks remove units, and time it",
        "doctor": "versions, devices, extras, and what will not work together",
        "criteria": "list the criteria: what each needs, uses and costs",
    },
}
"""Each command is the room of its name in `pl_prune.commands`, dashes as underscores; training's share the room `trainer`."""

_EXTRAS = {
    "jsonargparse": ("cli", "reads recipes"),
    "wandb": ("wandb", "WandbLogger logs to"),
    "tensorboard": ("tensorboard", "TensorBoardLogger logs to"),
}
"""Packages that LightningCLI asks for: the extra that has each, and what it does."""

_HELP = """usage: pl-prune COMMAND [options]

Prune neural networks inside PyTorch Lightning training.

{commands}

examples:
  pl-prune fit --config recipes/quickstart.yaml --trainer.logger.init_args.version=NAME_OF_THE_RUN
  pl-prune fit --config recipes/quickstart.yaml --trainer.logger.init_args.version=other --prune.sparsity=0.95
  pl-prune inspect --config recipes/quickstart.yaml --prune.sparsity=0.99
  pl-prune study --config recipes/studies/digits.yaml --workers 2

`pl-prune COMMAND --help` lists the options of a command.
"""
HELP = _HELP.format(
    commands="\n\n".join(
        "\n".join([f"{title}:", *(f"  {name:<11} {what}" for name, what in group.items())])
        for title, group in COMMANDS.items()
    )
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Arguments without the program's name; those of the process when None.

    Returns:
        Exit status: 0 done, 1 part of what was asked is left or failed, 2 bad input, 130 interrupted.

    Raises:
        ModuleNotFoundError: If a module of the user's cannot be imported.
        SystemExit: If LightningCLI or argparse end the command.
        ValueError: If something other than the user's input is wrong.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        sys.stdout.write(HELP)
        return 0
    if argv[0] == "--version":
        from pl_prune import __version__

        sys.stdout.write(f"pl_prune {__version__}\n")
        return 0
    command, rest = argv[0], argv[1:]
    known = [name for group in COMMANDS.values() for name in group]
    if command not in known:
        close = get_close_matches(command, known, 1)
        meant = f"Did you mean `pl-prune {close[0]}`?" if close else "`pl-prune --help` lists them."
        sys.stderr.write(f"pl-prune: expected a command, found {command!r}. {meant}\n")
        return 2
    room, words = ("trainer", argv) if command in COMMANDS[TRAINER] else (command.replace("-", "_"), rest)

    from pl_prune.core.types import PruneError

    try:
        return int(import_module(f"pl_prune.commands.{room}").run(words))
    except KeyboardInterrupt:
        return _interrupted(command)
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # Lightning makes an exit of it
            return _interrupted(command)
        raise
    except (ModuleNotFoundError, ValueError) as error:
        cause: BaseException | None = error  # jsonargparse wraps what a constructor raises
        while cause is not None and not isinstance(cause, (PruneError, ModuleNotFoundError)):
            cause = cause.__cause__ or cause.__context__
        said = cause if isinstance(cause, PruneError) else _missing(str(cause))
        if said is None:
            raise
        sys.stderr.write(f"pl-prune {command}: {said}\n")
        return 2


def _missing(error: str) -> str | None:
    """Name the extra that has a missing package of those that LightningCLI asks for; None of any other."""
    for name, (extra, use) in _EXTRAS.items():
        if re.search(rf"\b{name}\b", error):
            found = error.splitlines()[0]
            return f"Expected {name}, which {use}; found it missing ({found}). Run `pip install 'pl_prune[{extra}]'`."
    return None


def _interrupted(command: str) -> int:
    sys.stderr.write(f"pl-prune {command}: interrupted\n")
    return 130


if __name__ == "__main__":
    sys.exit(main())
