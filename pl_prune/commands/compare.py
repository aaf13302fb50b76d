"""`pl-prune compare`: finished runs side by side."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def run(argv: Sequence[str]) -> int:
    """Print a table with a row for each run.

    Args:
        argv: Arguments after `compare`.

    Returns:
        Exit status: 0.
    """
    parser = argparse.ArgumentParser("pl-prune compare", description="Set finished runs side by side.")
    parser.add_argument(
        "folders", nargs="*", metavar="RUN_FOLDER", help="holds the report.json that SparsityReport writes"
    )
    parser.add_argument("--json", action="store_true", help="print the runs as JSON")
    options = parser.parse_args(argv)

    from pl_prune.report.table import comparison, read_runs
    from pl_prune.report.terminal import show, show_json

    runs = read_runs(options.folders)
    if options.json:
        show_json(runs, sys.stdout)
    else:
        show([comparison(runs)], sys.stdout)
    return 0
