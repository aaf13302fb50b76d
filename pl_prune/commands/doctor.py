"""`pl-prune doctor`: what is installed, what is missing, and what will not work."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def run(argv: Sequence[str]) -> int:
    """Say what is installed, what is missing, and what will not work.

    Args:
        argv: Arguments after `doctor`.

    Returns:
        Exit status: 0, or 1 if something will not work.
    """
    parser = argparse.ArgumentParser(
        "pl-prune doctor", description="Versions, devices, extras, and what will not work together."
    )
    parser.add_argument("--json", action="store_true", help="print as JSON")
    options = parser.parse_args(argv)

    from pl_prune.report.doctor import examine
    from pl_prune.report.terminal import show, show_json

    found = examine()
    if options.json:
        show_json(found.to_dict(), sys.stdout)
    else:
        show(found.parts(), sys.stdout)
    return 1 if found.problems else 0
