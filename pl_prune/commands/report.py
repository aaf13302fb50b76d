"""`pl-prune report`: one HTML page about a study or a run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def run(argv: Sequence[str]) -> int:
    """Write the page of a study or of a run.

    Args:
        argv: Arguments after `report`.

    Returns:
        Exit status: 0.

    Raises:
        PruneError: If the folder holds neither, or the study's record is damaged.
    """
    parser = argparse.ArgumentParser(
        "pl-prune report", description="Write one HTML page, and its figures as PNG, about a study or a run."
    )
    parser.add_argument("folder", help="a study's folder, or a finished run's")
    parser.add_argument("--out", help="the page; default: report.html in the folder")
    parser.add_argument("--metric", help="default: the study's, else val/acc")
    parser.add_argument("--direction", choices=("maximize", "minimize"), help="default: the study's, else maximize")
    parser.add_argument("--json", action="store_true", help="print page, metric and direction as JSON")
    options = parser.parse_args(argv)

    from pl_prune.report.html import write_report
    from pl_prune.report.reading import deciding
    from pl_prune.report.terminal import show, show_json

    metric, direction = deciding(Path(options.folder), options.metric, options.direction)
    page = write_report(options.folder, options.out, metric=options.metric, direction=options.direction)
    if options.json:
        show_json({"page": str(page), "metric": metric, "direction": direction}, sys.stdout)
    else:
        show([str(page)], sys.stdout)
    return 0
