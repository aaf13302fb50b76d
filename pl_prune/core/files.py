"""Weights from files."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pl_prune.core.types import PruneError


def load_weights(model: nn.Module, path: str | Path, new_head: bool = False) -> None:
    """Load weights and buffers alone into a model, or into the one submodule that they fit.

    Args:
        model: Any module; its parameters stay the same objects.
        path: A Lightning checkpoint, a state_dict saved by `torch.save`, or a `.safetensors` file.
        new_head: Whether the one layer whose shapes differ, the output layer for another number of classes, keeps the
            model's own weights.

    Raises:
        PruneError: If there is no such file, it holds no state_dict, names or shapes differ from the model's, or several
            submodules fit.
    """
    found = _read(Path(path))
    if new_head:
        found = _with_own_head(model, found)
    shapes = {name: tuple(t.shape) for name, t in found.items()}
    states = {name: m.state_dict() for name, m in model.named_modules()}
    fitting = [n for n, state in states.items() if shapes == {k: tuple(t.shape) for k, t in state.items()}]
    if len(fitting) > 1:
        raise PruneError(
            f"Expected {path} to fit one submodule of {type(model).__name__}; found {len(fitting)}: {', '.join(fitting[:4])}. "
            "Pass weights of the whole module."
        )
    if fitting:
        model.get_submodule(fitting[0]).load_state_dict(found)
        return
    same_names = [name for name, state in states.items() if state.keys() == found.keys()]
    expected = states[same_names[0] if same_names else ""]
    odd = [
        f"{name} (in the {'file' if name in found else 'model'} alone)"
        for name in sorted(expected.keys() ^ found.keys())
    ]
    odd += [
        f"{k} is {shapes[k]}, not {tuple(t.shape)}"
        for k, t in expected.items()
        if k in found and t.shape != found[k].shape
    ]
    raise PruneError(
        f"Expected {path} to hold the {len(expected)} tensors of {type(model).__name__} or of a submodule; found {len(found)} tensors, "
        f"{len(odd)} of other names or shapes: {', '.join(odd[:4])}. Pass weights of the same architecture and number of classes."
    )


def _with_own_head(model: nn.Module, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put the model's own tensors in the place of those of one layer whose shapes differ, wherever else the names fit."""
    for module in model.modules():
        own = module.state_dict()
        odd = [name for name, t in own.items() if name in found and t.shape != found[name].shape]
        if own.keys() == found.keys() and len({name.rpartition(".")[0] for name in odd}) == 1:
            return {**found, **{name: own[name] for name in odd}}
    return found


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise PruneError(f"Expected a file of weights; found none at {str(path)!r}. Look at the path.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise PruneError(
            f"Expected {str(path)!r} to be a checkpoint of tensors and plain values; found {type(error).__name__}: "
            f"{str(error).partition('. ')[0][:200]}. Save its state_dict alone: torch.save(model.state_dict(), path)."
        ) from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        pruned = [key for key, state in (content.get("callbacks") or {}).items() if _has_masks(state)]
        if pruned:
            warnings.warn(
                f"{path} comes from a run pruned by {', '.join(pruned)}; its weights are loaded, its masks are not, so pruned "
                "weights may grow again. To go on with the masks, use --ckpt_path.",
                stacklevel=2,
            )
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(isinstance(t, Tensor) for t in content.values()) or not content:
        raise PruneError(
            f"Expected {str(path)!r} to hold a state_dict, or a checkpoint with one; found {type(content).__name__}. "
            "Save it by torch.save(model.state_dict(), path)."
        )
    return dict(content)


def _has_masks(state: object) -> bool:
    return isinstance(state, Mapping) and "masks" in state
