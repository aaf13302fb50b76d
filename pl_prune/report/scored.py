"""The runs of a study whose scores are looked at, side by side at one seed."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pl_prune.core.masks import MaskSet
from pl_prune.core.store import load_masks, load_scores, read_header
from pl_prune.report.entries import Entries, entries
from pl_prune.report.grid import Group, Run, Study
from pl_prune.report.words import listed

MASKS, SCORES = "masks.safetensors", "scores.safetensors"
"""Files of a run."""
UNIT_MASKS, UNIT_SCORES = "unit_masks.safetensors", "unit_scores.safetensors"
"""Files of a run that prunes whole units."""
_ROWS = 12
_MAGNITUDE = "pl_prune.criteria.magnitude.Magnitude"


@dataclass(frozen=True)
class Scored:
    """Runs with scores, one of each row.

    Args:
        found: Their entries.
        magnitudes: The one whose scores are the magnitudes of its weights; None where no row has that criterion.
        where: Of which point and seed they are, for a heading.
        notes: What is missing, in sentences.
    """

    found: list[Entries] = field(default_factory=list)
    magnitudes: Entries | None = None
    where: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def alike(self) -> list[Entries]:
        """Runs that scored the very weights whose magnitudes are known."""
        return [one for one in self.found if self.magnitudes and one.weights == self.magnitudes.weights != ""]


def scored(study: Study) -> Scored:
    """Read the scores of every row at the sparsest point, at one seed.

    Args:
        study: The study.

    Returns:
        At most 12 runs.
    """
    point = study.shown[0] if study.shown else {}
    groups = [g for g in study.at(point) if any(map(has_scores, g.runs))]
    if not groups:
        return Scored(notes=["No run has a scores.safetensors, so there are no figures of scores."])
    runs, seed = _of_one_seed(groups)
    shown = list(zip([g.cell.row for g in groups], runs, strict=True))[:_ROWS]
    with ThreadPoolExecutor(2) as pool:  # hashing and comparing leave the interpreter free
        found = list(pool.map(lambda one: read_entries(one[1], one[0], study.rows.index(one[0])), shown))
    magnitudes = next((one for one, (_, run) in zip(found, shown, strict=True) if _is_magnitude(run)), None)
    seen = Scored(
        found, magnitudes, f" at {study.label(point)}, {f'seed {seed}' if seed is not None else 'a seed of each row'}"
    )
    if len(groups) > _ROWS:
        left = listed([g.cell.row for g in groups[_ROWS:]])
        seen.notes.append(f"Figures of scores hold the first {_ROWS} rows; left out are {left}.")
    others = [one.row for one in found if not any(one is same for same in seen.alike)]
    if magnitudes is None:
        seen.notes.append("No row scores by Magnitude(), so no figure sets scores against magnitudes.")
    elif others:
        seen.notes.append(
            f"{listed(others)} scored other weights than {magnitudes.row}, so figures of magnitudes leave them out."
        )
    return seen


def has_scores(run: Run) -> bool:
    """Say whether a run left scores and masks, of entries or of units.

    Args:
        run: The run.

    Returns:
        Whether both files are there.
    """
    return all(file.is_file() for file in _files(run))


def _files(run: Run) -> tuple[Path, Path]:
    """Return the files of scores and of masks: of units, where it has any."""
    units = (run.folder / UNIT_SCORES).is_file()
    names = (UNIT_SCORES, UNIT_MASKS) if units else (SCORES, MASKS)
    return run.folder / names[0], run.folder / names[1]


def read_entries(run: Run, row: str, place: int = 0) -> Entries:
    """Read a run's scores and masks.

    Args:
        run: The run.
        row: What to call it.
        place: Of its row in the study.

    Returns:
        Its entries.
    """
    scores, masks = _files(run)
    weights = str(_origin(run).get("weights", ""))
    return entries(row, load_scores(scores), load_masks(masks), place=place, weights=weights)


def read_masks(run: Run) -> MaskSet:
    """Read a run's masks.

    Args:
        run: The run.

    Returns:
        Its masks; none where it has no file of them.
    """
    file = run.folder / MASKS
    return load_masks(file) if file.is_file() else MaskSet({})


def _origin(run: Run) -> dict[str, Any]:
    about = read_header(_files(run)[0])["meta"]
    return about if isinstance(about, dict) else {}


def _is_magnitude(run: Run) -> bool:
    criterion = _origin(run).get("criterion")
    return isinstance(criterion, dict) and criterion.get("class_path") == _MAGNITUDE


def _of_one_seed(groups: Sequence[Group]) -> tuple[list[Run], int | None]:
    """Return a run of each group, of the first seed that all of them have; else the first of each."""
    seeds = [{run.record.get("seed"): run for run in g.runs if has_scores(run)} for g in groups]
    shared = next((seed for seed in seeds[0] if seed is not None and all(seed in found for found in seeds)), None)
    return [found[shared] if shared is not None else next(iter(found.values())) for found in seeds], shared
