"""The table of criteria, from the classes themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, get_args, get_type_hints

from pl_prune.core.criterion import Criterion
from pl_prune.report.table import Table


class Markdown(Table):
    """A table that is Markdown where it is not on a terminal."""

    code = True

    def text(self) -> str:
        """Write it in Markdown.

        Returns:
            One line a row.
        """
        return "\n".join(f"| {' | '.join(row)} |" for row in [self.head, ["---"] * len(self.head), *self.rows])


def describe_criteria(criteria: Sequence[Criterion]) -> list[dict[str, Any]]:
    """Say what each criterion needs, uses and costs.

    Args:
        criteria: One instance of each, with the settings to be shown.

    Returns:
        Plain data: name, needs, gradients, curvature, rounds, cost, whether layers are compared, and the value and other
        choices of each setting.
    """
    found = []
    for one in criteria:
        kinds = get_type_hints(type(one))
        settings = []
        for field in fields(one):  # type: ignore[arg-type]
            value = getattr(one, field.name)
            others = [other for other in get_args(kinds[field.name]) if other != value and not isinstance(other, type)]
            settings.append({"name": field.name, "value": value, "others": others})
        needs = "logits" if one.needs_logits else "the loss" if one.needs_loss else "an input's shape"
        found.append({
            "name": type(one).__name__,
            "needs": needs if one.needs_data else "nothing",
            "gradients": one.uses_gradients,
            "curvature": one.curvature,
            "rounds": one.rounds,
            "cost": one.cost,
            "compares_layers": not one.layerwise_only,
            "settings": settings,
        })
    return found


def criteria_table(criteria: Sequence[Criterion]) -> Markdown:
    """Write what each criterion needs, uses and costs.

    Args:
        criteria: One instance of each, with the settings to be shown.

    Returns:
        A row for each.
    """
    rows = []
    for one in describe_criteria(criteria):
        settings = [
            " or ".join([f"`{s['name']}={s['value']!r}`", *(f"`{other!r}`" for other in s["others"])])
            for s in one["settings"]
        ]
        gradients, compares = ("yes" if one[key] else "no" for key in ("gradients", "compares_layers"))
        facts = [one["needs"], gradients, one["curvature"], str(one["rounds"]), one["cost"], compares]
        rows.append([f"`{one['name']}`", *facts, ", ".join(settings)])
    head = ("Criterion", "Needs", "Gradients", "Curvature", "Rounds", "Cost", "Compares layers", "Settings")
    return Markdown(head, rows)
