"""The fragments of the pages."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = {page.stem: page.read_text() for page in sorted((ROOT / "docs").glob("*.md"))}


def fragments(page: str, language: str) -> list[str]:
    """Return the fragments of a page in one language, in order."""
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], re.DOTALL)


def run(page: str, space: dict) -> dict:
    """Run a page's Python fragments in order."""
    found = fragments(page, "python")
    assert found
    for fragment in found:
        exec(fragment, space)
    return space
