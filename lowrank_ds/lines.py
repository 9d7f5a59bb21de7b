"""Lines: what a rule or a residual may know of how the array it works on is shared."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_ds.axis import Axis, part_of
from lowrank_ds.layout import Layout
from lowrank_ds.requests import Steps, Sum


@dataclass(frozen=True)
class Lines:
    """What a rule may know of the (lines x width) array of complete coordinates: which lines count, how to total them.

    axis: of the lines. layout: of the matrix.
    """

    axis: Axis
    layout: Layout

    @property
    def total(self) -> int:
        """Lines over all ranks."""
        return self.axis.total

    def square_sum(self, array: Tensor) -> Steps:
        """The sum of squares over the whole (total x width) array, a 0-d tensor."""
        return (yield Sum(array[self.axis.owned].square().sum()))

    def sum_over_lines(self, per_line: Tensor) -> Steps:
        """Sum a complete per-line quantity (lines, ...) over all lines, each counted once."""
        return (yield Sum(per_line[self.axis.owned].sum(0)))

    def weighted_sums(self, quantities: tuple[Tensor, ...], weights: Tensor) -> Steps:
        """Each of k complete per-line quantities (lines,) times `weights` (lines,), summed over all lines: (k,)."""
        own = self.axis.owned
        return (yield Sum(torch.stack([part_of(x, own) for x in quantities]) @ part_of(weights, own)))
