"""The page of a study."""

from __future__ import annotations

from html import escape
from pathlib import Path

from pl_prune.report.attached import gathered, left_figures
from pl_prune.report.canvas import Picture
from pl_prune.report.costs import about_counts, cost_table
from pl_prune.report.curves import curve_figures
from pl_prune.report.findings import best, collapses, summary, verdicts
from pl_prune.report.grid import Study
from pl_prune.report.heatmaps import agreement_figure, collapse_figure, density_figures
from pl_prune.report.magnitudes import pruned_figure, scatter_figure
from pl_prune.report.markup import gallery, listing, notes, table
from pl_prune.report.plots import metric_figures, pareto_figures
from pl_prune.report.saliency import correlation_figure, saliency_figure
from pl_prune.report.scored import Scored, scored
from pl_prune.report.searching import search_figures
from pl_prune.report.widths import width_figure
from pl_prune.report.words import abbreviate, listed, show, text_of

_INTERVALS = (
    "An interval is the mean ±1 standard deviation over seeds. It is no significance test, and with few seeds it is rough. "
    "Where the metric is one of validation, the best epoch was chosen on the same data and looks better than it is."
)


def study_page(study: Study) -> tuple[str, list[Picture]]:
    """Write what a study says.

    Args:
        study: The study.

    Returns:
        The page's body, and its figures.
    """
    found, broken, seen = verdicts(study), collapses(study), scored(study)
    foreign, crowded = gathered(_figure_folders(study))
    counts = about_counts([run for group in study.groups for run in group.runs])
    sections = {
        "Of the study": left_figures(study.folder),
        "Metric": [
            *(search_figures if study.searched else metric_figures)(study),
            *pareto_figures(study),
            *curve_figures(study),
        ],
        f"Scores{seen.where}": _of_scores(seen),
        "Masks": [
            *density_figures(study),
            *(p for p in (width_figure(study), collapse_figure(study), agreement_figure(study)) if p),
        ],
        "Left by the runs": foreign,
    }
    parts = [
        f'<p class="lead">{escape(summary(study, found))}</p>',
        listing("Point by point", [v.words for v in found], open_=len(found) <= 8),
        listing("Collapsed", broken, open_=len(broken) <= 12),
        listing("Failed", [f"{key}: {error}" for key, error in study.failures.items()], open_=len(study.failures) <= 8),
        "<h2>Table</h2>",
        _table(study),
        cost_table(study),
        *(gallery(title, figures) for title, figures in sections.items()),
        notes([*counts, _INTERVALS, *_absent(study, seen, bool(sections["Metric"])), *_no_room(crowded)]),
    ]
    return "\n".join(parts), [figure for figures in sections.values() for figure in figures]


def _of_scores(seen: Scored) -> list[Picture]:
    figures = [saliency_figure(seen.found)]
    if seen.magnitudes is not None:
        figures += [f(seen.alike, seen.magnitudes) for f in (scatter_figure, pruned_figure)]
    return [figure for figure in (*figures, correlation_figure(seen.found)) if figure]


def _absent(study: Study, seen: Scored, drawn: bool) -> list[str]:
    runs = [run for group in study.groups for run in group.runs]
    absent = list(seen.notes)
    if not any(run.layers for run in runs):
        absent.append(
            "No run has a report.json, so nothing is known of layers and counts; add the callback SparsityReport."
        )
    elif not any(run.latency for run in runs):
        absent.append("No run has measured its latency; SparsityReport(latency=True) does.")
    if not any(study.metric in record for run in runs for record in run.curve):
        known = sorted({name for run in runs for record in run.curve for name in record})
        absent.append(
            f"No run has logged {study.metric} in a metrics.jsonl, so there are no training curves"
            f"{'; logged are ' + ', '.join(known) if known else ''}."
        )
    return absent


def _no_room(crowded: list[str]) -> list[str]:
    return [f"There was no room for {len(crowded)} pictures that runs left: {listed(crowded[:6])}."] if crowded else []


def _figure_folders(study: Study) -> list[tuple[str, Path]]:
    """Name the first run of every row at the points that figures look at."""
    groups = [study.dense] if study.dense else []
    groups += [group for point in study.shown for group in study.at(point)]
    return [
        (
            f"{group.cell.row}{f', {study.label(group.cell.settings)}' if group.cell.settings else ''}",
            group.runs[0].folder,
        )
        for group in groups
    ]


def _table(study: Study) -> str:
    bold = best(study)
    metric = study.metric
    head = ["row", *(study.short(key) for key in study.keys), "seeds", f"last {metric}", f"best {metric}"]
    paper = any(one["value"] for one in study.references)
    head += ["paper"] if paper else []
    lines = []
    for group in study.groups:
        cell = group.cell
        told = [r["value"] for r in study.references if (r["row"], r["settings"]) == (cell.row, cell.settings)]
        last = escape(text_of(cell.last))
        methods = dict.fromkeys(show(run.record["method"]) for run in group.runs if run.record.get("method"))
        lines.append([
            escape(cell.row),
            *(escape(abbreviate(show(cell.settings[key]), 40)) if key in cell.settings else "-" for key in study.keys),
            f"{len(cell.seeds)} ({escape(abbreviate(', '.join(map(str, cell.seeds)), 16))})",
            f"<strong>{last}</strong>" if any(group is one for one in bold) else last,
            escape(text_of(cell.best)),
            *([escape(show(told[0]) if told else "-")] if paper else []),
            f"{cell.pruning_seconds:.2f}",
            f"{cell.seconds:.1f}",
            "-" if cell.peak_bytes is None else f"{cell.peak_bytes / 2**20:.0f}",
            escape("; ".join(methods)) or "-",
        ])
    for one in study.references:
        if not one["reproduced"]:
            point = [escape(show(one["settings"][key])) if key in one["settings"] else "-" for key in study.keys]
            value = [escape(show(one["value"] or "-"))] if paper else []
            lines.append([escape(one["row"]), *point, "0", "not reproduced", "-", *value, *["-"] * 4])
    bolds = "the best point of each row" if study.searched else "where the best row's interval overlaps with no other's"
    about = f"Mean ± standard deviation over seeds; bold: {bolds}."
    return table([*head, "pruning (s)", "wall (s)", "peak (MiB)", "method"], lines, about, prose=True)
