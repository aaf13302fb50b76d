"""What a run of a study was asked to do: a run that was begun under other settings is not gone on with, nor shown."""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from pl_prune.core.types import PruneError
from pl_prune.runs.folder import RunFolder, write_whole
from pl_prune.runs.spec import Spec

_FILE = "asked.json"
_ABSENT = object()


def asked(spec: Spec) -> dict[str, Any]:
    """Return all that decides what a run does.

    Args:
        spec: The run.

    Returns:
        A digest of the content of each configuration file, by its name, and its place where two are called alike;
        settings by dotted key; and the run whose weights, and masks, it starts from.
    """
    names = [Path(file).name for file in spec.config]
    labels = [name if names.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(names, 1)]
    config = {
        label: _digest(file, Path(file).stat().st_mtime_ns) for label, file in zip(labels, spec.config, strict=True)
    }
    plain: dict[str, Any] = json.loads(
        json.dumps({"config": config, "values": spec.values, "weights_of": spec.weights_of})
    )
    if spec.masks:
        plain["masks_of"] = spec.weights_of
    return plain


def note(spec: Spec, run: RunFolder) -> None:
    """Write into a run's folder what it is asked to do.

    Args:
        spec: The run.
        run: Its folder.
    """
    write_whole(run.path / _FILE, json.dumps(asked(spec), indent=1))


def check_unchanged(spec: Spec, run: RunFolder, told: dict[str, Any] | None = None) -> None:
    """Raise if a run was begun under other settings than the study has now.

    Args:
        spec: The run as it is now.
        run: Its folder.
        told: What it was asked to do; None: what its folder says.

    Raises:
        PruneError: If that is something else.
    """
    file = run.path / _FILE
    if told is None:
        told = json.loads(file.read_text()) if file.is_file() else asked(spec)
    then, now = _flat(told), _flat(asked(spec))
    odd = [key for key in dict.fromkeys((*then, *now)) if then.get(key, _ABSENT) != now.get(key, _ABSENT)]
    old, new = ({key: side[key] for key in odd if key in side} for side in (then, now))
    if not odd:
        old, new = ({"order": _ordered(side)} for side in (told, asked(spec)))
    if old != new:
        state = "run" if run.finished else "begun"
        raise PruneError(
            f"Expected the settings that {spec.key!r} was {state} with, {old or 'without these'}; found {new or 'them gone'}. "
            f"Choose another name or --folder for what is changed, put the settings back, or delete {str(run.path)!r}, "
            "the runs that start from it, and the database."
        )


def _ordered(told: dict[str, Any]) -> list[str]:
    """Return what counts by its order: files, and settings that go into what another one sets."""
    values = told["values"]
    nested = [
        key for key in values if any(a != b and key in (a, b) and b.startswith(f"{a}.") for a in values for b in values)
    ]
    return [*told["config"], *nested]


def _flat(told: dict[str, Any]) -> dict[str, Any]:
    config = {name: f"content {digest}" for name, digest in told["config"].items()}
    source = {key: told[key] for key in ("weights_of", "masks_of") if told.get(key)}
    return {**config, **told["values"], **source}


@lru_cache
def _digest(file: str, changed: int) -> str:
    content = yaml.safe_load(Path(file).read_text())
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:8]
