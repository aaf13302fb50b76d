"""Masks as bits: zeroing by them, and packing them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 20


def zero_(tensor: Tensor, pruned: Tensor) -> None:
    """Zero in place, NaN included, by a bitwise AND where `masked_fill_` is slow: on the CPU it is not vectorised.

    Args:
        tensor: What to change; called without gradients.
        pruned: A boolean tensor of its shape, True where it becomes zero.
    """
    bits = _BITS.get(tensor.element_size())
    plain = tensor.is_contiguous() and pruned.is_contiguous() and not tensor.is_complex()
    if tensor.device.type != "cpu" or pruned.device.type != "cpu" or bits is None or not plain:
        tensor.masked_fill_(pruned.to(tensor.device), 0)
        return
    values = torch.split(tensor.view(-1).view(bits), _CHUNK)
    for part, gone in zip(values, torch.split(pruned.view(-1).view(torch.int8), _CHUNK), strict=True):
        part.bitwise_and_(gone - 1)  # 1 - 1 has no bit set, 0 - 1 has all


def pack(mask: Tensor) -> Tensor:
    """Pack a boolean tensor: bit i of byte j is entry 8j + i in flat order.

    Args:
        mask: A boolean tensor of any shape.

    Returns:
        A flat uint8 tensor on the CPU.
    """
    return torch.from_numpy(np.packbits(mask.reshape(-1).cpu().numpy(), bitorder="little"))


def unpack(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Undo `pack`.

    Args:
        bits: What `pack` returned.
        shape: The mask's shape.

    Returns:
        A boolean tensor.

    Raises:
        ValueError: If the bits are not of this shape.
    """
    size = torch.Size(shape).numel()
    if bits.dtype != torch.uint8 or bits.shape != (-(-size // 8),):
        raise ValueError(f"{bits.numel()} bytes of {bits.dtype} for shape {shape}")
    spread = np.unpackbits(bits.cpu().numpy(), count=size, bitorder="little")
    return torch.from_numpy(spread).view(torch.bool).reshape(shape)
