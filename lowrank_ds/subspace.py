"""Where a basis comes from: exact SVD, randomized range finder, warm block power, or seeded Gaussian.

Each factorisation is a generator over a `Sharded` gradient: it sees only products with G, sums and dealt rows, and
answers the rows of the basis that this rank keeps.

Legend: G m x n, l rows touched here, r rank, k = r + oversample sketch columns.
"""

from __future__ import annotations

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
            "power" one round of block power warm-started from the previous basis (cold start: randomized, 2 rounds);
            "gaussian" seeded, never stored.
        rank: r.
        every: steps between refreshes (T, kappa).
        proj_type: see `projection.choose`.
        on_refresh: moments are kept ("keep"), re-expressed in the new basis ("rotate": exp_avg only) or zeroed
            with the bias correction restarted ("reset").
        oversample: extra sketch columns of randomized and power.
        power: power rounds of randomized.
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
        for block in self.layout.blocks:
            out[block.rows] = block.of(self.entries).float() @ v[block.cols]
        return (yield from self.layout.rows_axis.spread((yield from self.layout.rows_axis.complete(out))))

    def transpose_times(self, z: Tensor) -> Steps:
        """G^T Z (n, k), the same on every rank, from the touched rows Z (l, k)."""
        out = z.new_zeros(self.layout.shape[1], z.shape[1])
        mine = out[self.layout.cols_axis.window]
        for block in self.layout.blocks:
            mine[block.cols].addmm_(block.of(self.entries).float().T, z[block.rows])
        return (yield Sum(out))

    def gram(self, z: Tensor) -> Steps:
        """Z^T Z (k, k) in fp64 of touched rows Z (l, k), each row counted once."""
        owned = z[self.layout.owned_rows].double()
        return (yield Sum(owned.T @ owned))

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
    """A new basis of `grad`: a generator that answers {side: kept rows of the basis}.

    Args:
        axes: "left" for P, "right" for Q: the axis of the basis' rows, for each that is wanted.
        key: (run seed, parameter name, refresh number), for the random sketches.
        previous: the previous basis: all of Q, or without Q the touched rows of P. None at a cold start.
        owner: the rank that computes an exact SVD.
    """
    if how.method == "svd":
        return (yield from _svd(how.rank, grad, axes, owner))
    k = min(how.rank + how.oversample, *grad.layout.shape)
    noise = linalg.gaussian(key, grad.layout.shape[1], k, None, grad.entries.device)
    rounds = how.power + 1
    if how.method == "power":
        rounds = 3 if previous is None else 1
        noise = noise if previous is None else (yield from _warm_start(grad, axes, previous, noise))
    basis = noise
    for _ in range(rounds):
        z = yield from grad.times(basis)
        basis = linalg.orthonormalize((yield from grad.transpose_times(z)))
    return (yield from _leading_directions(how.rank, grad, axes, basis))


def _svd(rank: int, grad: Sharded, axes: dict[str, Axis], owner: int) -> Steps:
    full = yield from grad.layout.send_to(owner, grad.entries)
    found = (None, None) if full is None else linalg.leading_singular_vectors(full, rank)
    vectors = dict(zip(("left", "right"), found, strict=True))
    bases = {}
    for side, axis in axes.items():
        bases[side] = yield from axis.deal(owner, vectors[side], rank, grad.entries)
    return bases


def _warm_start(grad: Sharded, axes: dict[str, Axis], previous: Tensor, noise: Tensor) -> Steps:
    """The previous basis (as n rows) and a few random columns, so that new directions can enter."""
    start = previous
    if "right" not in axes:
        start = yield from grad.transpose_times(start)
    return linalg.orthonormalize(torch.cat([start, noise[:, start.shape[1] :]], 1))


def _leading_directions(rank: int, grad: Sharded, axes: dict[str, Axis], basis: Tensor) -> Steps:
    """Turn an orthonormal range basis (n, k) into the r leading singular directions inside it."""
    z = yield from grad.times(basis)
    vectors, singular = linalg.inverse_root((yield from grad.gram(z)))
    rotation, singular = vectors[:, :rank], singular[:rank]
    right = (basis.double() @ rotation).float()
    signs = linalg.canonical_signs(right)
    bases = {}
    if "left" in axes:
        floor = 1e-9 * singular.max()  # masked directions are divided by something finite, then zeroed
        scaled = rotation * signs.double() / singular.clamp_min(floor)
        left = linalg.mask_null((z.double() @ scaled).float(), singular)
        left = left @ linalg.cholesky_correction((yield from grad.gram(left)))
        bases["left"] = yield from grad.keep_rows(left, axes["left"])
    if "right" in axes:
        mine = slice(*axes["right"].kept[grad.layout.rank])
        bases["right"] = linalg.mask_null(right * signs, singular)[mine].clone()
    return bases
