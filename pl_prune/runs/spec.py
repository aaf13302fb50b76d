"""`Spec`: one run of a study, and the arguments that ask for it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Spec:
    """One run of a study.

    Args:
        key: Its name, and that of its folder.
        row: The row of the table that it belongs to.
        settings: The point of the grid or of the search.
        seed: The seed.
        config: Configuration files, later ones over earlier ones.
        values: Every setting over those files, by dotted key.
        weights_of: The run whose last weights it starts from; None: from scratch.
        masks: Whether it keeps to the masks of that run, too.
        trial: Its number in the search of its row; None in a grid.
    """

    key: str
    row: str
    settings: dict[str, Any]
    seed: int
    config: tuple[str, ...]
    values: dict[str, Any]
    weights_of: str | None = None
    masks: bool = False
    trial: int | None = None

    @property
    def words(self) -> list[str]:
        """The arguments of `pl-prune fit`."""
        return [*(word for file in self.config for word in ("--config", file)), *arguments(self.values)]


def arguments(values: Mapping[str, Any]) -> list[str]:
    """Return settings as arguments of a command: a later one goes into what an earlier one has set.

    Args:
        values: By dotted key.

    Returns:
        A word for each.
    """
    return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items()]


def key_of(row: str, point: Mapping[str, Any], seed: int) -> str:
    """Return the name of a run, which is that of its folder.

    Args:
        row: Its row.
        point: Its settings.
        seed: Its seed.

    Returns:
        Letters, digits and `.=+-_`, at most 150 of them.
    """
    words = [row, *(f"{key.rpartition('.')[2]}={value}" for key, value in point.items()), f"seed={seed}"]
    key = "_".join(re.sub(r"[^\w.=+-]+", "-", word) for word in words)
    return key if len(key) <= 150 else f"{key[:130]}_{hashlib.sha256(key.encode()).hexdigest()[:16]}"
