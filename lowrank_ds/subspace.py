"""Where a basis comes from: exact SVD, randomized range finder, warm block power, or seeded Gaussian.

Each factorisation is a generator over a `Sharded` gradient: it sees only products with G, sums and dealt rows, and
answers what this rank keeps: (own rows of P, own chunk of Q), the one that was not asked for being None.

Legend: G m x n, l rows touched here, r rank, k = r + oversample sketch columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_ds import linalg
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
    """

    method: str = "svd"
    rank: int = 128
    every: int = 200
    proj_type: str = "std"
    on_refresh: str = "keep"
    oversample: int = 16
    power: int = 1
    stagger: bool = False


class Sharded:
    """The gradient of one matrix, spread over ranks: what the factorisations may do with it.

    entries: this rank's entries (numel,).
    """

    def __init__(self, layout: Layout, entries: Tensor) -> None:
        self.layout, self.entries = layout, entries

    def times(self, v: Tensor) -> Steps:
        """G V, this rank's rows (l, k)."""
        out = v.new_zeros(self.layout.rows, v.shape[1])
        for block in self.layout.blocks:
            out[block.rows] = block.of(self.entries).float() @ v[block.cols]
        return (yield from self.layout.complete_rows(out))

    def transpose_times(self, z: Tensor) -> Steps:
        """G^T Z (n, k), the same on every rank, from this rank's rows Z (l, k)."""
        out = z.new_zeros(self.layout.shape[1], z.shape[1])
        for block in self.layout.blocks:
            out[block.cols].addmm_(block.of(self.entries).float().T, z[block.rows])
        return (yield Sum(out))

    def gram(self, z: Tensor) -> Steps:
        """Z^T Z (k, k) in fp64, each row counted once."""
        owned = z[self.layout.owned_rows].double()
        return (yield Sum(owned.T @ owned))


def factorize(how: Subspace, grad: Sharded, wants: tuple[str, ...], key: tuple, previous: dict, owner: int) -> Steps:
    """A new basis of `grad`: (own rows of P (l, r) or None, own chunk of Q or None).

    Args:
        wants: which of "left" (P) and "right" (Q) to compute.
        key: (run seed, parameter name, refresh number), for the random sketches.
        previous: the gathered previous basis, {} at a cold start.
        owner: the rank that computes an exact SVD.
    """
    if how.method == "svd":
        return (yield from _svd(how.rank, grad, wants, owner))
    k = min(how.rank + how.oversample, *grad.layout.shape)
    noise = linalg.gaussian(key, grad.layout.shape[1], k, None, grad.entries.device)
    rounds = how.power + 1
    if how.method == "power":
        rounds = 1 if previous else 3
        noise = (yield from _warm_start(grad, wants, previous, noise)) if previous else noise
    basis = noise
    for _ in range(rounds):
        z = yield from grad.times(basis)
        basis = linalg.orthonormalize((yield from grad.transpose_times(z)))
    return (yield from _leading_directions(how.rank, grad, wants, basis))


def _svd(rank: int, grad: Sharded, wants: tuple[str, ...], owner: int) -> Steps:
    layout, left, right = grad.layout, None, None
    full = yield from layout.send_to(owner, grad.entries)
    p, q = (None, None) if full is None else linalg.leading_singular_vectors(full, rank)
    if "left" in wants:
        rows = {j: slice(layout.touched(j).start, layout.touched(j).stop) for j in layout.holders}
        left = yield from layout.deal_rows(owner, p, rows, rank, grad.entries)
    if "right" in wants:
        rows = {j: layout.chunk(layout.shape[1], j) for j in layout.holders}
        right = yield from layout.deal_rows(owner, q, rows, rank, grad.entries)
    return left, right


def _warm_start(grad: Sharded, wants: tuple[str, ...], previous: dict[str, Tensor], noise: Tensor) -> Steps:
    """The previous basis (as n rows) and a few random columns, so that new directions can enter."""
    start = previous["projector"]
    if "right" not in wants:
        start = yield from grad.transpose_times(start)
    return linalg.orthonormalize(torch.cat([start, noise[:, start.shape[1] :]], 1))


def _leading_directions(rank: int, grad: Sharded, wants: tuple[str, ...], basis: Tensor) -> Steps:
    """Turn an orthonormal range basis (n, k) into the r leading singular directions inside it."""
    z = yield from grad.times(basis)
    vectors, singular = linalg.inverse_root((yield from grad.gram(z)))
    rotation, singular = vectors[:, :rank], singular[:rank]
    right = (basis.double() @ rotation).float()
    signs = linalg.canonical_signs(right)
    left = None
    if "left" in wants:
        floor = 1e-9 * singular.max()  # masked directions are divided by something finite, then zeroed
        scaled = rotation * signs.double() / singular.clamp_min(floor)
        left = linalg.mask_null((z.double() @ scaled).float(), singular)
        left = left @ linalg.cholesky_correction((yield from grad.gram(left)))
    if "right" not in wants:
        return left, None
    mine = grad.layout.chunk(right.shape[0])
    return left, linalg.mask_null(right * signs, singular)[mine].clone()
