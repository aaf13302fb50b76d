"""`--json` before LightningCLI sees the arguments."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout


def without_json(argv: Sequence[str]) -> tuple[list[str], bool, AbstractContextManager[object]]:
    """Take `--json` out of the arguments.

    Args:
        argv: Arguments of a command that LightningCLI parses.

    Returns:
        The others; whether it was there; and, to run the command in, a context that sends to the standard error what would
        otherwise stand before the JSON on the standard output. Help and printed configurations stay where they are.
    """
    words = [word for word in argv if word != "--json"]
    asks = any(word in ("-h", "--help") or word.startswith("--print_config") for word in words)
    as_json = len(words) < len(argv) and not asks
    return words, as_json, redirect_stdout(sys.stderr) if as_json else nullcontext()
