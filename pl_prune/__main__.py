"""The command `pl-prune`: `--help` answers without importing torch."""

from __future__ import annotations

import sys
from collections.abc import Sequence

HELP = """usage: pl-prune COMMAND [options]

Prune neural networks inside PyTorch Lightning training.

training commands (all the options of LightningCLI, and --prune):
  fit         train, pruned by the callback under the key `prune`
  validate    validate a model
  test        test a model
  predict     predict with a model

pruning commands:
  inspect     score as `fit` would, print the layer table and the collapse report, train nothing
  compare     set finished runs side by side: pl-prune compare RUN_FOLDER RUN_FOLDER ...
  study       run a grid of trainings, each once, on any number of processes, and print its table
  report      write one HTML page about a study or a run: who won and why
  doctor      versions, devices, extras, and what will not work together
  criteria    list the criteria: what each needs, uses and costs

examples:
  pl-prune fit --config recipes/quickstart.yaml
  pl-prune fit --config recipes/quickstart.yaml --prune.sparsity=0.95 --prune.criterion=GradNorm
  pl-prune inspect --config recipes/quickstart.yaml --prune.sparsity=0.99
  pl-prune study --config recipes/studies/digits.yaml --workers 2

`pl-prune COMMAND --help` lists the options of a command.
"""
TRAINER_COMMANDS = ("fit", "validate", "test", "predict")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Arguments without the program's name; those of the process when None.

    Returns:
        Exit status: 0, or 2 after a usage error.

    Raises:
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
    if command == "compare":
        return _compare(rest)
    if command == "criteria":
        return _criteria()
    if command not in (*TRAINER_COMMANDS, "inspect", "study", "report", "doctor"):
        sys.stderr.write(f"pl-prune: expected a command, found {command!r}. `pl-prune --help` lists them.\n")
        return 2

    from pl_prune import commands
    from pl_prune.core.types import PruneError

    own = {"study": commands.study, "report": commands.report, "doctor": commands.doctor}
    try:
        if command in own:
            return own[command](rest)
        from pl_prune import cli
    except PruneError as error:
        sys.stderr.write(f"pl-prune {command}: {error}\n")
        return 2
    except ImportError as error:
        sys.stderr.write(
            f"pl-prune: the command line needs more packages ({error}). Run `pip install 'pl_prune[cli]'`.\n"
        )
        return 2
    try:
        if command == "inspect":
            cli.Inspect(args=["fit", *rest])
        else:
            cli.PruneCLI(args=[command, *rest])
    except ValueError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, PruneError):  # jsonargparse wraps what a constructor raises
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        sys.stderr.write(f"pl-prune {command}: {cause}\n")
        return 2
    return 0


def _criteria() -> int:
    import inspect

    import pl_prune
    from pl_prune.core.criterion import Criterion
    from pl_prune.report.criteria import criteria_table

    exported = [getattr(pl_prune, name) for name in pl_prune.__all__]
    criteria = [c() for c in exported if inspect.isclass(c) and issubclass(c, Criterion) and not inspect.isabstract(c)]
    order = [name for names in pl_prune._HOMES.values() for name in names]
    criteria.sort(
        key=lambda one: (one.needs_data, one.needs_logits, one.curvature != "none", order.index(type(one).__name__))
    )
    sys.stdout.write(criteria_table(criteria) + "\n")
    return 0


def _compare(folders: Sequence[str]) -> int:
    if folders and folders[0] in ("-h", "--help"):
        sys.stdout.write(
            "usage: pl-prune compare RUN_FOLDER [RUN_FOLDER ...]\n\nEach folder holds the report.json that SparsityReport writes.\n"
        )
        return 0
    from pl_prune.core.types import PruneError
    from pl_prune.report.table import compare

    try:
        sys.stdout.write(compare(folders) + "\n")
    except PruneError as error:
        sys.stderr.write(f"pl-prune compare: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
