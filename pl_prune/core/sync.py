"""What the processes of one job agree on. In a single process every function is the identity."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from pl_prune.core.masks import MaskSet
from pl_prune.core.types import PruneError

T = TypeVar("T")


def rank_and_size() -> tuple[int, int]:
    """Return this process's rank and the number of processes.

    Returns:
        (rank, world size); (0, 1) outside a distributed job.
    """
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def sum_(tensors: Iterable[Tensor]) -> None:
    """Sum tensors over all ranks, in place.

    Args:
        tensors: The same shapes on every rank, on the device of the job's backend.
    """
    if rank_and_size()[1] > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def copy_of_rank_zero_(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors with those of rank 0, in place.

    Args:
        tensors: The same shapes on every rank, on the device of the job's backend.
    """
    if rank_and_size()[1] > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def agree(error: BaseException | None) -> None:
    """Raise on every rank if any rank failed, so that none waits for another in vain.

    Args:
        error: What this rank caught, or None.

    Raises:
        error: This rank's own error.
        PruneError: If another rank failed; quotes it.
    """
    size = rank_and_size()[1]
    if size > 1:
        errors: list[str | None] = [None] * size
        dist.all_gather_object(errors, None if error is None else f"{type(error).__name__}: {error}")
        if error is None and any(errors):
            rank = next(i for i, e in enumerate(errors) if e)
            raise PruneError(
                f"Expected every rank to score its data; found that rank {rank} failed with {errors[rank]} "
                "Look at what is different there."
            )
    if error is not None:
        raise error


def agreed(make: Callable[[], T]) -> T:
    """Do something on every rank, and raise on every rank if it failed on any.

    Args:
        make: What to do.

    Returns:
        This rank's result.
    """
    results, error = [], None
    try:
        results.append(make())
    except Exception as caught:
        error = caught
    agree(error)
    return results[0]


def masks_of_rank_zero(make: Callable[[], MaskSet], device: Any = "cpu") -> MaskSet:
    """Make masks on rank 0 and give every rank the same ones.

    Args:
        make: Selects the masks; called on rank 0 alone.
        device: Where the masks shall be.

    Returns:
        The masks of rank 0.

    Raises:
        PruneError: If rank 0 failed, or the masks that arrived differ from those sent.
    """
    rank, size = rank_and_size()
    if size == 1:
        return make().to(device)
    masks, error = None, None
    try:
        masks = make() if rank == 0 else None
    except PruneError as caught:
        error = caught
    agree(error)
    box = [masks.state_dict() if masks is not None else None]
    dist.broadcast_object_list(box, src=0)
    assert box[0] is not None
    masks = MaskSet.from_state_dict(box[0])
    check_same(masks)
    return masks.to(device)


def of_rank_zero(value: Any) -> Any:
    """Give every rank the value of rank 0, so that all decide alike.

    Args:
        value: This rank's value; it pickles.

    Returns:
        Rank 0's.
    """
    if rank_and_size()[1] == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def of_first(value: Any, there: bool) -> Any:
    """Give every rank the value of the first rank that has one.

    Args:
        value: This rank's value; it pickles.
        there: Whether this rank has one.

    Returns:
        The first such rank's, or this rank's own where none has.
    """
    size = rank_and_size()[1]
    if size == 1:
        return value
    values: list[Any] = [None] * size
    dist.all_gather_object(values, (value, there))
    return next((v for v, has in values if has), value)


def check_same(masks: MaskSet) -> None:
    """Raise unless every rank holds the same masks.

    Args:
        masks: This rank's masks.
    """
    fix = "Resume every rank from the same checkpoint; if there is none, report this as a bug."
    check_alike("masks", masks.digest() if rank_and_size()[1] > 1 else "", fix)


def check_alike(what: str, digest: str, fix: str) -> None:
    """Raise unless every rank has the same digest of something.

    Args:
        what: What it is the digest of, in the plural.
        digest: This rank's.
        fix: What to do about it.

    Raises:
        PruneError: If a rank has another one; names the ranks.
    """
    size = rank_and_size()[1]
    if size > 1:
        digests = [""] * size
        dist.all_gather_object(digests, digest)
        odd = [rank for rank, found in enumerate(digests) if found != digests[0]]
        if odd:
            raise PruneError(
                f"Expected the same {what} on every rank; found others than rank 0's on ranks {odd}. {fix}"
            )
