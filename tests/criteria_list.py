"""Every criterion of the package, found through its base class."""

from __future__ import annotations

import inspect

import pl_prune


def concrete(base: type) -> list[type]:
    """Return every concrete subclass that the package exports."""
    exported = [getattr(pl_prune, name) for name in pl_prune.__all__]
    return [c for c in exported if inspect.isclass(c) and issubclass(c, base) and not inspect.isabstract(c)]


def criteria() -> list[pl_prune.Criterion]:
    """Return one instance of each criterion, with its defaults."""
    return [cls() for cls in concrete(pl_prune.Criterion)]
