"""`pl-prune inspect`: what a recipe would prune."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pl_prune.commands.json_option import without_json


def run(argv: Sequence[str]) -> int:
    """Score and prune as `fit` would, print the report, and train nothing.

    Args:
        argv: Arguments after `inspect`: those of `fit`, and --json.

    Returns:
        Exit status: 0.
    """
    from pl_prune.cli import Inspect
    from pl_prune.report.terminal import show, show_json

    words, as_json, quiet = without_json(argv)
    with quiet:
        report = Inspect(args=["fit", *words]).report
    if report is not None and as_json:
        show_json(report.to_dict(), sys.stdout)
    elif report is not None:
        show(report.parts(), sys.stdout)
    return 0
