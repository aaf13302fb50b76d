"""`write_report`: a study or a run as one page that needs nothing else."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from pl_prune.core.types import PruneError
from pl_prune.report.canvas import Picture, need_matplotlib
from pl_prune.report.curves import curve_figures, run_figures
from pl_prune.report.findings import best, collapses, summary, verdicts
from pl_prune.report.grid import Run, Study
from pl_prune.report.heatmaps import agreement_figure, collapse_figure, density_figures
from pl_prune.report.plots import metric_figures, pareto_figures
from pl_prune.report.reading import read_json, read_run, read_study
from pl_prune.report.sparsity import BOTTLENECK
from pl_prune.report.style import STYLE
from pl_prune.report.words import abbreviate, is_number, show, text_of

_TIME = (
    "Masked weights save neither time nor memory: parameters and MACs kept are counts of what a device that skips zeros "
    "would do, not measurements. Wall times here are of training with masks."
)
_INTERVALS = (
    "An interval is the mean ±1 standard deviation over seeds. It is no significance test, and with few seeds it is rough. "
    "Where the metric is one of validation, the best epoch was chosen on the same data and looks better than it is."
)


def write_report(
    folder: str | Path, out: str | Path | None = None, *, metric: str = "val/acc", direction: str = "maximize"
) -> Path:
    """Write a study or a finished run as one HTML page, and its figures as PNG in `report_figures/` beside it.

    Args:
        folder: A study's folder, with results.jsonl, or a finished run's, with result.json.
        out: The page; `report.html` in the folder when None.
        metric: The metric that decided the study.
        direction: Whether it is to be "maximize"d or "minimize"d.

    Returns:
        The page's path.

    Raises:
        PruneError: If the folder is neither, the run is not finished, a file is damaged, or matplotlib is missing.
    """
    if direction not in ("maximize", "minimize"):
        raise PruneError(f"Expected direction to be 'maximize' or 'minimize'; found {direction!r}. Choose one.")
    source = Path(folder)
    if (source / "results.jsonl").is_file():
        study = read_study(source, metric, direction)
        need_matplotlib()
        title, body, figures = f"Study {study.name}", *_study(study)
    elif (source / "result.json").is_file():
        run = read_run(source, read_json(source / "result.json"))
        need_matplotlib()
        title, body, figures = f"Run {source.resolve().name}", *_run(run)
    else:
        raise PruneError(_neither(source))
    page = source / "report.html" if out is None else Path(out)
    shots = page.parent / "report_figures"
    shots.mkdir(parents=True, exist_ok=True)
    files = {f"{number:02d}_{figure.name}.png": figure.png for number, figure in enumerate(figures, 1)}
    for name, content in files.items():
        _write(shots / name, content)
    for old in shots.glob("*.png"):
        if re.fullmatch(r"\d\d_[a-z_0-9]+\.png", old.name) and old.name not in files:
            old.unlink()  # of an earlier page
    _write(page, _page(title, body).encode())
    return page


def _neither(folder: Path) -> str:
    wanted = f"Expected a study's results.jsonl or a finished run's result.json in {str(folder)!r}; found"
    if not folder.is_dir():
        return f"{wanted} no such folder. Look at the path."
    if any((folder / name).exists() for name in ("environment.json", "metrics.jsonl", "lock")):
        return f"{wanted} a run that is not finished. Run the same command again."
    if (folder / "runs").is_dir() or (folder / "study.db").is_file():
        return f"{wanted} a study that has written no results yet. Run the study again."
    return f"{wanted} neither. Name the folder of a `pl-prune study` or a `pl-prune fit`."


def _write(path: Path, content: bytes) -> None:
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_bytes(content)
    part.replace(path)


def _study(study: Study) -> tuple[str, list[Picture]]:
    found = verdicts(study)
    optional = [collapse_figure(study), agreement_figure(study)]
    figures = [
        *metric_figures(study),
        *pareto_figures(study),
        *curve_figures(study),
        *density_figures(study),
        *(figure for figure in optional if figure),
    ]
    broken = collapses(study)
    absent = []
    if not any(run.layers for group in study.groups for run in group.runs):
        absent.append(
            "No run has a report.json, so nothing is known of layers and counts; add the callback SparsityReport."
        )
    if not any(figure.name.startswith("training") for figure in figures):
        known = sorted({name for g in study.groups for run in g.runs for record in run.curve for name in record})
        absent.append(
            f"No run has logged {study.metric} in a metrics.jsonl, so there are no training curves"
            f"{'; logged are ' + ', '.join(known) if known else ''}."
        )
    parts = [
        f'<p class="lead">{escape(summary(study, found))}</p>',
        _listing("Point by point", [v.words for v in found], open_=len(found) <= 8),
        _listing("Collapsed", broken, open_=len(broken) <= 12),
        "<h2>Table</h2>",
        _study_table(study),
        "<h2>Figures</h2>",
        _figures(figures),
        _notes([_TIME, _INTERVALS, *absent]),
    ]
    return "\n".join(parts), figures


def _study_table(study: Study) -> str:
    bold = best(study)
    metric = study.metric
    head = ["row", *(study.short(key) for key in study.keys), "seeds", f"last {metric}", f"best {metric}"]
    lines = []
    for group in study.groups:
        cell = group.cell
        last = escape(text_of(cell.last))
        methods = dict.fromkeys(show(run.record["method"]) for run in group.runs if run.record.get("method"))
        lines.append([
            escape(cell.row),
            *(escape(abbreviate(show(cell.settings[key]), 40)) if key in cell.settings else "-" for key in study.keys),
            f"{len(cell.seeds)} ({escape(abbreviate(', '.join(map(str, cell.seeds)), 16))})",
            f"<strong>{last}</strong>" if any(group is one for one in bold) else last,
            escape(text_of(cell.best)),
            f"{cell.pruning_seconds:.2f}",
            f"{cell.seconds:.1f}",
            "-" if cell.peak_bytes is None else f"{cell.peak_bytes / 2**20:.0f}",
            escape("; ".join(methods)) or "-",
        ])
    about = "Mean ± standard deviation over seeds; bold where the best row's interval overlaps with no other's."
    return _table([*head, "pruning (s)", "wall (s)", "peak (MiB)", "method"], lines, about)


def _run(run: Run) -> tuple[str, list[Picture]]:
    figures = run_figures(run)
    record, cost = run.record, run.cost
    path = {True: "yes", False: "NONE, no input reaches the output"}.get(run.path, "unknown")  # type: ignore[arg-type]
    facts = {
        "method": show(record.get("method", "-")),
        "sparsity": f"{record['sparsity']:.4f} of the prunable parameters"
        if is_number(record.get("sparsity"))
        else "-",
        "path input to output": path,
        "seed, epochs, steps": ", ".join(show(record.get(key, "-")) for key in ("seed", "epochs", "steps")),
        "wall time, pruning time (s)": f"{show(record.get('seconds', '-'))}, {show(record.get('pruning_seconds', '-'))}",
        "peak memory (MiB)": f"{record['peak_bytes'] / 2**20:.0f}" if record.get("peak_bytes") else "-",
    }
    for word, kept, total in (("parameters", "params_kept", "params"), ("MACs per sample", "macs_kept", "macs")):
        if kept in cost and total in cost:
            facts[f"{word} kept"] = f"{cost[kept]:,} of {cost[total]:,} ({cost[kept] / max(cost[total], 1):.2%})"
    metrics = record.get("metrics", {})
    facts.update({
        f"last {name}": f"{value:.6g}" if is_number(value) else show(value)
        for name, value in (metrics if isinstance(metrics, dict) else {}).items()
    })
    gone = [layer["name"] for layer in run.layers if layer["kept"] == 0]
    narrow = sum(_narrow(layer) and layer["kept"] > 0 for layer in run.layers)
    lead = f"{facts['method']}: {facts['sparsity']} pruned; {len(gone)} of {len(run.layers)} layers collapsed"
    lead += f" ({', '.join(gone[:3])}{' and more' if len(gone) > 3 else ''})" if gone else ""
    lead += f", {narrow} bottlenecks; path from input to output: {path}."
    absent = [] if run.layers else ["The run has no report.json; add the callback SparsityReport."]
    absent += [] if run.curve else ["The run has no metrics.jsonl, so there are no training curves."]
    pairs = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    parts = [f'<p class="lead">{escape(lead)}</p>', f"<dl>{pairs}</dl>"]
    if run.layers:
        parts += ["<h2>Layers</h2>", _layer_table(run)]
    parts += [
        "<h2>Figures</h2>",
        _figures(figures),
        _notes([_TIME, "One run is one seed: it shows no spread.", *absent]),
    ]
    return "\n".join(parts), figures


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
    return _table(["prunable parameter", "shape", "kept", "density", "empty output channels", "state"], lines, about)


def _narrow(layer: dict[str, Any]) -> bool:
    return bool(layer["total"] - layer["kept"] >= BOTTLENECK * layer["total"])


def _listing(title: str, words: Sequence[str], *, open_: bool) -> str:
    items = "".join(f"<li>{escape(text)}</li>" for text in words)
    opened = " open" if open_ else ""
    return f"<details{opened}><summary>{title} ({len(words)})</summary><ul>{items}</ul></details>" if words else ""


def _table(head: Sequence[str], lines: Sequence[Sequence[str]], about: str) -> str:
    top = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "\n".join(
        f'<tr><th scope="row">{line[0]}</th>{"".join(f"<td>{text}</td>" for text in line[1:])}</tr>' for line in lines
    )
    return (
        f'<p class="about">{escape(about)}</p><div class="wide" tabindex="0"><table><thead><tr>{top}</tr></thead>'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def _figures(figures: Sequence[Picture]) -> str:
    items = [
        f"<figure><h3>{escape(f.title)}</h3>\n{f.svg}\n<figcaption>{escape(f.caption)}</figcaption></figure>"
        for f in figures
    ]
    return f'<div class="figures">{"".join(items)}</div>' if items else "<p>There is nothing to draw.</p>"


def _notes(words: Sequence[str]) -> str:
    return f"<h2>What this page cannot tell</h2><ul>{''.join(f'<li>{escape(text)}</li>' for text in words)}</ul>"


def _page(title: str, body: str) -> str:
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head>\n<body><h1>{escape(title)}</h1>\n{body}\n</body></html>\n"
    )
