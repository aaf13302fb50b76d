"""`Samples`: which samples a data-dependent criterion sees."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from pl_prune.core import sync
from pl_prune.core.types import PruneError

_LABEL_KEYS = ("label", "labels", "target", "targets", "y")


@dataclass(frozen=True)
class Samples:
    """Choose the scoring samples: the same ones on every machine, at any batch size and on any number of ranks.

    Args:
        per_class: Samples of each class, drawn without replacement; a smaller class gives what it has.
        total: Samples in all, whatever their labels; for data without class labels. None: `per_class` counts.
        batch_size: Samples per forward pass; changes memory and speed, not the scores.
        seed: Seed of the choice, and of the randomness in a data set's own transforms.
    """

    per_class: int = 10
    total: int | None = None
    batch_size: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        for field in ("per_class", "total", "batch_size"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise PruneError(f"Expected samples.{field} of 1 or more; found {value}. Leave it out for the default.")

    def indices(
        self, dataset: Dataset[Any], track: Callable[[Iterable[Any], str], Iterable[Any]] | None = None
    ) -> list[int]:
        """Choose samples of a map-style data set.

        Args:
            dataset: A data set with a length.
            track: Wraps an iterable and a label, to show progress while labels are read sample by sample.

        Returns:
            Indices, one class after another in turn, so that every stride through them is balanced.

        Raises:
            PruneError: If classes are to be balanced and the data set has no class labels.
        """
        generator = torch.Generator().manual_seed(self.seed)
        size = len(dataset)  # type: ignore[arg-type]
        if self.total is not None:
            return torch.randperm(size, generator=generator)[: self.total].tolist()
        labels = _stored_labels(dataset)
        if labels is None:
            read = (label_of(dataset[i]) for i in range(size))
            labels = torch.tensor(list(track(read, "labels") if track else read))
        if labels.ndim != 1 or labels.is_floating_point() or len(labels) != size:
            raise PruneError(
                f"Expected one integer class label for each of {size} samples; found {labels.dtype} of shape {tuple(labels.shape)}. "
                "Set samples.total to a number of samples instead."
            )
        turns: list[tuple[int, int, int]] = []
        for rank_in_class, label in enumerate(torch.unique(labels).tolist()):
            members = (labels == label).nonzero()[:, 0]
            chosen = members[torch.randperm(len(members), generator=generator)][: self.per_class].tolist()
            turns.extend((turn, rank_in_class, index) for turn, index in enumerate(chosen))
        return [index for _, _, index in sorted(turns)]

    def batches(
        self,
        loader: DataLoader[Any],
        track: Callable[[Iterable[Any], str], Iterable[Any]] | None = None,
        whole: bool = False,
        share: bool = True,
    ) -> list[Any]:
        """Read this rank's share of the samples, by a loader of our own; the loader given is not iterated.

        Args:
            loader: Whose data set, collation and workers to use.
            track: Wraps an iterable and a label, to show progress.
            whole: Share out whole batches, the same at any number of ranks, and not single samples in turn.
            share: Whether to share the samples out; if not, every rank reads all of them.

        Returns:
            Batches as the loader's `collate_fn` makes them; without padding, so a rank may have none.

        Raises:
            PruneError: If an iterable data set meets `total=None`, or the data set makes its batches itself.
        """
        if loader.batch_sampler is None and (
            not isinstance(loader.dataset, IterableDataset) or loader.batch_size is None
        ):
            raise PruneError(
                "Expected a DataLoader that makes batches of samples; found one with batch_size=None, whose data set makes them. "
                "Define `scoring_dataloader()` over single samples."
            )
        rank, size = sync.rank_and_size() if share else (0, 1)
        common: dict[str, Any] = {
            "num_workers": loader.num_workers,
            "worker_init_fn": loader.worker_init_fn,
            "multiprocessing_context": loader.multiprocessing_context,
            "generator": torch.Generator().manual_seed(self.seed),
        }
        if isinstance(loader.dataset, IterableDataset):
            if self.total is None:
                raise PruneError(
                    "Expected a data set with a length, to balance classes; found an IterableDataset. "
                    "Set samples.total to a number of samples instead."
                )
            stream = DataLoader(loader.dataset, batch_size=None, collate_fn=_as_is, **common)
            mine = list(islice(stream, self.total // size + (rank < self.total % size)))
            parts = [mine[i : i + self.batch_size] for i in range(0, len(mine), self.batch_size)]
            return [loader.collate_fn(part) for part in parts]
        chosen = self.indices(loader.dataset, track)
        chosen = chosen if whole else chosen[rank::size]
        groups = [chosen[i : i + self.batch_size] for i in range(0, len(chosen), self.batch_size)]
        reader = DataLoader(
            _Seeded(loader.dataset, self.seed),
            batch_sampler=groups[rank::size] if whole else groups,
            collate_fn=loader.collate_fn,
            **common,
        )
        return list(track(reader, "scoring samples") if track else reader)


def _as_is(sample: Any) -> Any:
    return sample


class _Seeded(Dataset[Any]):
    """A data set whose own randomness depends on the sample alone, not on workers, order or ranks."""

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        seed = (self.seed * 1_000_003 + index) % 2**32
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed(seed)
        return self.dataset[index]


def label_of(sample: Any) -> int:
    """Return the class label of one sample.

    Args:
        sample: `(input, label, ...)` or a dict with a key label, labels, target, targets or y.

    Returns:
        The label.

    Raises:
        PruneError: If there is no integer label.
    """
    label = None
    if isinstance(sample, (tuple, list)) and len(sample) > 1:
        label = sample[1]
    elif isinstance(sample, dict):
        label = next((sample[key] for key in _LABEL_KEYS if key in sample), None)
    try:
        as_tensor = torch.as_tensor(label)
        if as_tensor.numel() == 1 and not as_tensor.is_floating_point():
            return int(as_tensor)
    except (TypeError, ValueError, RuntimeError):
        pass
    raise PruneError(
        f"Expected samples with an integer class label, (input, label) or a dict with one of {', '.join(_LABEL_KEYS)}; "
        f"found {type(sample).__name__}{' with label ' + repr(label)[:80] if label is not None else ' without one'}. "
        "Set samples.total to a number of samples instead."
    )


def _stored_labels(dataset: Any) -> Tensor | None:
    """Return the labels that a data set holds as a whole, without reading samples."""
    if isinstance(dataset, Subset):
        labels = _stored_labels(dataset.dataset)
        return None if labels is None else labels[torch.as_tensor(list(dataset.indices))]
    if isinstance(dataset, ConcatDataset):
        parts = [_stored_labels(part) for part in dataset.datasets]
        return None if any(p is None for p in parts) else torch.cat([p for p in parts if p is not None])
    if isinstance(dataset, TensorDataset):
        return dataset.tensors[1] if len(dataset.tensors) > 1 else None
    for attribute in ("targets", "labels"):
        labels = getattr(dataset, attribute, None)
        if labels is not None and hasattr(labels, "__len__") and len(labels) == len(dataset):
            try:
                return torch.as_tensor(labels)
            except (TypeError, ValueError, RuntimeError):
                return None
    return None
