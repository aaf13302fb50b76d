"""Pictures that a run or a study leaves in its folder, for its page; a study's page has those of its runs, too."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from pathlib import Path

from pl_prune.core.types import PruneError
from pl_prune.report.canvas import Picture

_FOLDER = "figures"
_ROOM = 1_500_000
"""Bytes of foreign pictures that a page takes."""


def save_figure(folder: str | Path, picture: Picture) -> Path:
    """Leave a picture in the folder of a run or a study, as `figures/NAME.png` with its caption in `figures/NAME.txt`.

    Anything else may write such files too: `pl-prune report` puts every PNG of that folder into the page, under the first
    line of the text (the file's name where there is none), with the rest of it as caption.

    Args:
        folder: Of the run or the study.
        picture: The picture.

    Returns:
        The PNG.
    """
    place = Path(folder) / _FOLDER
    place.mkdir(parents=True, exist_ok=True)
    file = place / f"{picture.name}.png"
    (place / f"{picture.name}.txt").write_text(f"{picture.title}\n{picture.caption}\n")
    file.write_bytes(picture.png)
    return file


def left_figures(folder: str | Path) -> list[Picture]:
    """Read the pictures in the folder of a run or a study.

    Args:
        folder: Of the run or the study.

    Returns:
        Pictures by name; none where there are none.

    Raises:
        PruneError: If a file is no PNG.
    """
    found = []
    for file in sorted((Path(folder) / _FOLDER).glob("*.png")):
        png = file.read_bytes()
        if not png.startswith(b"\x89PNG\r\n\x1a\n"):
            raise PruneError(
                f"Expected a PNG in {str(file)!r}; found something else. Delete it, or save the figure again."
            )
        told = file.with_suffix(".txt")
        title, _, caption = told.read_text(errors="replace").strip().partition("\n") if told.is_file() else ("", "", "")
        title = title.strip() or file.stem.replace("_", " ")
        caption = " ".join(caption.split()) or f"A picture that was left as {file.name}."
        name = re.sub(r"[^a-z0-9]+", "_", file.stem.lower())
        found.append(Picture(name, title, caption, _image(png, f"{title}. {caption}"), png))
    return found


def gathered(folders: Sequence[tuple[str, Path]]) -> tuple[list[Picture], list[str]]:
    """Read the pictures of several runs, as many as a page has room for.

    Args:
        folders: What to call each run, and its folder.

    Returns:
        The pictures, those of one name side by side; and the names of those that found no room.
    """
    found: dict[str, list[Picture]] = {}
    left, room = [], _ROOM
    for run, folder in folders:
        for picture in left_figures(folder):
            room -= len(picture.svg)
            if room < 0:
                left.append(f"{run}: {picture.title}")
                continue
            named = replace(picture, title=f"{picture.title} ({run})" if run else picture.title)
            found.setdefault(picture.name, []).append(named)
    return [picture for pictures in found.values() for picture in pictures], left


def _image(png: bytes, label: str) -> str:
    return f'<img src="data:image/png;base64,{base64.b64encode(png).decode()}" alt="{escape(label)}">'
