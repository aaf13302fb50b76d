"""Scores and masks as files to keep and share: safetensors with a header that says what they are and where from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pl_prune.core.allocate import Allocation, LayerAllocation
from pl_prune.core.archive import Kind, contents, opened, write
from pl_prune.core.bits import pack, unpack
from pl_prune.core.masks import MaskSet
from pl_prune.core.types import PruneError, Scores, check_scores, check_type, describe, plain


def save_scores(path: str | Path, scores: Mapping[str, Tensor], meta: Mapping[str, Any] | None = None) -> None:
    """Write scores to a file, which is there whole or not at all.

    Args:
        path: The file, by custom `.safetensors`; one that is there is replaced.
        scores: Finite scores by parameter name.
        meta: What else the header shall say: plain values, and dataclasses such as a criterion.

    Raises:
        PruneError: If a score is not finite, `meta` holds something else, or the file cannot be written.

    >>> import tempfile, torch, pl_prune as plp
    >>> path = tempfile.mkdtemp() + "/scores.safetensors"
    >>> plp.save_scores(path, {"a": torch.tensor([0.5, 2.0])}, {"criterion": plp.Random(seed=3)})
    >>> plp.load_scores(path)
    {'a': tensor([0.5000, 2.0000])}
    >>> plp.read_header(path)["meta"]
    {'criterion': {'class_path': 'pl_prune.criteria.random.Random', 'init_args': {'seed': 3}}}
    """
    check_type("scores", scores, Mapping, "what `score` returned for one criterion")
    check_scores(scores)
    tensors = {plain(name): score.detach() for name, score in scores.items()}
    write(path, "scores", tensors, {name: list(t.shape) for name, t in tensors.items()}, {}, meta)


def load_scores(path: str | Path, model: nn.Module | Mapping[str, Tensor] | None = None) -> Scores:
    """Read scores.

    Args:
        path: What `save_scores` wrote.
        model: What they must fit: a module that has all their parameters (and may have more), or parameters by name that
            are theirs, no more and no fewer. None: whatever they fit.

    Returns:
        Scores by parameter name, on the CPU.

    Raises:
        PruneError: If the file is missing, damaged, changed by hand, of another kind, of a newer version, or does not
            fit; names what differs.
    """
    with opened(path, "scores") as (stored, header):
        names = _fitting(path, header["shapes"], model)
        return dict(zip(names, contents(stored, header), strict=True))


def save_masks(path: str | Path, masks: MaskSet, meta: Mapping[str, Any] | None = None) -> None:
    """Write masks to a file, one bit an entry, which is there whole or not at all.

    Args:
        path: The file, by custom `.safetensors`; one that is there is replaced.
        masks: The masks.
        meta: What else the header shall say: plain values, and dataclasses such as a criterion.

    Raises:
        PruneError: If there are no masks, `meta` holds something else, or the file cannot be written.
    """
    check_type("masks", masks, MaskSet, "what an allocation returned")
    if not masks:
        raise PruneError("Expected masks of at least one parameter; found none. Pass what an allocation returned.")
    shapes = {plain(name): list(shape) for name, shape in masks.shapes().items()}
    bits = {plain(name): pack(mask) for name, mask in masks.items()}
    kept, total = (sum(column) for column in zip(*masks.counts().values(), strict=True))
    write(path, "masks", bits, shapes, {"kept": kept, "sparsity": (total - kept) / max(total, 1)}, meta)


def load_masks(path: str | Path, model: nn.Module | Mapping[str, Tensor] | None = None) -> MaskSet:
    """Read masks.

    Args:
        path: What `save_masks` wrote.
        model: What they must fit: a module that has all their parameters (and may have more), or parameters by name that
            are theirs, no more and no fewer. None: whatever they fit.

    Returns:
        The masks, on the CPU.

    Raises:
        PruneError: If the file is missing, damaged, changed by hand, of another kind, of a newer version, or does not
            fit; names what differs.
    """
    with opened(path, "masks") as (stored, header):
        shapes = header["shapes"]
        names = _fitting(path, shapes, model)
        unpacked = (unpack(t, tuple(s)) for t, s in zip(contents(stored, header), shapes.values(), strict=True))
        return MaskSet(dict(zip(names, unpacked, strict=True)))


def read_header(path: str | Path, kind: Kind | None = None) -> dict[str, Any]:
    """Read what a file of scores or masks says of itself, without its tensors.

    Args:
        path: What `save_scores` or `save_masks` wrote.
        kind: What it must hold; None: either.

    Returns:
        `kind`, `version`, `shapes` by parameter name, `architecture` (a hash of those), `selected` (entries), `libraries`,
        `meta`, `content` (a hash of the tensors), `digest` (a hash of all this); of masks also `kept` and `sparsity`.

    Raises:
        PruneError: If the file is missing, damaged, changed by hand, of another kind or of a newer version.
    """
    with opened(path, kind) as (_, header):
        return header


def check_use(path: str | Path, header: Mapping[str, Any], allocation: Allocation, sparsity: float) -> None:
    """Raise if scores say nothing of what an allocation would decide by them.

    Args:
        path: Their file.
        header: Its header.
        allocation: Where the kept entries go.
        sparsity: Fraction of the entries to prune.

    Raises:
        PruneError: If earlier rounds pruned what would be kept or went by another allocation, or layers would compete whose
            scores do not compare.
    """
    meta = header["meta"]
    if isinstance(meta.get("before"), dict):  # of another callback, whose scores are in the same file
        check_use(path, {"meta": meta["before"]}, allocation, sparsity)
    rounds, scored = (meta.get(key) for key in ("rounds", "sparsity"))
    told = all(isinstance(number, (int, float)) for number in (rounds, scored))  # else it is not ours
    if told and rounds > 1 and sparsity < scored:
        raise PruneError(
            f"Expected a sparsity of {scored} or more for {str(path)!r}, which holds the scores of the last of {rounds} rounds on the way "
            f"there: what earlier ones pruned has none; found {sparsity}. Score again at that sparsity."
        )
    if told and rounds > 1 and not _shares_as(meta.get("allocation"), allocation):
        raise PruneError(
            f"Expected the allocation of the {rounds} rounds whose last one's scores {str(path)!r} holds, {meta['allocation']}: what they "
            f"pruned has no score; found {describe(allocation)}. Score again with that allocation."
        )
    if meta.get("layerwise_only") and not isinstance(allocation, LayerAllocation):
        raise PruneError(
            f"Expected an allocation with a budget for each layer for {str(path)!r}, whose scores compare nothing between layers; "
            f"found {describe(allocation)}. Use Layerwise(), ERK() or SmartRatio()."
        )


def _shares_as(told: object, allocation: Allocation) -> bool:
    """Say whether an allocation is the one that a header tells of, floors apart; yes where it tells of none."""
    if not isinstance(told, dict) or not isinstance(told.get("init_args"), dict):
        return True
    own = {f.name for f in fields(allocation)} - {f.name for f in fields(Allocation)}
    same = all(told["init_args"].get(name) == getattr(allocation, name) for name in own)
    return same and str(told.get("class_path")).rpartition(".")[2] == type(allocation).__name__


def _fitting(
    path: str | Path, shapes: Mapping[str, list[int]], model: nn.Module | Mapping[str, Tensor] | None
) -> list[str]:
    """Return the names that a model has for a file's parameters."""
    if model is None:
        return list(shapes)
    named = dict(model.named_parameters()) if isinstance(model, nn.Module) else dict(model)
    names = {plain(name): name for name in named}
    absent = "none" if isinstance(model, nn.Module) else "not selected"
    odd = [
        f"{name}: {tuple(shape)} in the file, {tuple(named[names[name]].shape) if name in names else absent} in the model"
        for name, shape in shapes.items()
        if name not in names or list(named[names[name]].shape) != shape
    ]
    if not isinstance(model, nn.Module):
        odd += [f"{name}: {tuple(named[names[name]].shape)} in the model alone" for name in names if name not in shapes]
    if odd:
        more = f" and {len(odd) - 5} more" if len(odd) > 5 else ""
        raise PruneError(
            f"Expected {str(path)!r} to fit the selected parameters of the model; found {len(odd)} that differ: "
            f"{'; '.join(odd[:5])}{more}. Take the architecture and the `select` that the file was made with; learned scores have "
            "Select(output_layer=True)."
        )
    return [names[name] for name in shapes]
