"""Where a basis comes from: exact SVD, randomized range finder, warm block power, or seeded Gaussian.

Each factorisation is a generator over a `Sharded` gradient: it sees only products with G, sums and dealt rows, and
answers the rows of the basis that this rank keeps.

Randomized and power are one algorithm, block power. From k columns X on the compressed side, a round is two products::

    Z = orthonormal G^T X      (the other side; fp64 Gram matrix and a triangular k x k solve, no tall QR)
    Y = G Z                    whose left singular vectors are the best basis inside that sketch of G (Rayleigh-Ritz)

A start from the previous basis and a few random columns needs one round, a start from random columns alone two.

Legend: G m x n, l rows touched here, r rank, k = r + oversample sketch columns. Columns of a sketch on the "left" are
this rank's touched rows (l, k); on the "right" they are (n, k), the same on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_ds import linalg
from lowrank_ds.axis import Axis
from lowrank_ds.layout import Layout
from lowrank_ds.requests import Steps, Sum


@dataclass(frozen=True)
class Subspace:
    """Which subspace, how large, how long.

    Args:
        method: "svd" exact, one rank computes each matrix; "randomized" Halko's range finder with `power` rounds;
            "power" one round from the previous basis (cold start: as randomized); "gaussian" seeded, never stored.
        rank: r.
        every: steps between refreshes (T, kappa).
        proj_type: see `projection.choose`.
        on_refresh: moments are kept ("keep"), re-expressed in the new basis ("rotate": exp_avg only) or zeroed
            with the bias correction restarted ("reset").
        oversample: extra sketch columns of randomized and power.
        power: rounds of randomized after the first.
        cold_every: every so many refreshes of power start cold (so does one after a share of the gradient got lost,
            see `is_cold`).
        stagger: spread the refreshes of different matrices over the interval (by a hash of the name).
        replicated: every rank stores the whole basis instead of its part (`projector_storage`).
        lazy: the stability (`stability`, mean of the last HISTORY refreshes) from which on a matrix' interval doubles
            after each refresh (Q-GaLore, arXiv:2407.08296); None: intervals stay.
    """

    method: str = "svd"
    rank: int = 128
    every: int = 200
    proj_type: str = "std"
    on_refresh: str = "keep"
    oversample: int = 16
    power: int = 1
    stagger: bool = False
    replicated: bool = False
    lazy: float | None = None
    cold_every: int = 10


_OTHER = {"left": "right", "right": "left"}
_FULL, _LOST = 1 - 1e-6, 0.9  # see is_cold
CAPTURED = 3  # numbers that `remember` keeps
HISTORY = 5  # refreshes that `Subspace.lazy` looks back on, as q-galore-torch


def stability(overlap: Tensor, dimension: int) -> Tensor:
    """How much of a subspace a refresh kept, 0-d: 1 all of it, 0 no more than two random subspaces have in common.

    overlap: B_old^T B_new (r, r) of bases (dimension, r). |overlap|_F^2 / r is the mean squared cosine between the two
    subspaces, whatever the signs and the order of the vectors; of random ones it is r / dimension.
    """
    rank = overlap.shape[0]
    if rank >= dimension:
        return overlap.new_ones(())
    chance = rank / dimension
    return (overlap.square().sum() / rank - chance) / (1 - chance)


class Sharded:
    """The gradient of one matrix, spread over ranks: what the factorisations may do with it.

    entries: this rank's entries (numel,).
    """

    def __init__(self, layout: Layout, entries: Tensor) -> None:
        self.layout, self.entries = layout, entries

    def times(self, v: Tensor) -> Steps:
        """G V, the rows touched here (l, k), complete. V (n, k) is the same on every rank."""
        out, v = v.new_zeros(self.layout.rows, v.shape[1]), v[self.layout.cols_axis.window]
        for block in self.layout.fp32_pieces(self.entries):
            torch.mm(block.of(self.entries).float(), v[block.cols], out=out[block.rows])
        return (yield from self.layout.rows_axis.spread((yield from self.layout.rows_axis.complete(out))))

    def transpose_times(self, z: Tensor) -> Steps:
        """G^T Z (n, k), the same on every rank, from the touched rows Z (l, k)."""
        out = z.new_zeros(self.layout.shape[1], z.shape[1])
        mine = out[self.layout.cols_axis.window]
        for block in self.layout.fp32_pieces(self.entries):
            mine[block.cols].addmm_(block.of(self.entries).float().T, z[block.rows])
        return (yield Sum(out))

    def across(self, x: Tensor, side: str) -> Steps:
        """The product that takes columns x on `side` to the other side."""
        return self.transpose_times(x) if side == "left" else self.times(x)

    def counted(self, x: Tensor, side: str) -> Tensor:
        """The rows of columns x on `side` that are counted here: each row of the matrix (or column) by one rank."""
        if side == "left":
            return x[self.layout.owned_rows]
        axis = self.layout.cols_axis
        first = axis.kept[axis.rank][0]
        return x[first + axis.owned.start : first + axis.owned.stop]

    def gram(self, x: Tensor, side: str) -> Steps:
        """`linalg.gram` (k, k) of columns x on `side`, over all ranks."""
        return (yield Sum(linalg.gram(self.counted(x, side))))

    def keep_rows(self, z: Tensor, axis: Axis) -> Steps:
        """Of touched rows Z (l, k), which are complete, those that `axis` (of the rows) keeps here."""
        if axis.settled:
            return z
        if axis.undivided:
            return z[slice(*axis.kept[axis.rank])].clone()
        counted = torch.zeros_like(z)
        counted[self.layout.owned_rows] = z[self.layout.owned_rows]
        return (yield from axis.complete(counted))


def factorize(how: Subspace, grad: Sharded, axes: dict[str, Axis], key: tuple, previous: Tensor | None, owner: int):
    """A new basis of `grad`: a generator that answers ({side: kept rows of the basis}, what it holds).

    What it holds: (share of |G|^2 that it is known to capture, share of its r directions that are not masked), fp64
    (2,); None for "svd".

    Args:
        axes: "left" for P, "right" for Q: the axis of the basis' rows, for each that is wanted (one, but for "svd").
        key: (run seed, parameter name, refresh number), for the random sketches.
        previous: the previous basis: all of Q, or the touched rows of P. None at a cold start.
        owner: the rank that computes an exact SVD.
    """
    if how.method == "svd":
        return (yield from _svd(how.rank, grad, axes, owner)), None
    ((side, axis),) = axes.items()
    here, x = side, _start(how, grad.layout, side, key, previous, grad.entries.device)
    products = 2 if previous is not None else 2 * (how.power + 1)
    for _ in range(products - 1):
        x = yield from grad.across(x, here)
        here = _OTHER[here]
        x = linalg.whiten(x, (yield from grad.gram(x, here)))
    x = yield from grad.across(x, here)
    basis, holds = yield from _leading(how.rank, grad, x, side)
    if side == "left":
        return {side: (yield from grad.keep_rows(basis, axis))}, holds
    return {side: basis[slice(*axis.kept[axis.rank])].clone()}, holds


def _svd(rank: int, grad: Sharded, axes: dict[str, Axis], owner: int) -> Steps:
    full = yield from grad.layout.send_to(owner, grad.entries)
    found = {} if full is None else linalg.leading_singular_vectors(full, rank, tuple(axes))
    bases = {}
    for side, axis in axes.items():
        bases[side] = yield from axis.deal(owner, found.pop(side, None), rank, grad.entries)
    return bases


def _start(how: Subspace, layout: Layout, side: str, key: tuple, previous: Tensor | None, device) -> Tensor:
    """The k columns block power starts from: the previous basis, filled up with random ones (new directions enter)."""
    k = min(how.rank + how.oversample, *layout.shape)
    rows = layout.rows_axis.window if side == "left" else None
    length = layout.shape[0 if side == "left" else 1]
    fresh = k if previous is None else k - how.rank
    if not fresh:
        return previous
    noise = linalg.gaussian(key, length, fresh, rows, device) * math.sqrt(fresh / length)  # columns of length 1
    if previous is None:
        return noise
    return torch.cat([previous[: len(noise)], noise], 1)  # a rank without rows is told of all, and needs none


def _leading(rank: int, grad: Sharded, y: Tensor, side: str) -> Steps:
    """(orthonormal r leading left singular vectors of columns y (.., k) on `side`, what they hold of G).

    By their fp64 Gram matrix, which is exact enough down to the mask; what rounding is left in the basis is then
    corrected.
    """
    own = linalg.gram(grad.counted(y, side))
    total = yield Sum(torch.cat([own.view(-1), linalg.square_sum(grad.entries).double().view(1)]))
    rotation, singular = linalg.leading_rotation(total[:-1].view_as(own), rank)
    basis = y @ rotation
    own = grad.counted(basis, side)
    told = yield Sum(torch.cat([(own.T @ own).view(-1), (own.square() * own).sum(0)]))
    overlap, cubes = told[: rank * rank].view(rank, rank), told[rank * rank :]
    holds = torch.stack([singular.square().sum() / total[-1], (singular > 0).double().mean()])
    return basis @ linalg.orthonormal_correction(overlap, cubes), holds


def is_cold(how: Subspace, refreshes: int, captured: Sequence[float]) -> bool:
    """Whether a refresh of power after `refreshes` others starts from random columns alone.

    At the first, at every `cold_every`-th; when the last basis was not full (its start would miss directions); and
    when it held clearly less of its gradient than the last cold one did of its own: then directions may be missing,
    and if they are not, the next comparison is with the new share.

    captured: what `remember` left: shares, and what is known from a resume without it: zeros.
    """
    share, cold_share, full = captured
    return not refreshes or refreshes % how.cold_every == 0 or full < _FULL or share < _LOST * cold_share


def remember(captured: Tensor, holds: Tensor, cold: bool) -> None:
    """Keep in `captured` (3,): share of the last basis, of the last cold one; live directions of the last, of r."""
    share, full = holds
    captured.copy_(torch.stack([share, share if cold else captured[1].double(), full]))
