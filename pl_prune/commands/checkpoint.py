"""The network that a checkpoint holds, whole, masked or sliced."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pl_prune.callbacks.refusals import MARK
from pl_prune.core.files import load_weights
from pl_prune.core.types import PruneError
from pl_prune.structure.cut import Cuts, apply
from pl_prune.structure.manifest import load_shrunk, note_cuts


def network_of(dense: nn.Module, path: str | Path) -> tuple[nn.Module, bool]:
    """Build the network of a checkpoint.

    Args:
        dense: The whole network as its recipe builds it; it is left as it is.
        path: A checkpoint of a run, dense, masked, or sliced by `StructuredPruning`; a file of `save_shrunk`; or a state_dict.

    Returns:
        The network with the weights of the file, and whether it has been sliced.

    Raises:
        PruneError: If there is no such file, or it is not of this network.
    """
    if _is_shrunk(Path(path)):
        return load_shrunk(dense, path), True
    network = copy.deepcopy(dense)
    cuts = _cuts(Path(path))
    if cuts is not None:
        try:
            apply(network, cuts)
        except Exception as error:
            raise PruneError(
                f"Expected the {type(dense).__name__} that the run of {str(path)!r} cut; found that its cuts do not fit "
                f"({type(error).__name__}: {str(error)[:150]}). Name the recipe of that run: --config recipe.yaml."
            ) from error
        note_cuts(network, dense, cuts)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*its masks are not")  # nothing trains here: zeros stay
        load_weights(network, path)
    return network, cuts is not None


def _is_shrunk(path: Path) -> bool:
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return "manifest" in (file.metadata() or {})
    except SafetensorError:
        return False  # whoever loads it says what is wrong


def _cuts(path: Path) -> Cuts | None:
    """Return what a run's StructuredPruning sliced off."""
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:
        return None  # whoever loads it says what is wrong
    states = content.get("callbacks") if isinstance(content, Mapping) else None
    found = [s["cuts"] for s in (states or {}).values() if isinstance(s, Mapping) and MARK in s and "cuts" in s]
    return Cuts.from_plain(found[0]) if found else None
