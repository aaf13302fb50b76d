"""The vocabulary of the package: parameter sets, scores, and the one error it raises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from fractions import Fraction
from typing import TypeAlias

import torch
from torch import Tensor, nn

Params: TypeAlias = dict[str, nn.Parameter]
"""Prunable parameters by name, in `named_parameters()` order."""

Scores: TypeAlias = dict[str, Tensor]
"""One score per entry: the keys and shapes of `Params`, finite, higher = keep."""


def plain(name: str) -> str:
    """Return a parameter's name without what `torch.compile` puts into it.

    Args:
        name: As in `named_parameters()`.

    Returns:
        The name that it has in the module before compilation.

    >>> plain("net._orig_mod.0.weight")
    'net.0.weight'
    """
    return name.replace("_orig_mod.", "")


class PruneError(ValueError):
    """A user's input that cannot be used: says what was expected, what was found and how to fix it."""


def prune_count(sparsity: float, size: int) -> int:
    """Return how many of `size` entries a sparsity removes: `floor(sparsity * size + 1/2)` in rational arithmetic.

    Binary floats are read as the decimal a user typed, so 0.9 of 1000 is 900.

    Args:
        sparsity: Fraction of entries to remove, in [0, 1).
        size: Number of entries.

    Returns:
        The exact number of entries to remove.

    Raises:
        PruneError: If `sparsity` is not a number in [0, 1).

    >>> prune_count(0.9, 1000), prune_count(0.5, 3)
    (900, 2)
    """
    check_sparsity(sparsity)
    return int(Fraction(str(float(sparsity))) * size + Fraction(1, 2))


def check_sparsity(sparsity: float, of: str = "prunable parameters") -> None:
    """Raise `PruneError` unless `sparsity` is a number in [0, 1).

    Args:
        sparsity: The value to check.
        of: What it is a fraction of.

    Raises:
        PruneError: If it is anything else.
    """
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)) or not 0 <= sparsity < 1:
        raise PruneError(
            f"Expected a sparsity in [0, 1), the fraction of {of} to remove; found {sparsity!r}. Write 90 % as 0.9."
        )


def check_count(name: str, value: int) -> None:
    """Raise `PruneError` unless a value is a whole number of 1 or more.

    Args:
        name: What the value sets.
        value: The value.

    Raises:
        PruneError: If it is anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise PruneError(
            f"Expected {name} to be a whole number of 1 or more; found {value!r}. Leave it out for the default."
        )


def check_positive(name: str, value: float) -> None:
    """Raise `PruneError` unless a value is a positive number.

    Args:
        name: What the value sets.
        value: The value.

    Raises:
        PruneError: If it is anything else.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise PruneError(f"Expected {name} to be positive; found {value!r}. Leave it out for the default.")


def check_scores(scores: Mapping[str, Tensor]) -> None:
    """Raise `PruneError` unless every score is a finite floating-point number.

    Args:
        scores: Scores by parameter name.

    Raises:
        PruneError: If there is no score at all, or a layer holds NaN, infinity or integers; names the layers.
    """
    if not scores:
        raise PruneError("Expected scores of at least one parameter; found none. Pass what `score` returned.")
    not_float = [name for name, score in scores.items() if not score.is_floating_point()]
    if not_float:
        raise PruneError(f"Expected floating-point scores; found other types in {_some(not_float)}. Use `.float()`.")
    # NaN and infinity both survive min and max, which are far cheaper than an elementwise test.
    extremes = torch.stack([
        end.to("cpu", torch.float64)
        for score in scores.values()
        for end in (score.aminmax() if score.numel() else (torch.zeros(()),) * 2)
    ])
    bad = [
        name for name, finite in zip(scores, extremes.isfinite().view(-1, 2).all(1).tolist(), strict=True) if not finite
    ]
    if bad:
        raise PruneError(
            f"Expected finite scores; found NaN or infinity in {_some(bad)}. "
            "Look for a diverged or overflowing loss, or for weights that are not finite."
        )


def score_dtype(parameter: Tensor) -> torch.dtype:
    """Return the precision of a parameter's scores.

    Args:
        parameter: The parameter.

    Returns:
        float64 for float64 parameters, else float32.
    """
    return torch.promote_types(parameter.dtype, torch.float32)


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Raise `PruneError` unless a value is one of those allowed.

    Args:
        name: What the value sets.
        value: The value.
        choices: The allowed ones.

    Raises:
        PruneError: If it is none of them.
    """
    if value not in choices:
        allowed = ", ".join(map(repr, choices))
        raise PruneError(f"Expected {name} to be one of {allowed}; found {value!r}. Choose one of them.")


def check_type(name: str, value: object, kind: type, example: str) -> None:
    """Raise `PruneError` unless a value is of a type.

    Args:
        name: What the value sets.
        value: The value.
        kind: Its type.
        example: How to write one.

    Raises:
        PruneError: If it is of another type; a class in place of an instance is said to be one.
    """
    if not isinstance(value, kind):
        found = (
            f"the class {value.__name__}" if isinstance(value, type) else f"{type(value).__name__} {str(value)[:60]!r}"
        )
        raise PruneError(f"Expected {name} to be a {kind.__name__}; found {found}. Write {example}.")


def describe(settings: object) -> str:
    """Write a dataclass as a call with the arguments that differ from their defaults.

    Args:
        settings: A dataclass instance.

    Returns:
        One line.
    """
    changed = [
        f"{f.name}={getattr(settings, f.name)!r}"
        for f in fields(settings)  # type: ignore[arg-type]
        if getattr(settings, f.name) != f.default
    ]
    return f"{type(settings).__name__}({', '.join(changed)})"


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
