"""`pl-prune criteria`: what each criterion needs, uses and costs."""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Sequence


def run(argv: Sequence[str]) -> int:
    """Print the table of criteria.

    Args:
        argv: Arguments after `criteria`.

    Returns:
        Exit status: 0.
    """
    parser = argparse.ArgumentParser(
        "pl-prune criteria", description="List the criteria: what each needs, uses and costs."
    )
    parser.add_argument("--json", action="store_true", help="print as JSON")
    options = parser.parse_args(argv)

    import pl_prune
    from pl_prune.core.criterion import Criterion
    from pl_prune.report.criteria import criteria_table, describe_criteria
    from pl_prune.report.terminal import show, show_json

    exported = [getattr(pl_prune, name) for name in pl_prune.__all__]
    criteria = [c() for c in exported if inspect.isclass(c) and issubclass(c, Criterion) and not inspect.isabstract(c)]
    order = [name for names in pl_prune._HOMES.values() for name in names]
    criteria.sort(
        key=lambda one: (one.needs_data, one.needs_logits, one.curvature != "none", order.index(type(one).__name__))
    )
    if options.json:
        show_json(describe_criteria(criteria), sys.stdout)
    else:
        show([criteria_table(criteria)], sys.stdout)
    return 0
