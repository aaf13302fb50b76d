"""The parts of a study file, read with errors that name them."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from pl_prune.core.types import PruneError


def read(file: Path, known: set[str]) -> dict[str, Any]:
    """Read a study file.

    Args:
        file: Its path.
        known: The keys it may have.

    Returns:
        Its content.

    Raises:
        PruneError: If it is missing, cannot be read, is no YAML, or has an unknown key.
    """
    try:
        content = yaml.safe_load(file.read_text())
    except FileNotFoundError as error:
        raise PruneError(f"Expected a YAML file at {str(file)!r}; found none. Look at the path.") from error
    except OSError as error:
        raise PruneError(f"Expected a YAML file at {str(file)!r}; found {error.strerror}. Look at the path.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PruneError(f"Expected YAML in {str(file)!r}; found {error}. Mend the file.") from error
    if not isinstance(content, dict):
        raise PruneError(
            f"Expected the keys {', '.join(sorted(known))} in {str(file)!r}; found {type(content).__name__}. Write them."
        )
    check_keys(content, known, str(file))
    return content


def check_keys(content: Mapping[str, Any], known: set[str], where: str) -> None:
    """Raise if a part of a study file has an unknown key.

    Args:
        content: The part.
        known: The keys it may have.
        where: Names the part.

    Raises:
        PruneError: If it has another.
    """
    unknown = sorted(set(content) - known, key=str)
    if unknown:
        close = get_close_matches(str(unknown[0]), known, 1)
        fix = f"The closest name to {unknown[0]!r} is {close[0]!r}." if close else "Look at the spelling."
        raise PruneError(
            f"Expected the keys {', '.join(sorted(known))} in {where}; found {', '.join(map(repr, unknown))}. {fix}"
        )


def mapping(value: Any, what: str) -> dict[str, Any]:
    """Return a part that has keys.

    Args:
        value: The part; None for an empty one.
        what: What it should be.

    Returns:
        A copy.

    Raises:
        PruneError: If it has no keys.
    """
    if value is not None and not isinstance(value, dict):
        raise PruneError(f"Expected {what}; found {value!r}. Write it so.")
    return dict(value or {})


def files(names: Any, study: Path, where: str) -> list[str]:
    """Find configuration files from the working folder, else from the study file's.

    Args:
        names: One or several; None for none.
        study: The study file.
        where: Names the part of it.

    Returns:
        Their paths.

    Raises:
        PruneError: If one is not there.
    """
    names = [names] if isinstance(names, str) else list(names or [])
    found = []
    for name in names:
        places = [p for p in (Path(name), study.parent / name) if p.is_file()]
        if not places:
            raise PruneError(
                f"Expected the configuration file {name!r} of {where} in {str(study)!r}; found none, neither from the working folder nor "
                "beside the study. Look at the path."
            )
        found.append(str(places[0]))
    return found
