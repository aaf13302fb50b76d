"""The reference: one page for each room of the package, from its public names and their docstrings."""

from __future__ import annotations

import re
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import pl_prune


def pages() -> dict[str, str]:
    """Write the pages.

    Returns:
        Markdown by path below docs/.
    """
    rooms: dict[str, list[str]] = {}
    for home, names in pl_prune._HOMES.items():
        rooms.setdefault(home.partition(".")[0], []).extend(names)
    return {
        f"reference/{room}.md": "\n\n".join([f"# pl_prune.{room}", *(f"::: pl_prune.{name}" for name in names)])
        for room, names in rooms.items()
    }


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages to the book.

    Args:
        files: What is there.
        config: The book's settings.

    Returns:
        The same files, with the pages.
    """
    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    return files


class Doctests(griffe.Extension):
    """Put the doctests of a docstring into a section of examples, as Google's style wants them."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Indent them.

        Args:
            obj: Whatever has a docstring.
            **kwargs: The rest.
        """
        if obj.docstring:
            obj.docstring.value = re.sub(
                r"^>>> .*?(?=\n\n|\Z)",
                lambda found: "Examples:\n    " + found[0].replace("\n", "\n    "),
                obj.docstring.value,
                flags=re.MULTILINE | re.DOTALL,
            )
