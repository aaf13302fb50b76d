"""`MaskSet`: which entries of which parameters are kept."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pl_prune.core.bits import pack, unpack, zero_
from pl_prune.core.seeds import generator_of
from pl_prune.core.types import PruneError


class MaskSet(Mapping[str, Tensor]):
    """Immutable masks by parameter name; `True` keeps an entry, `False` prunes it.

    One byte per entry in memory, one bit in `state_dict`. Every tensor handed out is a fresh copy.

    Args:
        keep: Boolean tensors by parameter name.

    Raises:
        PruneError: If a mask is not a boolean tensor.

    >>> masks = MaskSet({"weight": torch.tensor([[True, False], [False, False]])})
    >>> masks.sparsity(), masks.counts()
    (0.75, {'weight': (1, 4)})
    """

    def __init__(self, keep: Mapping[str, Tensor]) -> None:
        for name, mask in keep.items():
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                found = str(mask.dtype) if isinstance(mask, Tensor) else type(mask).__name__
                raise PruneError(f"Expected a boolean mask for {name!r}; found {found}. Use `tensor.bool()`.")
        # The complement is what `masked_fill_` needs at every step: storing it avoids a temporary.
        self._pruned = {name: mask.detach().logical_not() for name, mask in keep.items()}

    @classmethod
    def ones_like(cls, params: Mapping[str, Tensor]) -> MaskSet:
        """Keep everything.

        Args:
            params: Tensors whose names, shapes and devices to take.

        Returns:
            Masks of ones.
        """
        return cls({name: torch.ones_like(p, dtype=torch.bool) for name, p in params.items()})

    @classmethod
    def from_zeros(cls, params: Mapping[str, Tensor]) -> MaskSet:
        """Prune what is exactly zero.

        Args:
            params: Tensors whose zero pattern to take.

        Returns:
            Masks that keep the non-zero entries.
        """
        return cls({name: p.detach() != 0 for name, p in params.items()})

    def shuffled(self, seed: int = 0) -> MaskSet:
        """Permute each mask at random: the control that tells a score from the layer densities it leads to.

        Args:
            seed: Seed; with it, a parameter's name and size alone decide how its mask is permuted.

        Returns:
            Masks that keep as many entries of each parameter, elsewhere.

        Source:
            Su et al., Sanity-checking pruning methods: random tickets can win the jackpot (layerwise rearrange).
        """
        moved = {}
        for name, mask in self.items():
            order = torch.randperm(mask.numel(), generator=generator_of(seed, name)).to(mask.device)
            moved[name] = mask.flatten()[order].view_as(mask)
        return MaskSet(moved)

    def __getitem__(self, name: str) -> Tensor:
        return self._pruned[name].logical_not()

    def __iter__(self) -> Iterator[str]:
        return iter(self._pruned)

    def __len__(self) -> int:
        return len(self._pruned)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, MaskSet)
            and self.shapes() == other.shapes()
            and all(torch.equal(pruned.cpu(), other._pruned[name].cpu()) for name, pruned in self._pruned.items())
        )

    def __hash__(self) -> int:
        return hash(self.digest())

    def __repr__(self) -> str:
        return f"MaskSet({len(self)} parameters, sparsity={self.sparsity():.4f})"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each mask.

        Returns:
            Shapes by parameter name.
        """
        return {name: tuple(pruned.shape) for name, pruned in self._pruned.items()}

    def check_fits(self, params: Mapping[str, Tensor]) -> None:
        """Raise unless every mask has a parameter of its name and shape.

        Args:
            params: Parameters by name; more than the masks' are welcome.

        Raises:
            PruneError: If a parameter is missing or has another shape; names them.
        """
        if not isinstance(params, Mapping):
            raise PruneError(
                f"Expected parameters by name; found {type(params).__name__}. Pass `dict(model.named_parameters())`."
            )
        problems = []
        for name, pruned in self._pruned.items():
            if name not in params:
                problems.append(f"{name}: no such parameter")
            elif params[name].shape != pruned.shape:
                problems.append(f"{name}: mask {tuple(pruned.shape)}, parameter {tuple(params[name].shape)}")
        if problems:
            more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise PruneError(
                f"Expected masks that fit the model; found {'; '.join(problems[:5])}{more}. "
                "Use masks made for this architecture, or build the network they were made for."
            )

    @torch.no_grad()
    def apply_(self, params: Mapping[str, Tensor]) -> None:
        """Zero the pruned entries in place, NaN included.

        Args:
            params: Parameters by name; more than the masks' are welcome.
        """
        self.check_fits(params)
        for name, pruned in self._pruned.items():
            zero_(params[name], pruned)

    @torch.no_grad()
    def mask_grads_(self, params: Mapping[str, nn.Parameter]) -> None:
        """Zero the gradients of pruned entries in place; parameters without a gradient are passed over.

        Args:
            params: Parameters by name; more than the masks' are welcome.
        """
        self.check_fits(params)
        for name, pruned in self._pruned.items():
            grad = params[name].grad
            if grad is not None:
                zero_(grad, pruned)

    def subset(self, names: Iterable[str]) -> MaskSet:
        """Return the masks of some parameters; they share memory with these.

        Args:
            names: Which ones.

        Returns:
            Masks of those parameters.
        """
        part = MaskSet({})
        part._pruned = {name: self._pruned[name] for name in names}
        return part

    def intersect(self, other: MaskSet) -> MaskSet:
        """Keep what both keep; a parameter that only one of them masks keeps that mask.

        Args:
            other: The other masks.

        Returns:
            The intersection.

        Raises:
            PruneError: If a shared name has two shapes.
        """
        merged = dict(self)
        for name, mask in other.items():
            if name in merged and merged[name].shape != mask.shape:
                raise PruneError(
                    f"Expected masks of one shape for {name!r}; found {tuple(merged[name].shape)} and {tuple(mask.shape)}. "
                    "Intersect masks of one architecture."
                )
            merged[name] = merged[name] & mask if name in merged else mask
        return MaskSet(merged)

    def counts(self) -> dict[str, tuple[int, int]]:
        """Count entries.

        Returns:
            (kept, total) by parameter name.
        """
        return {name: (p.numel() - int(p.count_nonzero()), p.numel()) for name, p in self._pruned.items()}

    def sparsity(self, name: str | None = None) -> float:
        """Return the pruned fraction, in [0, 1].

        Args:
            name: One parameter; all of them together when None.

        Returns:
            Pruned entries over all entries; 0.0 where there are none.
        """
        chosen = self._pruned.values() if name is None else [self._pruned[name]]
        total = sum(p.numel() for p in chosen)
        return sum(int(p.count_nonzero()) for p in chosen) / total if total else 0.0

    def hamming(self, other: MaskSet) -> float:
        """Return the fraction of entries on which two mask sets differ.

        Args:
            other: Masks of the same names and shapes.

        Returns:
            Hamming distance over the number of entries, in [0, 1].

        Raises:
            PruneError: If names or shapes differ.
        """
        if self.shapes() != other.shapes():
            apart = sorted(set(self.shapes().items()) ^ set(other.shapes().items()))
            raise PruneError(
                f"Expected masks of the same names and shapes; found differences at {apart[:4]}. Compare masks of one architecture."
            )
        total = sum(p.numel() for p in self._pruned.values())
        odd = sum(int((p ^ other._pruned[name].to(p.device)).count_nonzero()) for name, p in self._pruned.items())
        return odd / max(total, 1)

    def to(self, device: torch.device | str) -> MaskSet:
        """Return the masks on a device.

        Args:
            device: Where to.

        Returns:
            These masks when they are there already, else a copy.
        """
        if all(p.device == torch.device(device) for p in self._pruned.values()):
            return self
        moved = MaskSet({})
        moved._pruned = {name: p.to(device) for name, p in self._pruned.items()}
        return moved

    def state_dict(self) -> dict[str, Any]:
        """Return a bit-packed copy that `torch.load(weights_only=True)` can read.

        Returns:
            `{"shapes": {name: list of int}, "bits": {name: uint8 tensor on the CPU}}`; bit i of byte j is entry
            8j + i in flat order, 1 = keep.
        """
        return {
            "shapes": {name: list(shape) for name, shape in self.shapes().items()},
            "bits": {name: pack(pruned.logical_not()) for name, pruned in self._pruned.items()},
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> MaskSet:
        """Rebuild masks from `state_dict`.

        Args:
            state: What `state_dict` returned.

        Returns:
            Equal masks, on the CPU.

        Raises:
            PruneError: If the state is of another form, or too short for its shapes.
        """
        try:
            shapes, bits = dict(state["shapes"]), dict(state["bits"])
            return cls({name: unpack(bits[name], tuple(shapes[name])) for name in {**shapes, **bits}})
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise PruneError(
                f"Expected the masks that `MaskSet.state_dict` wrote; found a damaged or foreign state ({error}). "
                "Load another copy of the file."
            ) from error

    def digest(self) -> str:
        """Return a hash of names, shapes and bits, equal wherever the masks are equal.

        Returns:
            64 hexadecimal digits (SHA-256).
        """
        sha = hashlib.sha256()
        for name, bits in self.state_dict()["bits"].items():
            sha.update(f"{name}{tuple(self._pruned[name].shape)}".encode())
            sha.update(bits.numpy().tobytes())
        return sha.hexdigest()
