"""`NofM`: fine-grained structured sparsity, n kept entries of every m."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor
from torch.nn.functional import pad

from pl_prune.core.allocate import Allocation
from pl_prune.core.types import PruneError, check_count, check_sparsity


@dataclass(frozen=True)
class NofM(Allocation):
    """Keep the n highest scores of every m consecutive entries along the input dimension: 2:4, for one.

    The input dimension is the second one: input features of a linear layer, input channels of a convolution at each
    place of its kernel. Where m does not divide it, the last group is shorter and keeps as many, so that the pattern
    also holds after padding with zeros; a layer of n inputs or fewer stays dense. The pattern therefore fixes the
    sparsity: what is asked for must agree to three decimals with 1 - n / m, or with what such last groups make of it.

    Args:
        n: Entries to keep of each group.
        m: Entries of a group.

    Raises:
        PruneError: If n and m are not whole numbers with n < m. On a call, also if the sparsity is another one or a
            floor asks for more than n entries of a group.

    Source:
        Mishra et al., Accelerating Sparse Deep Neural Networks, section 3; the direction is that of NVIDIA's ASP.
        Divergences: ASP leaves layers dense whose dimensions suit no tensor core, and may permute channels first.
        Transposed convolutions have their output channels second.

    >>> NofM(1, 2)({"a": torch.tensor([[3.0, 1.0, 0.0, 2.0]])}, 0.5)["a"]
    tensor([[ True, False, False,  True]])
    """

    n: int = 2
    m: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("n", self.n)
        check_count("m", self.m)
        if self.n >= self.m:
            raise PruneError(f"Expected n < m; found n={self.n} of m={self.m}. Write 2 of 4 as NofM(n=2, m=4).")

    def _budget(self, values: list[Tensor], sparsity: float, pool: list[Tensor] | None) -> int:
        check_sparsity(sparsity)
        inside = [torch.ones_like(value, dtype=torch.bool) for value in values] if pool is None else pool
        keep = sum(int(self._groups(p).sum(-1).clamp(max=self.n).sum()) for p in inside)
        nominal, found = 1 - Fraction(self.n, self.m), 1 - Fraction(keep, max(sum(v.numel() for v in values), 1))
        near = Fraction(1, 2000)
        if not min(nominal, found) - near <= Fraction(str(float(sparsity))) <= max(nominal, found) + near:
            raise PruneError(
                f"Expected a sparsity of {float(nominal):.4g}, which keeping {self.n} of {self.m} gives ({float(found):.6g} here, "
                f"with groups that are shorter); found {sparsity}. Ask for that one; criteria of several rounds and gradual "
                "schedules, which pass through others, need another allocation."
            )
        return keep

    def _select(
        self, values: list[Tensor], keep: int, pool: list[Tensor] | None, required: list[Tensor] | None
    ) -> list[Tensor]:
        every = [torch.ones_like(value, dtype=torch.bool) for value in values]
        marked = []
        for value, inside, first in zip(values, pool or every, required or [~e for e in every], strict=True):
            allowed, needed = self._groups(inside), self._groups(first)
            if bool((needed.sum(-1) > self.n).any()):
                raise PruneError(
                    f"Expected the floors to ask for at most {self.n} of every {self.m} entries; found a group of which they ask "
                    f"for {int(needed.sum(-1).max())}. Lower the floors."
                )
            order = self._groups(value).argsort(dim=-1, descending=True, stable=True)
            rank = (~allowed).to(torch.int8) - needed.to(torch.int8)  # what is required, then the others, then the rest
            order = order.gather(-1, rank.gather(-1, order).argsort(dim=-1, stable=True))
            mark = torch.zeros_like(allowed).scatter_(-1, order[..., : self.n], True) & allowed
            rows = mark.flatten(-2)[..., : value.shape[min(1, value.ndim - 1)]]
            marked.append(rows.movedim(-1, 1).contiguous() if value.ndim > 1 else rows)
        return marked

    def _groups(self, value: Tensor) -> Tensor:
        """Cut the input dimension into groups, filled up with zeros: shape (..., groups, m)."""
        rows = value.movedim(1, -1) if value.ndim > 1 else value
        groups = -(-rows.shape[-1] // self.m)
        whole = pad(rows, (0, groups * self.m - rows.shape[-1]))
        return whole.reshape(*rows.shape[:-1], groups, self.m)
