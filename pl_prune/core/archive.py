"""Files of tensors that say what they are: safetensors with a checked header, there whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pl_prune.core.types import PruneError

Kind = Literal["scores", "masks"]
_KEY, _VERSION = "pl_prune", 1
_HASHED = 1 << 29  # bytes of data
_LIBRARIES = ("pl_prune", "torch", "lightning", "safetensors")
_DAMAGED = (
    "Expected {} in {!r}; found a damaged one, or one of another program ({}). "
    "Take another copy of the file, or make it again."
)


def write(
    path: str | Path,
    kind: Kind,
    tensors: dict[str, Tensor],
    shapes: dict[str, list[int]],
    more: Mapping[str, Any],
    meta: Mapping[str, Any] | None,
) -> None:
    """Write tensors and their header.

    Args:
        path: The file; one that is there is replaced.
        kind: What the tensors are.
        tensors: By parameter name.
        shapes: Shapes of the parameters.
        more: What the header says of this kind alone.
        meta: What else the header shall say: plain values and dataclasses.

    Raises:
        PruneError: If `meta` holds something else, or the file cannot be written.
    """
    header = {
        "kind": kind,
        "version": _VERSION,
        "shapes": shapes,
        "architecture": _hash(sorted(shapes.items())),
        "selected": sum(torch.Size(shape).numel() for shape in shapes.values()),
        **more,
        "libraries": {name: found for name in _LIBRARIES if (found := installed_version(name))},
        "content": hash_tensors(tensors),
    }
    try:
        header["meta"] = json.loads(json.dumps(dict(meta or {}), default=_plain, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise PruneError(
            f"Expected meta of plain values and dataclasses; found something else ({error}). Leave it out, or write it as text."
        ) from error
    header["digest"] = _hash(header)
    alone: dict[str, Tensor] = {}  # the format knows no tensors that share memory
    storages = set()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        if not tensor.is_contiguous() or storage.nbytes() != tensor.nbytes or storage.data_ptr() in storages:
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        storages.add(storage.data_ptr())
        alone[name] = tensor
    try:
        with whole_file(path) as part:
            save_file(alone, part, {_KEY: json.dumps(header)})
    except (OSError, SafetensorError) as error:
        raise PruneError(
            f"Expected to write {kind} to {str(path)!r}; found that this fails ({error}). Choose another path, or make room."
        ) from error


@contextmanager
def opened(path: str | Path, kind: Kind | None) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Open a file and check its header.

    Args:
        path: What `write` wrote.
        kind: What it must hold; None: anything.

    Yields:
        The open file and its header; any failure to read them is a `PruneError`.

    Raises:
        PruneError: If the file is missing, damaged, changed by hand, of another kind or of a newer version.
    """
    expected = f"a file of {kind or 'scores or masks'}"
    if not Path(path).is_file():
        raise PruneError(
            f"Expected {expected}; found none at {str(path)!r}. Look at the path; a fit leaves one in its logger's folder "
            "under pl-prune, or beside the callback RunRecord."
        )
    try:
        with safe_open(path, "pt") as stored:
            header = json.loads((stored.metadata() or {}).get(_KEY, "null"))
            if not isinstance(header, dict):
                raise PruneError(
                    f"Expected {expected} in {str(path)!r}; found safetensors without the header of pl_prune. "
                    "Write it by `save_scores` or `save_masks`."
                )
            if isinstance(header["version"], int) and header["version"] > _VERSION:
                raise PruneError(
                    f"Expected version {_VERSION} or older in {str(path)!r}; found version {header['version']}. Install a newer pl_prune."
                )
            if header["digest"] != _hash({key: value for key, value in header.items() if key != "digest"}):
                raise PruneError(_DAMAGED.format(expected, str(path), "its header is not what was written"))
            if kind not in (None, header["kind"]):
                raise PruneError(
                    f"Expected {expected} in {str(path)!r}; found one of {header['kind']}. Pass it as `{header['kind']}`, or name another."
                )
            yield stored, header
    except PruneError:
        raise
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise PruneError(_DAMAGED.format(expected, str(path), error)) from error


def contents(stored: Any, header: Mapping[str, Any]) -> list[Tensor]:
    """Read and check the tensors.

    Args:
        stored: The open file.
        header: Its header.

    Returns:
        The tensors, on the CPU, in the order of the header.

    Raises:
        SafetensorError: If they are not what was written.
    """
    if set(stored.keys()) != set(header["shapes"]):
        raise SafetensorError("its tensors are not those that its header names")
    tensors = {name: stored.get_tensor(name) for name in header["shapes"]}
    if hash_tensors(tensors) != header["content"]:
        raise SafetensorError("its tensors are not what was written")
    return list(tensors.values())


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return a hash of names, types, shapes and values.

    Args:
        tensors: By name; their order counts.

    Returns:
        64 hexadecimal digits (SHA-256).
    """
    sha = hashlib.sha256()
    for name, tensor in tensors.items():
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def hash_batches(batches: Iterable[Any]) -> str | None:
    """Return a hash of the tensors in some batches.

    Args:
        batches: Batches of any structure.

    Returns:
        64 hexadecimal digits (SHA-256), or None if that would take seconds.
    """
    leaves = [leaf for batch in batches for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    if sum(leaf.nbytes for leaf in leaves) > _HASHED:
        return None
    return hash_tensors({str(i): leaf for i, leaf in enumerate(leaves)})


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Write a file such that it is there whole or not at all.

    Args:
        path: Where to; its folder is made if need be.

    Yields:
        Where to write it; it takes its place afterwards, unless the body fails.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@cache
def installed_version(name: str) -> str:
    """Return the version of an installed package.

    Args:
        name: As pip knows it.

    Returns:
        Its version; empty where it is not installed.
    """
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _plain(value: object) -> Any:
    """Write a dataclass as a recipe does."""
    if not is_dataclass(value) or isinstance(value, type):
        raise TypeError(f"{type(value).__name__} {str(value)[:60]!r}")
    kind = type(value)
    arguments = {f.name: getattr(value, f.name) for f in fields(value) if f.init}
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": arguments}


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
