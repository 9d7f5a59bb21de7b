"""What an engine answers: where a parameter lies inside a tensor of `param_groups`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lowrank_ds.layout import Flat, Layout


@dataclass(frozen=True)
class Placement:
    """A parameter inside a 1-D buffer (or a whole tensor): row-major cuts.

    name, shape: the parameter's. cuts: row-major offsets that divide its entries among the ranks of `group`.
    rank: this process in `group` (None group: the parameter is whole). offset: where the entries held here start in
    the tensor's flattened entries. none_is_zero: the tensor is this parameter's entries alone, and a gradient of None
    counts as zeros (an engine that leaves it None on ranks without entries, which must still take part).
    """

    name: str
    shape: tuple[int, ...]
    cuts: tuple[int, ...]
    rank: int
    group: Any
    offset: int
    none_is_zero: bool = False

    def layout(self, m: int, n: int) -> Layout:
        """How the ranks share the parameter as one m x n matrix."""
        return Flat((m, n), self.cuts, self.rank, self.group)

    def matrices(self, count: int, m: int, n: int) -> Iterator[tuple[int, int, Layout]]:
        """(index, where its entries start in the tensor, layout) of each of `count` m x n matrices.

        What another rank holds alone is left out: it is not this rank's business.
        """
        for i in range(count):
            cuts = tuple(min(max(cut - i * m * n, 0), m * n) for cut in self.cuts)
            layout = Flat((m, n), cuts, self.rank, self.group)
            if layout.numel or layout.shared:
                yield i, self.offset + max(0, i * m * n - self.cuts[self.rank]), layout
