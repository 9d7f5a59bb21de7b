"""What diagnostics see of a step: sums of one matrix, on the device, made from what the step has in its hands anyway.

Every number is a part that ranks add up later (`diagnostics.py`): nothing here asks another rank, but for one small sum
at a refresh. Nothing here is read by the step, so weights are the same with and without.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowrank_ds import linalg
from lowrank_ds.job import Job, where_live
from lowrank_ds.layout import Layout
from lowrank_ds.requests import Steps, Sum

if TYPE_CHECKING:
    from lowrank_ds.scaling import Factors

# Sums over the steps of an interval: |R|^2, |G|^2, |dW|^2; steps the limiter cut, updates skipped; overlaps, how many
# of them; steps; refreshes refused.
NUMBERS = ("projected", "gradient", "update", "limited", "skipped", "overlap", "compared", "steps", "refused")


class Sink:
    """The sums of one matrix on this rank (len(NUMBERS),), fp64. scaling: its scaling factors, if asked for."""

    def __init__(self, layout: Layout, device: torch.device, scaling: Factors | None = None) -> None:
        self.sums = torch.zeros(len(NUMBERS), dtype=torch.float64, device=device)
        self.scaling = scaling
        # What all ranks know is counted by the one with the first entry of the matrix.
        self.counts = layout.numel > 0 and layout.position(layout.blocks[0])[0] == 0

    def add(self, **parts: Tensor) -> None:
        """Add this rank's part of some of NUMBERS (0-d tensors)."""
        for name, part in parts.items():
            self.sums[NUMBERS.index(name)].add_(part)

    def note(self, **known: Tensor | float) -> None:
        """Add some of NUMBERS that every rank knows whole."""
        if self.counts:
            for name, value in known.items():
                self.sums[NUMBERS.index(name)].add_(value)


def whole_gradient(job: Job, side, coords: Tensor, squares: Tensor | None, live: Tensor) -> None:
    """|R|^2 and |G|^2, where the whole gradient is there and |R| <= |G| means something (orthonormal bases).

    coords (kept, r), squares (kept,) or None: zeros when not live.
    """
    if job.grad is None or job.recipe.subspace.method == "gaussian":
        return
    owned = side.lines_axis.owned
    whole = linalg.square_sum(job.grad) if squares is None else squares[owned].sum()
    job.observe.add(projected=coords[owned].square().sum(), gradient=where_live(live, whole))


def applied(job: Job, side, kept: tuple, spread: tuple, basis, step_size: float, live: Tensor) -> None:
    """|dW|^2 of the update step_size (factor o G + direction B^T), weight decay left out.

    Args:
        kept: (coords (kept, r), squares (kept,) or None, factor (kept,) or None, direction (kept, r) or None).
        spread: (factor, direction) as `write` is given them.
    """
    coords, squares, factor, direction = kept
    if direction is not None and (factor is not None or job.recipe.subspace.method != "gaussian"):
        owned = side.lines_axis.owned  # B is orthonormal: |f g + B n|^2 = f^2 |g|^2 + 2 f <r, n> + |n|^2
        total = direction[owned].square().sum()
        if factor is not None:
            f = factor[owned]
            total = total + (f.square() * squares[owned] + 2 * f * (coords[owned] * direction[owned]).sum(1)).sum()
    else:
        total = sum((_square(job, side, block, basis, spread) for block in job.layout.blocks), coords.new_zeros(()))
    job.observe.add(update=where_live(live, total).clamp_min(0) * step_size**2)


def _square(job: Job, side, block, basis, spread: tuple) -> Tensor:
    """The sum of squares of one block of the update: factor o G alone, or direction B^T alone with any B."""
    lines, left, right = side.terms(block, basis, *spread)
    if left is not None:
        return ((left @ (right.T @ right)) * left).sum()
    grad = block.of(job.grad)
    sums = linalg.row_square_sums(grad) if lines.dim() == 2 else linalg.column_square_sums(grad)
    return (lines.view(-1).square() * sums).sum()


def compare(job: Job, side, old: dict[str, Tensor], new: dict[str, Tensor]) -> Steps:
    """|B_old^T B_new|_F^2 / r of the touched rows of two bases: 1, the same subspace; 0, orthogonal ones."""
    counted = {"left": job.layout.owned_rows, "right": job.layout.owned_cols}
    products = yield tuple(
        Sum(old[name][counted[which]].T @ new[name][counted[which]]) for which, name in side.bases.items()
    )
    overlaps = torch.stack([product.square().sum() / side.rank for product in products])
    job.observe.note(overlap=overlaps.mean(), compared=1.0)
