"""Parts of a page, as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from pl_prune.report.canvas import Picture
from pl_prune.report.style import STYLE


def listing(title: str, words: Sequence[str], *, open_: bool) -> str:
    """Fold a list under its title.

    Args:
        title: Plain text.
        words: Its items, as text.
        open_: Whether it is unfolded.

    Returns:
        An element; nothing for no items.
    """
    items = "".join(f"<li>{escape(text)}</li>" for text in words)
    opened = " open" if open_ else ""
    return f"<details{opened}><summary>{title} ({len(words)})</summary><ul>{items}</ul></details>" if words else ""


def table(head: Sequence[str], lines: Sequence[Sequence[str]], about: str, *, prose: bool = False) -> str:
    """Write a table that can be scrolled.

    Args:
        head: Names of the columns, as text.
        lines: Cells, as HTML; the first of a line is its head.
        about: What stands above it, as text.
        prose: Whether the last column holds words, to be wrapped.

    Returns:
        Elements.
    """
    kind = ' class="prose"' if prose else ""
    top = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "\n".join(
        f'<tr><th scope="row">{line[0]}</th>{"".join(f"<td>{text}</td>" for text in line[1:])}</tr>' for line in lines
    )
    return (
        f'<p class="about">{escape(about)}</p><div class="wide" tabindex="0"><table{kind}><thead><tr>{top}</tr></thead>'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def gallery(title: str, figures: Sequence[Picture]) -> str:
    """Write figures under a heading.

    Args:
        title: The heading, as text.
        figures: The figures.

    Returns:
        Elements; nothing for no figures.
    """
    items = [
        f"<figure><h3>{escape(f.title)}</h3>\n{f.svg}\n<figcaption>{escape(f.caption)}</figcaption></figure>"
        for f in figures
    ]
    return f'<h2>{escape(title)}</h2><div class="figures">{"".join(items)}</div>' if items else ""


def notes(words: Sequence[str]) -> str:
    """Write what a page cannot tell.

    Args:
        words: Sentences, as text.

    Returns:
        Elements.
    """
    return f"<h2>What this page cannot tell</h2><ul>{''.join(f'<li>{escape(text)}</li>' for text in words)}</ul>"


def page(title: str, body: str) -> str:
    """Write a page that needs nothing else.

    Args:
        title: As text.
        body: As HTML.

    Returns:
        The file's content.
    """
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head>\n<body><h1>{escape(title)}</h1>\n{body}\n</body></html>\n"
    )
