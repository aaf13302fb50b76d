"""What commands write: tables on a terminal, plain text elsewhere, or JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from pl_prune.report.table import Alarm, Facts, Part, Strong, Table, as_text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text


def show(parts: Sequence[Part], stream: TextIO) -> None:
    """Write tables, facts and lines: drawn to the width of a terminal, as plain text elsewhere and without rich.

    Args:
        parts: What to write, one below the other.
        stream: Where to.
    """
    console = terminal(stream)
    if console is None:
        stream.write(as_text(parts) + "\n")
        return
    for part in parts:
        if isinstance(part, str):
            console.print(_cell(part), soft_wrap=True)  # a path stays one word
        else:
            console.print(_draw(part, console.width))


def show_json(content: Any, stream: TextIO) -> None:
    """Write one JSON document in one line; a number that is not finite is null.

    Args:
        content: Plain data.
        stream: Where to.
    """
    stream.write(json.dumps(finite(content), allow_nan=False) + "\n")


def finite(content: Any) -> Any:
    """Replace every number that is not finite, for which JSON has no word.

    Args:
        content: Plain data.

    Returns:
        The same with None in their place.

    >>> finite({"loss": [0.5, float("nan")]})
    {'loss': [0.5, None]}
    """
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {str(key): finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [finite(value) for value in content]
    return content


def terminal(stream: TextIO) -> Console | None:
    """Return a console that draws on a stream.

    Args:
        stream: Where to.

    Returns:
        None where the stream is no terminal, or one that cannot draw, or rich is not installed.
    """
    if not stream.isatty():
        return None
    try:
        from rich.console import Console
    except ImportError:
        return None
    console = Console(file=stream, highlight=False, markup=False, emoji=False)
    return None if console.is_dumb_terminal else console


def _draw(part: Table | Facts, width: int) -> Any:
    from rich import box, table

    if isinstance(part, Facts):
        grid = table.Table.grid(padding=(0, 2))
        grid.add_column(no_wrap=True)
        grid.add_column(overflow="fold")
        for label, value in part.pairs:
            grid.add_row(_cell(label), _cell(value))
        return grid
    drawn = table.Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for i, (name, room) in enumerate(zip(part.head, _widths(part, width - 2 * (len(part.head) - 1)), strict=True)):
        drawn.add_column(_cell(name), justify="left" if part.code or i == 0 else "right", overflow="fold", width=room)
    for row in part.rows:
        drawn.add_row(*(_code(cell) if part.code else _cell(cell) for cell in row))
    return drawn


def _widths(part: Table, room: int) -> list[int]:
    """Shrink the widest columns until all fit: first heads and words are wrapped, then whatever is widest is folded."""
    from rich.cells import cell_len

    columns = list(zip(part.head, *part.rows, strict=True))
    widths = [max(map(cell_len, column)) for column in columns]
    whole = [
        max(
            cell_len(piece)
            for j, cell in enumerate(column)
            for piece in (cell.split() if part.code or j == 0 else [cell]) or [""]
        )
        for column in columns
    ]
    while sum(widths) > max(room, len(widths)):
        wide = [i for i, width in enumerate(widths) if width > whole[i]] or range(len(widths))
        widths[max(wide, key=widths.__getitem__)] -= 1
    return widths


def _cell(text: str) -> Text:
    """Return text as it is, whatever looks like markup in it."""
    from rich.text import Text

    return Text(text, "bold green" if isinstance(text, Strong) else "bold red" if isinstance(text, Alarm) else "")


def _code(text: str) -> Text:
    """Return text whose `code` is coloured."""
    from rich.text import Text

    return Text.assemble(*((piece, "cyan" if i % 2 else "") for i, piece in enumerate(text.split("`"))))
