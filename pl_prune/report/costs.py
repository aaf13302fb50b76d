"""What networks cost: counts, and measured latency where a run has it, in tables and in a sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from statistics import mean
from typing import Any

from pl_prune.report.grid import Group, Run, Study
from pl_prune.report.markup import table
from pl_prune.report.words import abbreviate, listed, show

MASKS = (
    "Masked weights save neither time nor memory: parameters and MACs kept are counts of what a device that skips zeros "
    "would do, not measurements. Wall times here are of training with masks."
)


SLICED = (
    "Where units were sliced off, parameters and MACs kept are those of the network that was trained, and wall times too; the "
    "layers shown are the units of the whole network."
)


def about_counts(runs: Sequence[Run]) -> list[str]:
    """Say what counts and wall times of runs mean.

    Args:
        runs: The runs.

    Returns:
        A note on masks, on slices, or both.
    """
    sliced = any(run.sliced for run in runs)
    masked = any(run.pruned and not run.sliced for run in runs) or not sliced
    return [*([MASKS] if masked else []), *([SLICED] if sliced else [])]


def cost_table(study: Study) -> str:
    """Write parameters, MACs and latency of every row at every point.

    Args:
        study: The study.

    Returns:
        A table with the sentence that says what it shows; nothing where no run has a report.
    """
    groups = [g for g in study.groups if any(run.cost for run in g.runs)]
    if not groups:
        return ""
    timed = [g for g in groups if any(run.latency for run in g.runs)]
    head = ["row", *(study.short(key) for key in study.keys), "parameters kept", "MACs kept"]
    head += ["dense (ms)", "masked (ms)", "masked / dense"] if timed else []
    lines = []
    for group in groups:
        settings = group.cell.settings
        line = [escape(group.cell.row)]
        line += [escape(abbreviate(show(settings[key]), 40)) if key in settings else "-" for key in study.keys]
        line += [_kept(group, "params_kept", "params"), _kept(group, "macs_kept", "macs")]
        if timed:
            line += [_time(group, "dense"), _time(group, "masked"), _ratio(group)]
        lines.append(line)
    about = "Of the whole model, means over seeds; MACs are those of one sample."
    return "<h2>Cost</h2>" + table(head, lines, f"{about} {latency_words([r for g in groups for r in g.runs])}".strip())


def latency_words(runs: Sequence[Run]) -> str:
    """Say how masked networks compare with dense ones, and where that was measured.

    Args:
        runs: Runs, with or without latency.

    Returns:
        Two sentences; nothing where no run has one.
    """
    found = [run.latency for run in runs if run.latency]
    if not found:
        return ""
    ratios = sorted(_median(one, "masked") / _median(one, "dense") for one in found)
    where = listed(list(dict.fromkeys(_place(one) for one in found)))
    spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}" if len(ratios) > 1 else f"{ratios[0]:.2f}"
    middle = ratios[len(ratios) // 2]
    verdict = (
        "so masks alone bring no speed-up"
        if middle > 0.9
        else "which masks cannot explain, as the kernels stay dense: look for what else the machine did"
    )
    said = f"a masked network takes {middle:.2f} times as long as the same one dense"
    said += f" ({spread} over {len(ratios)} runs)" if len(ratios) > 1 else ""
    return f"Latency: {said}, {verdict}. Medians of one forward pass with its loss, dense and masked in turn: {where}."


def latency(run: Run, kind: str = "masked") -> float | None:
    """Return the measured median.

    Args:
        run: The run.
        kind: "masked" or "dense".

    Returns:
        Milliseconds; None where the run has none.
    """
    return 1000 * _median(run.latency, kind) if run.latency else None


def latency_text(run: Run, kind: str) -> str:
    """Return a run's latency with its quartiles.

    Args:
        run: The run, with latency.
        kind: "masked" or "dense".

    Returns:
        "1.52 ms (1.50 to 1.61)".
    """
    low, middle, high = (1000 * value for value in run.latency[kind])
    return f"{middle:.3g} ms ({low:.3g} to {high:.3g})"


def _median(found: Mapping[str, Any], kind: str) -> float:
    return float(found[kind][1])


def _place(found: Mapping[str, Any]) -> str:
    many = "" if found["threads"] == 1 else "s"
    return f"{found['device']}, {found['threads']} thread{many}, batch of {found['batch']}"


def _kept(group: Group, kept: str, total: str) -> str:
    found = [(run.cost[kept], run.cost[total]) for run in group.runs if kept in run.cost and total in run.cost]
    if not found:
        return "-"
    whole = mean(n for _, n in found)
    return f"{mean(k for k, _ in found):,.0f} of {whole:,.0f} ({mean(k for k, _ in found) / max(whole, 1):.2%})"


def _time(group: Group, kind: str) -> str:
    value = group.average(lambda run: latency(run, kind))
    return "-" if value is None else f"{value:.3g}"


def _ratio(group: Group) -> str:
    value = group.average(
        lambda run: _median(run.latency, "masked") / _median(run.latency, "dense") if run.latency else None
    )
    return "-" if value is None else f"{value:.2f}"
