"""The table of criteria, from the classes themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from pl_prune.core.criterion import Criterion


def criteria_table(criteria: Sequence[Criterion]) -> str:
    """Write what each criterion needs, uses and costs.

    Args:
        criteria: One instance of each, with the settings to be shown.

    Returns:
        A table in Markdown.
    """
    head = ["Criterion", "Needs", "Gradients", "Curvature", "Cost", "Settings"]
    rows = [head, ["---"] * len(head)]
    for one in criteria:
        needs = "logits" if one.needs_logits else "the loss" if one.needs_loss else "an input's shape"
        settings = [f"{f.name}={getattr(one, f.name)!r}" for f in fields(one)]  # type: ignore[arg-type]
        rows.append([
            f"`{type(one).__name__}`",
            needs if one.needs_data else "nothing",
            "yes" if one.uses_gradients else "no",
            one.curvature,
            one.cost,
            ", ".join(f"`{setting}`" for setting in settings),
        ])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
