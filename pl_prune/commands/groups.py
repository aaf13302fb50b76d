"""`pl-prune groups`: which units of a recipe's network can leave, which layers stay whole and why, and what would be left."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pl_prune.callbacks.structured import StructuredPruning
    from pl_prune.core.groups import Group, ParameterGroups
    from pl_prune.report.table import Part

_LISTED = 3  # names in a cell
_OF_LAYERS = ("weight", "bias", "running_mean", "running_var")


def run(argv: Sequence[str]) -> int:
    """List the groups of a recipe's network.

    Args:
        argv: Arguments after `groups`; those that are not its own are those of `fit`.

    Returns:
        Exit status: 0.

    Raises:
        PruneError: If a sparsity is outside [0, 1), or no layer can be pruned.
    """
    options, rest = _parser().parse_known_args(argv)

    from pl_prune.commands.recipe import RealInputs, Recipe
    from pl_prune.core.types import check_sparsity
    from pl_prune.report.terminal import show, show_json

    for sparsity in options.preview:
        check_sparsity(sparsity)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    found: list[tuple[ParameterGroups, tuple[Any, ...]]] = []

    def look(bridge: RealInputs, structured: StructuredPruning | None) -> None:
        settings = _settings(options, structured)
        found.append((bridge.trace(*settings), settings))

    Recipe(rest, look)
    ((groups, settings),) = found
    previews = [_preview(groups, sparsity) for sparsity in options.preview]
    if options.json:
        show_json({**_plain(groups), "preview": previews}, sys.stdout)
    else:
        show(_parts(groups, previews, settings), sys.stdout)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "pl-prune groups",
        description="List the units of a recipe's network that can leave together, and the layers that stay whole with the reasons. "
        "A StructuredPruning of the recipe gives the defaults of --include, --exclude and --inexact. Further options are those of "
        "`pl-prune fit`: --config recipe.yaml, --weights CKPT.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--preview", nargs="+", type=float, default=[], help="say what is left without these fractions of every layer"
    )
    parser.add_argument("--include", nargs="+", help="patterns of layers: only their groups")
    parser.add_argument("--exclude", nargs="+", help="patterns of layers that stay whole")
    parser.add_argument("--inexact", action="store_true", help="also units whose removal changes outputs")
    parser.add_argument("--json", action="store_true", help="print as JSON")
    return parser


def _settings(
    options: argparse.Namespace, structured: StructuredPruning | None
) -> tuple[list[str] | None, list[str] | None, bool]:
    """Return what `trace_groups` takes, from the command line before the recipe."""
    include = options.include or getattr(structured, "include", None)
    exclude = options.exclude or getattr(structured, "exclude", None)
    return include, exclude, not options.inexact and getattr(structured, "exact", True)


def _preview(groups: ParameterGroups, sparsity: float) -> dict[str, Any]:
    """Count what is left; all units of a layer being alike, no scores are needed."""
    import torch

    from pl_prune.core.allocate import Layerwise
    from pl_prune.core.group_budget import select_units

    scores = {root: torch.arange(size, dtype=torch.float32) for root, size in groups.sizes.items()}
    keep = select_units(scores, groups, sparsity, "groups", Layerwise())
    (params, macs), (params_left, macs_left) = groups.cost({}), groups.cost(keep)
    return {
        "sparsity": sparsity,
        "units": sum(int(kept.sum()) for kept in keep.values()),
        "params": params_left,
        "params_share": params_left / params,
        "macs": macs_left,
        "macs_share": macs_left / max(macs, 1),
    }


def _plain(groups: ParameterGroups) -> dict[str, Any]:
    params, macs = groups.cost({})
    return {
        "params": params,
        "macs": macs,
        "units": sum(groups.sizes.values()),
        "groups": [_group(groups, group) for group in groups],
        "rejected": dict(groups.rejected),
    }


def _group(groups: ParameterGroups, group: Group) -> dict[str, Any]:
    """Describe a group; what leaves with a unit is counted by removing one."""
    import torch

    keep = {group.root: torch.arange(group.size) > 0}
    (params, macs), (params_left, macs_left) = groups.cost({}), groups.cost(keep)
    members = [
        {"name": m.name, "dim": m.dim, "kind": m.kind, "positions_per_unit": m.index.shape[1]} for m in group.members
    ]
    return {
        "root": group.root,
        "units": group.size,
        "params_per_unit": params - params_left,
        "macs_per_unit": macs - macs_left,
        "exact": group.exact,
        "members": members,
    }


def _parts(groups: ParameterGroups, previews: Sequence[dict[str, Any]], settings: Sequence[Any]) -> list[Part]:
    from pl_prune.report.table import Alarm, Facts, Table

    found = _plain(groups)
    rows = [
        (
            one["root"],
            f"{one['units']:,}",
            f"{one['params_per_unit']:,}",
            f"{one['macs_per_unit']:,}",
            _layers(one, ("out", "stat")),
            _layers(one, ("in",)),
            "" if one["exact"] else Alarm("changes outputs"),
        )
        for one in found["groups"]
    ]
    head = ("layer", "units", "parameters of one", "MACs of one", "leaves with it", "read by", "")
    parts: list[Part] = [Table(head, rows)]
    if found["rejected"]:
        parts += ["", Table(("layer that stays whole", "reason"), list(found["rejected"].items()))]
    limits = [f"{name}={value}" for name, value in zip(("include", "exclude"), settings, strict=False) if value]
    facts = [
        ("units", f"{found['units']:,} in {len(found['groups'])} layers {' '.join(limits)}".rstrip()),
        ("parameters", f"{found['params']:,}"),
        ("MACs per sample", f"{found['macs']:,}"),
    ]
    parts += ["", Facts(facts)]
    if previews:
        lines = [
            (
                f"{one['sparsity']:g}",
                f"{one['units']:,}",
                f"{one['params']:,}",
                f"{one['params_share']:.1%}",
                f"{one['macs']:,}",
                f"{one['macs_share']:.1%}",
            )
            for one in previews
        ]
        parts += ["", Table(("sparsity", "units left", "parameters left", "", "MACs left", ""), lines)]
        parts += [
            "",
            "Layer-wise: every layer loses the same fraction of its units, so that what is left is the same for all criteria.",
        ]
    return parts


def _layers(group: dict[str, Any], kinds: Sequence[str]) -> str:
    """Name the layers that lose something, but for the root itself."""
    losing = [m["name"].rpartition(".") for m in group["members"] if m["kind"] in kinds]
    layers = dict.fromkeys(
        layer if own.endswith(_OF_LAYERS) and layer else layer + dot + own for layer, dot, own in losing
    )
    names = [layer for layer in layers if layer != group["root"].partition("#")[0]]
    more = [f"and {len(names) - _LISTED} more"] if len(names) > _LISTED else []
    return " ".join([*names[:_LISTED], *more])
