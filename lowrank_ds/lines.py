"""Lines: what a rule or a residual may know of how the array it works on is shared."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_ds.axis import Axis
from lowrank_ds.layout import Layout
from lowrank_ds.requests import Steps, Sum


@dataclass(frozen=True)
class Lines:
    """What a rule may know of the (lines x width) array it works on: which lines count, and how to total them.

    axis: of the lines. layout: of the matrix. partial: False for lines that are complete (coordinates); True for the
    dense rows of this rank's entries, zeros where others hold the entry.
    """

    axis: Axis
    layout: Layout
    partial: bool = False

    @property
    def total(self) -> int:
        """Lines over all ranks."""
        return self.axis.total

    def complete(self, per_line: Tensor) -> Steps:
        """A per-line quantity (touched,) that was summed over the entries held here, summed over all: (kept,)."""
        if not self.partial:
            return per_line
        return (yield from self.axis.complete(per_line.unsqueeze(1))).squeeze(1)

    def spread(self, per_line: Tensor) -> Steps:
        """A per-line quantity (kept,) for each line of the array."""
        if not self.partial:
            return per_line
        return (yield from self.axis.spread(per_line))

    def columns(self, width: int) -> Axis:
        """The axis of what is kept per column of the array (`width` of them, or the matrix' columns)."""
        return self.layout.even(self.layout.shape[1] if self.partial else width)

    def sum_columns(self, array: Tensor, width: int) -> Sum:
        """Ask for the sum (width,) of the array's columns over all lines of all ranks."""
        if not self.partial:
            return Sum(array[self.axis.owned].sum(0))
        if array.shape[1] == width:
            return Sum(array.sum(0))
        total = array.new_zeros(width)
        total[self.layout.cols_axis.window] = array.sum(0)
        return Sum(total)

    def columns_here(self, per_column: Tensor) -> Tensor:
        """The part of a per-column quantity (width,) that the array covers."""
        return per_column[self.layout.cols_axis.window] if self.partial else per_column

    def square_sum(self, array: Tensor) -> Steps:
        """The sum of squares over the whole (total x width) array, a 0-d tensor."""
        mine = array if self.partial else array[self.axis.owned]
        return (yield Sum(mine.square().sum()))

    def sum_over_lines(self, per_line: Tensor) -> Steps:
        """Sum a complete per-line quantity (lines, ...) over all lines, each counted once."""
        return (yield Sum(per_line[self.axis.owned].sum(0)))

    def weighted_sums(self, quantities: tuple[Tensor, ...], weights: Tensor) -> Steps:
        """Each of k complete per-line quantities (lines,) times `weights` (lines,), summed over all lines: (k,)."""
        own = self.axis.owned
        return (yield Sum(torch.stack([x[own] for x in quantities]) @ weights[own]))
