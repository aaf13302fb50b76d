"""The page of a single run."""

from __future__ import annotations

from html import escape
from typing import Any

from pl_prune.core.store import load_masks
from pl_prune.report.attached import left_figures
from pl_prune.report.canvas import Picture
from pl_prune.report.costs import about_counts, latency_text, latency_words
from pl_prune.report.curves import run_figures
from pl_prune.report.grid import Run
from pl_prune.report.markup import gallery, notes, table
from pl_prune.report.robustness import robustness_figures
from pl_prune.report.saliency import saliency_figure
from pl_prune.report.scored import UNIT_MASKS, has_scores, read_entries
from pl_prune.report.sparsity import BOTTLENECK
from pl_prune.report.units import HEAD, unit_rows
from pl_prune.report.widths import run_width_figure
from pl_prune.report.words import is_number, show


def run_page(run: Run) -> tuple[str, list[Picture]]:
    """Write what a run says.

    Args:
        run: The run.

    Returns:
        The page's body, and its figures.
    """
    scores = saliency_figure([read_entries(run, "this run")]) if has_scores(run) else None
    drawn = [*run_figures(run), *(picture for picture in (run_width_figure(run), scores) if picture)]
    drawn += robustness_figures(run.folder)
    foreign = left_figures(run.folder)
    record, cost = run.record, run.cost
    removed = record.get("removed")
    path = {True: "yes", False: "NONE, no input reaches the output"}.get(run.path, "unknown")  # type: ignore[arg-type]
    facts = {
        "method": show(record.get("method", "-")),
        "sparsity": f"{record['sparsity']:.4f} of the prunable parameters"
        if is_number(record.get("sparsity"))
        else "-",
        **({"sliced off": f"{removed:.4f} of all parameters"} if removed else {}),
        "path input to output": path,
        "seed, epochs, steps": ", ".join(show(record.get(key, "-")) for key in ("seed", "epochs", "steps")),
        "wall time, pruning time (s)": f"{show(record.get('seconds', '-'))}, {show(record.get('pruning_seconds', '-'))}",
        "peak memory (MiB)": f"{record['peak_bytes'] / 2**20:.0f}" if record.get("peak_bytes") else "-",
    }
    for word, kept, total in (("parameters", "params_kept", "params"), ("MACs per sample", "macs_kept", "macs")):
        if kept in cost and total in cost:
            facts[f"{word} kept"] = f"{cost[kept]:,} of {cost[total]:,} ({cost[kept] / max(cost[total], 1):.2%})"
    if {"params_kept", "macs_kept"} <= run.smaller.keys():
        left = (
            f"{run.smaller[f'{kind}_kept']:,} {word}"
            for kind, word in (("params", "parameters"), ("macs", "MACs per sample"))
        )
        facts["slicing masked units off leaves"] = ", ".join(left)
    metrics = record.get("metrics", {})
    facts.update({
        f"last {name}": f"{value:.6g}" if is_number(value) else show(value)
        for name, value in (metrics if isinstance(metrics, dict) else {}).items()
    })
    gone = [layer["name"] for layer in run.layers if layer["kept"] == 0]
    narrow = sum(_narrow(layer) and layer["kept"] > 0 for layer in run.layers)
    lead = f"{facts['method']}: "
    lead += f"{facts['sliced off']} sliced off; " if removed else ""
    lead += "" if run.sliced else f"{facts['sparsity']} pruned; "
    lead += f"{len(gone)} of {len(run.layers)} layers collapsed"
    lead += f" ({', '.join(gone[:3])}{' and more' if len(gone) > 3 else ''})" if gone else ""
    lead += f", {narrow} bottlenecks; path from input to output: {path}."
    if run.latency:
        facts["latency, masked and dense"] = f"{latency_text(run, 'masked')}, {latency_text(run, 'dense')}"
    absent = [latency_words([run])] if run.latency else []
    absent += [] if run.layers else ["The run has no report.json; add the callback SparsityReport."]
    absent += [] if run.curve else ["The run has no metrics.jsonl, so there are no training curves."]
    pairs = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    parts = [f'<p class="lead">{escape(lead)}</p>', f"<dl>{pairs}</dl>"]
    if run.layers and not run.sliced:
        parts += ["<h2>Layers</h2>", _layer_table(run)]
    if (run.folder / UNIT_MASKS).is_file():
        rows = unit_rows(load_masks(run.folder / UNIT_MASKS).counts())
        cells = [[escape(cell) for cell in row] for row in rows]
        parts += ["<h2>Units</h2>", table(list(HEAD), cells, "Channels, heads and hidden units.")]
    absent += [] if scores else ["The run has no scores.safetensors, so there is no figure of scores."]
    parts += [
        gallery("Figures", drawn),
        gallery("Left by the run", foreign),
        notes([*about_counts([run]), "One run is one seed: it shows no spread.", *absent]),
    ]
    return "\n".join(parts), [*drawn, *foreign]


def _layer_table(run: Run) -> str:
    lines = [
        [
            escape(str(layer["name"])),
            escape("x".join(map(str, layer["shape"]))),
            f"{layer['kept']:,} / {layer['total']:,}",
            f"{layer['kept'] / max(layer['total'], 1):.2%}",
            f"{layer['empty_rows']} / {layer['shape'][0] if layer['shape'] else 1}",
            "COLLAPSED" if layer["kept"] == 0 else "bottleneck" if _narrow(layer) else "",
        ]
        for layer in run.layers
    ]
    about = f"A bottleneck lost at least {BOTTLENECK:.0%} of its entries."
    return table(
        ["prunable parameter", "shape", "kept", "density", "empty output channels", "state"], lines, about, prose=True
    )


def _narrow(layer: dict[str, Any]) -> bool:
    return bool(layer["total"] - layer["kept"] >= BOTTLENECK * layer["total"])
