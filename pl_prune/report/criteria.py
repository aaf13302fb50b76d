"""The table of criteria, from the classes themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import get_args, get_type_hints

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
        kinds = get_type_hints(type(one))
        settings = []
        for field in fields(one):  # type: ignore[arg-type]
            value = getattr(one, field.name)
            others = [f"`{other!r}`" for other in get_args(kinds[field.name]) if other != value]
            settings.append(" or ".join([f"`{field.name}={value!r}`", *others]))
        rows.append([
            f"`{type(one).__name__}`",
            needs if one.needs_data else "nothing",
            "yes" if one.uses_gradients else "no",
            one.curvature,
            one.cost,
            ", ".join(settings),
        ])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
