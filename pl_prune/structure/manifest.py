"""`save_shrunk` and `load_shrunk`: a smaller network in a file, without pickle."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pl_prune.core.types import PruneError
from pl_prune.structure.cut import Cuts, apply

CUTS = "pl_prune_cuts"
_FORMAT = "pl_prune shrunk 1"


def note_cuts(small: nn.Module, dense: nn.Module, cuts: Cuts) -> None:
    """Note on a sliced network how it came about.

    Args:
        small: The sliced network, or one that is about to be sliced.
        dense: The network that it was sliced from, itself perhaps a sliced one; before it is, if it is the same.
        cuts: What was sliced off that.
    """
    before = getattr(dense, CUTS, None)
    noted = {"cuts": cuts.after(before["cuts"]), "dense": before["dense"]} if before else None
    small.__dict__[CUTS] = noted or {"cuts": cuts, "dense": _shapes(dense)}


def save_shrunk(small: nn.Module, path: str | Path) -> Path:
    """Write a network that `shrink` made: weights as safetensors, the manifest in the file's header and as JSON beside it.

    The file is there whole or not at all, also when one is replaced.

    Args:
        small: What `shrink` returned, or a module that `StructuredPruning` has cut; trained since, if you like.
        path: Where to; the suffix becomes `.safetensors`, and `.json` for the manifest to read.

    Returns:
        The path of the weights.

    Raises:
        PruneError: If the network does not come from `shrink`, or its tensors have other shapes by now.
    """
    from safetensors.torch import save

    noted = getattr(small, CUTS, None)
    if noted is None:
        raise PruneError(
            f"Expected a network that `shrink` made; found a {type(small).__name__} without its cuts. "
            "Save other networks by torch.save(model.state_dict(), path)."
        )
    tensors = _state(small)
    positions = noted["cuts"].positions
    for name, dense in noted["dense"].items():
        left = [len(positions.get(name, {}).get(dim, range(size))) for dim, size in enumerate(dense)]
        found = list(tensors[name].shape) if name in tensors else "none"
        if found != left:
            raise PruneError(
                f"Expected {name!r} of shape {left}, as `shrink` left it; found {found}. Something else has changed the network "
                "since: shrink it after that."
            )
    manifest = {
        "format": _FORMAT,
        "model": type(small).__name__,
        "dense": noted["dense"],
        "small": {name: list(t.shape) for name, t in tensors.items()},
        "dtypes": {name: str(t.dtype) for name, t in tensors.items()},
        "cuts": noted["cuts"].to_plain(),
    }
    path = Path(path).with_suffix(".safetensors")
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(manifest)
    _write(path.with_suffix(".json"), text.encode())
    _write(path, save({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, metadata={"manifest": text}))
    return path


def load_shrunk(model: nn.Module, path: str | Path) -> nn.Module:
    """Rebuild a shrunk network from its file.

    Args:
        model: The dense network as it was built before `shrink`, with any weights; it is left as it is.
        path: What `save_shrunk` returned.

    Returns:
        The smaller network, with the weights of the file.

    Raises:
        PruneError: If there is no such file, it is damaged, or it belongs to another network.
    """
    from safetensors import safe_open

    path = Path(path).with_suffix(".safetensors")
    if not path.is_file():
        raise PruneError(f"Expected a file that `save_shrunk` wrote; found none at {str(path)!r}. Look at the path.")
    try:
        with safe_open(path, "pt") as file:
            manifest = json.loads((file.metadata() or {})["manifest"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        known = manifest["format"] == _FORMAT
        cuts = Cuts.from_plain(manifest["cuts"])
    except Exception as error:
        raise PruneError(
            f"Expected {str(path)!r} to be written by `save_shrunk`; found {type(error).__name__}: {str(error)[:150]}. "
            "Write it again, or read plain weights by load_state_dict."
        ) from error
    if not known:
        raise PruneError(f"Expected the format {_FORMAT!r}; found {manifest['format']!r}. Update pl_prune.")
    _check(model, manifest)
    small = copy.deepcopy(model)
    apply(small, cuts)
    state = _state(small)
    for name, tensor in state.items():
        saved = tensors.get(name)
        if saved is None or saved.shape != tensor.shape:
            found = "none" if saved is None else tuple(saved.shape)
            raise PruneError(
                f"Expected a tensor {name!r} of shape {tuple(tensor.shape)}; found {found}. Build the network as it was before `shrink`."
            )
        tensor.data = tensor.data.to(saved.dtype)
        tensor.data.copy_(saved)
    small.__dict__[CUTS] = {"cuts": cuts, "dense": manifest["dense"]}
    return small


def _check(model: nn.Module, manifest: dict[str, Any]) -> None:
    here, there = _shapes(model), manifest["dense"]
    odd = [f"{n} is missing here" for n in there if n not in here]
    odd += [f"{n} is not in the file" for n in here if n not in there]
    odd += [f"{n} is {here[n]} here, {there[n]} there" for n in here if n in there and here[n] != there[n]]
    if odd:
        raise PruneError(
            f"Expected the dense {manifest['model']} that the file was shrunk from; found {len(odd)} differences: "
            f"{'; '.join(odd[:4])}. Build the network with the same arguments, before it was shrunk."
        )


def _shapes(model: nn.Module) -> dict[str, list[int]]:
    return {name: list(t.shape) for name, t in _state(model).items()}


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and the buffers of the state_dict, each tensor once."""
    saved = model.state_dict(keep_vars=True)
    named: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor for name, tensor in named.items() if name in saved}


def _write(path: Path, content: bytes) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
