"""Gradient accumulation in a subspace: micro-batches are summed as coordinates, r numbers a line, not as gradients.

Two kinds, chosen by `Recipe.accumulation`:

    exact     the recipe's own basis. Projection is linear, sum_i (G_i Q) = (sum_i G_i) Q, so a recipe that uses nothing
              but the coordinates (GaLore: the residual is dropped) loses nothing. A step that is to make a new basis
              needs the whole gradient: its micro-batches are summed in full.
    sketch    a fresh random basis for each step, G ~ (sum_i G_i A) A^T: Flora's accumulator (arXiv:2402.03293,
              Algorithm 1; package flora-opt, `FloraAccelerator`). Unbiased, but not exact; any recipe can follow it.

Sums are completed over the ranks at each micro-batch, so that what a rank keeps is its part: (kept lines, r).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lowrank_ds import linalg, lowbit
from lowrank_ds.axis import SCALAR, Stored
from lowrank_ds.job import Job
from lowrank_ds.layout import Layout
from lowrank_ds.projection import choose
from lowrank_ds.recipe import Recipe
from lowrank_ds.requests import Gather, Steps


def side_of(layout: Layout, recipe: Recipe):
    """The projection in which micro-batches of a matrix are summed."""
    how, kind = recipe.subspace, recipe.accumulation
    return choose(how.proj_type, layout, kind.rank or how.rank, how.replicated)


def state_shapes(layout: Layout, recipe: Recipe) -> dict[str, Stored]:
    """{state name: shape} of what micro-batches add up to; nothing unless the recipe asks for it."""
    if recipe.accumulation is None:
        return {}
    side = side_of(layout, recipe)
    return {"accumulated": Stored(side.lines_axis, (side.rank,)), "accumulated_peak": SCALAR}


def fold(job: Job) -> Steps:
    """Add this micro-batch's coordinates to those before it: state["accumulated"] (kept lines, r)."""
    side = side_of(job.layout, job.recipe)
    basis, largest = yield from basis_of(job, side)
    coords, _ = yield from side.down(job.grad, basis, False)
    job.state["accumulated"].add_(coords)
    job.state["accumulated_peak"].copy_(largest)


def project(job: Job) -> Steps:
    """Coordinates (kept lines, r) of job.grad in the recipe's own basis, for the caller to keep; see `replicas.py`."""
    how = job.recipe.subspace
    side = choose(how.proj_type, job.layout, how.rank, how.replicated)
    if how.method == "gaussian":
        basis = side.random((*job.key, job.refresh_count - 1), job.weight.device)
    else:
        stored = _bases(job, side)
        basis = side.gathered(stored, (yield side.requests(stored)))
    coords, _ = yield from side.down(job.grad, basis, False)
    return coords


def basis_of(job: Job, side) -> Steps:
    """(the basis that the sums are coordinates in, the largest gradient magnitude so far (0-d) over all ranks)."""
    peaks = ask_peaks(job, linalg.peak(job.grad))  # it is stored: what every sharding finds
    if job.recipe.accumulation.rank is not None or job.recipe.subspace.method == "gaussian":
        largest = yield peaks
        basis = side.random(_key(job), job.weight.device)
    else:
        stored = _bases(job, side)
        *answers, largest = yield (*side.requests(stored), peaks)
        basis = side.gathered(stored, tuple(answers))
    return basis, torch.maximum(largest.max(), job.state["accumulated_peak"])


def _bases(job: Job, side) -> Mapping[str, Tensor]:
    """The bases kept here, fp32."""
    if job.recipe.storage.exact:
        return job.state
    shapes = {name: Stored(axis, (side.rank,)) for name, axis in side.basis_axes().items()}
    return lowbit.Opened(job, lowbit.state_shapes(shapes, job.layout, job.recipe.storage))


def _key(job: Job) -> tuple:
    """Of the random basis: a sketch has its own for each step, a gaussian subspace the one in use."""
    if job.recipe.accumulation.rank is not None:
        return (*job.key, "accumulate", job.step)
    return (*job.key, job.refresh_count - 1)


def ask_peaks(job: Job, known: Tensor | None = None) -> Gather:
    """Each holder's `linalg.bound` of the gradient (without one: the largest magnitude in the sums, which one rank may
    have spoiled; in coordinates that have come in its place).

    known: this rank's (0-d), where it was computed with something else.
    """
    axis = job.layout.even(job.layout.takers)  # one line each
    mine = known
    if mine is None and job.arrived is not None:
        mine = linalg.peak(job.arrived)
    elif mine is None:
        mine = job.state["accumulated_peak"] if job.grad is None else linalg.bound(job.grad)
    return Gather(mine.view(1)[: axis.count], axis)


def restored(job: Job) -> Steps:
    """This rank's entries (numel,) of the sum of a sketch's micro-batches, R A^T, fp32; the sums are zeroed."""
    side = side_of(job.layout, job.recipe)
    basis = side.random(_key(job), job.weight.device)
    _, direction = yield from side.spread(None, job.state["accumulated"])
    grad = torch.zeros(job.layout.numel, dtype=torch.float32, device=job.weight.device)
    for block in job.layout.blocks:
        _, left, right = side.terms(block, basis, None, direction)
        block.of(grad).addmm_(left, right.T)
    grad.view(-1)[:1].add_(poison(job.state["accumulated_peak"]))
    clear(job.state)
    return grad


def poison(largest: Tensor) -> Tensor:
    """0, or NaN where a micro-batch was not usable (largest magnitude (0-d) not finite or too large)."""
    return torch.where(linalg.is_usable(largest), 0.0, torch.nan)


def clear(state: dict[str, Tensor]) -> None:
    """Begin a new sum."""
    state["accumulated"].zero_()
    state["accumulated_peak"].zero_()
