"""`write_report`: a study or a run as one page that needs nothing else."""

from __future__ import annotations

import os
import re
from pathlib import Path

from pl_prune.core.types import PruneError
from pl_prune.report import markup
from pl_prune.report.canvas import need_matplotlib
from pl_prune.report.reading import deciding, read_json, read_run, read_study
from pl_prune.report.run_page import run_page
from pl_prune.report.study_page import study_page


def write_report(
    folder: str | Path, out: str | Path | None = None, *, metric: str | None = None, direction: str | None = None
) -> Path:
    """Write a study or a finished run as one HTML page, and its figures as PNG beside it, in `report_figures/` for `report.html`.

    Args:
        folder: A study's folder, with results.jsonl, or a finished run's, with result.json.
        out: The page; `report.html` in the folder when None.
        metric: The metric that decides; the study's own when None, else `val/acc`.
        direction: Whether it is to be "maximize"d or "minimize"d; the study's own when None.

    Returns:
        The page's path.

    Raises:
        PruneError: If the folder is neither, the run is not finished, a file is damaged, or matplotlib is missing.
    """
    source, decided = Path(folder), metric or direction
    metric, direction = deciding(source, metric, direction)
    if direction not in ("maximize", "minimize"):
        raise PruneError(f"Expected direction to be 'maximize' or 'minimize'; found {direction!r}. Choose one.")
    if (source / "results.jsonl").is_file():
        study = read_study(source, metric, direction)
        need_matplotlib()
        title, body, figures = f"Study {study.name}", *study_page(study)
    elif (source / "result.json").is_file() and decided:
        raise PruneError(
            f"Expected a metric for the page of a study; found one for the run {str(source)!r}. Leave it out."
        )
    elif (source / "result.json").is_file():
        run = read_run(source, read_json(source / "result.json"))
        need_matplotlib()
        title, body, figures = f"Run {source.resolve().name}", *run_page(run)
    else:
        raise PruneError(_neither(source))
    page = source / "report.html" if out is None else Path(out)
    shots = page.parent / f"{page.stem}_figures"
    shots.mkdir(parents=True, exist_ok=True)
    files = {f"{number:02d}_{figure.name}.png": figure.png for number, figure in enumerate(figures, 1)}
    for name, content in files.items():
        _write(shots / name, content)
    for old in shots.glob("*.png"):
        if re.fullmatch(r"\d\d_[a-z_0-9]+\.png", old.name) and old.name not in files:
            old.unlink()  # of an earlier page
    _write(page, markup.page(title, body).encode())
    return page


def _neither(folder: Path) -> str:
    wanted = f"Expected a study's results.jsonl or a finished run's result.json in {str(folder)!r}; found"
    if not folder.is_dir():
        return f"{wanted} {'a file' if folder.is_file() else 'no such folder'}. Look at the path."
    if any((folder / name).exists() for name in ("environment.json", "metrics.jsonl", "lock")):
        return (
            f"{wanted} a run that is not finished. Run its command again, with --ckpt_path where it left a checkpoint."
        )
    if (folder / "runs").is_dir() or (folder / "study.db").is_file():
        return f"{wanted} a study that has written no results yet. Run the study again."
    return f"{wanted} neither. Name the folder of a `pl-prune study` or a `pl-prune fit`."


def _write(path: Path, content: bytes) -> None:
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_bytes(content)
    part.replace(path)
