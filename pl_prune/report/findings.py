"""What a study found, in words that its numbers decide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import mean

from pl_prune.report.grid import Group, Study
from pl_prune.report.study import winners
from pl_prune.report.words import listed, text_of

_FAILED = 0.5
"""A row that keeps at most this part of the dense metric counts as failed: it is near what an untrained network has."""
_NAMED = 6


@dataclass(frozen=True)
class Verdict:
    """What one point of the grid says.

    Args:
        point: In words.
        winner: Row that is better than all others beyond their intervals; None where there is none.
        words: One sentence that says so and why.
    """

    point: str
    winner: str | None
    words: str


def failed(study: Study, group: Group) -> bool:
    """Say whether a row is at the level of a network that has learnt nothing, as far as the dense row can tell.

    Args:
        study: The study, with a dense row and a metric that is to be maximized; else nothing is known.
        group: The row at a point.

    Returns:
        Whether it keeps at most half of the dense metric.
    """
    dense = study.dense
    if dense is None or not dense.finite or study.direction != "maximize" or group is dense:
        return False
    reference = mean(dense.cell.last)
    return group.finite and reference > 0 and mean(group.cell.last) <= _FAILED * reference


def verdicts(study: Study) -> list[Verdict]:
    """Judge every point of the grid.

    Args:
        study: The study.

    Returns:
        One verdict for each point; none of a search, whose rows do not meet at points.
    """
    if study.searched:
        return []
    return [_judge(study, study.label(p), study.at(p)) for p in study.points if p or not study.keys]


def best(study: Study) -> list[Group]:
    """Return the rows that won.

    Args:
        study: The study.

    Returns:
        At most one for each point; of a search, the best point of each row.
    """
    if study.searched:
        return found_by_search(study)
    found = [_winner(study, study.at(p)) for p in study.points if p or not study.keys]
    return [group for group in found if group is not None]


def found_by_search(study: Study) -> list[Group]:
    """Return the best point of each row that was searched, by the last value of the metric.

    Args:
        study: The study.

    Returns:
        Best first; rows without a finite value are left out.
    """
    sign = 1 if study.direction == "maximize" else -1
    order = sorted((g for g in study.groups if g.cell.settings and g.finite), key=lambda g: -sign * mean(g.cell.last))
    rows: dict[str, Group] = {}
    for group in order:
        rows.setdefault(group.cell.row, group)
    return list(rows.values())


def _winner(study: Study, groups: Sequence[Group]) -> Group | None:
    rivals = [g for g in groups if g.finite]
    if any(len(g.runs) < 2 for g in rivals):  # a single seed has no interval
        return None
    copies = [replace(g.cell, settings=g.cell.settings or {"point": "only"}) for g in rivals]
    won = winners(copies, study.direction)
    return rivals[copies.index(won[0])] if won else None


def _judge(study: Study, point: str, groups: Sequence[Group]) -> Verdict:
    sign = 1 if study.direction == "maximize" else -1
    rivals = sorted((g for g in groups if g.finite), key=lambda g: -sign * mean(g.cell.last))
    lost = [g.cell.row for g in groups if not g.finite]
    tail = f" {listed(lost)} ended in a number that is not finite." if lost else ""
    if len(rivals) < 2:
        words = f"there is nothing to compare{f' {rivals[0].cell.row} with' if rivals else ''}, so nobody won."
        return Verdict(point, None, f"At {point}, {words}{tail}")
    first, second = rivals[:2]
    won = _winner(study, rivals)
    end = "highest" if sign > 0 else "lowest"
    if won is not None:
        words = (
            f"{won.cell.row} won: its {study.metric} of {number(won)} is better than that of every other row beyond one "
            f"standard deviation of each; the next is {second.cell.row} with {number(second)}."
        )
        return Verdict(point, won.cell.row, f"At {point}, {words}{tail}")
    single = [g.cell.row for g in rivals if len(g.runs) < 2]
    if single:
        who = "with a single seed each" if len(single) == len(rivals) else f"with a single seed of {listed(single)}"
        words = (
            f"nobody won: {first.cell.row} has the {end} {study.metric} ({number(first)}), but {who} there is no interval "
            "to compare."
        )
    else:
        near = [g for g in rivals[1:] if _meet(first, g)]
        others = listed([f"{g.cell.row} ({number(g)})" for g in near])
        words = (
            f"nobody won: {first.cell.row} has the {end} mean {study.metric} ({number(first)}), but its interval overlaps "
            f"with that of {others}."
        )
    return Verdict(point, None, f"At {point}, {words}{tail}")


def _meet(one: Group, other: Group) -> bool:
    (a, b), (c, d) = one.cell.interval(), other.cell.interval()
    return a <= d and c <= b


def summary(study: Study, found: Sequence[Verdict]) -> str:
    """Say in two or three sentences what the study is and who won where.

    Args:
        study: The study.
        found: Its verdicts.

    Returns:
        Plain text.
    """
    runs = sum(len(g.runs) for g in study.groups)
    seeds = sorted({len(g.runs) for g in study.groups})
    many = "a single seed" if seeds == [1] else f"{'-'.join(map(str, (seeds[0], seeds[-1])[: len(seeds)]))} seeds"
    of = f"{len(study.rows)} row{'s' if len(study.rows) > 1 else ''}"
    words = [f"{runs} runs of {of}, {many} at each point, compared by {study.metric} after the last epoch."]
    if runs < study.total:
        failed = f", {len(study.failures)} of them failed" if study.failures else ""
        words.append(f"{study.total - runs} of {study.total} runs are not done{failed}.")
    if study.searched:
        words += [f"Best of {g.cell.row}: {number(g)} at {study.label(g.cell.settings)}." for g in best(study)]
    named = dict.fromkeys(v.winner for v in found if v.winner)
    parts = [f"{row} won at {_points([v.point for v in found if v.winner == row])}" for row in named]
    if none := [v.point for v in found if not v.winner]:
        parts.append(f"nobody won at {_points(none)}")
    if parts:
        text = "; ".join(parts)
        words.append(f"{text[0].upper() if text.startswith('nobody') else text[0]}{text[1:]}.")
    broken = [(g.cell.row, study.label(g.cell.settings)) for g in study.groups if _signs(study, g)]
    rows = list(dict.fromkeys(row for row, _ in broken))
    if rows:
        some = [f"{row} at {_points([point for name, point in broken if name == row])}" for row in rows[:_NAMED]]
        words.append(
            f"Collapsed: {'; '.join(some)}{f'; {len(rows) - _NAMED} more rows' if len(rows) > _NAMED else ''}."
        )
    if study.dense is not None:
        words.append(f"The dense row has {number(study.dense)}.")
    return " ".join(words)


def collapses(study: Study) -> list[str]:
    """Name the rows that no longer compute anything useful, and how that shows.

    Args:
        study: The study.

    Returns:
        A sentence for each row and point.
    """
    return [
        f"{group.cell.row} collapsed at {study.label(group.cell.settings)}: {'; '.join(signs)}."
        for group in study.groups
        if (signs := _signs(study, group))
    ]


def _signs(study: Study, group: Group) -> list[str]:
    signs = []
    empty = [[layer["name"] for layer in run.layers if layer["kept"] == 0] for run in group.runs]
    if any(empty):
        names = list(dict.fromkeys(name for layers in empty for name in layers))
        some = ", ".join(names[:3]) + f" and {len(names) - 3} more" if len(names) > 3 else listed(names)
        signs.append(f"nothing is kept of {some} in {_of(sum(map(bool, empty)), group)}")
    if cut := sum(run.path is False for run in group.runs):
        signs.append(f"no path leads from input to output in {_of(cut, group)}")
    if failed(study, group):
        signs.append(f"{study.metric} is {number(group)}, at most half of the dense row's")
    if not group.finite:
        signs.append(f"{study.metric} is not a finite number")
    return signs


def number(group: Group) -> str:
    """Return mean and standard deviation of the last values.

    Args:
        group: The row at a point.

    Returns:
        "0.9861 ± 0.0039"; only the mean for a single seed.
    """
    return text_of(group.cell.last)


def _of(runs: int, group: Group) -> str:
    return f"{runs} of {len(group.runs)} runs" if len(group.runs) > 1 else "its run"


def _points(points: Sequence[str]) -> str:
    """List points; a key that all of them share is said once."""
    key = points[0].split(" ")[0]
    short = all(point.split(" ")[0] == key and point.count(" ") == 1 for point in points)
    return f"{key} {listed([point.split(' ')[1] for point in points])}" if short else listed(points)
