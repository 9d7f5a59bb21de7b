"""Adafactor's update of a whole matrix, block by block: it is never formed, only what it is made of is kept.

    factored     U = r o G o c, with r per row and c per column
    full         U = G / sqrt(v), with v per entry
    kept         U = M, a momentum that is state

Each can be asked for a few rows (temporaries that stay in a core's cache), for its sum of squares, and for its
coordinates in a subspace: U B = r o (G (c o B)) takes one product with the gradient as it is.

A gradient that is not usable (live == 0) still passes through here. What it spoils is masked where it is summed up
(`where_live`); in blocks numbers that are not finite become 0, and the factor they are written with is 0 then.
Legend: m x n matrix, l rows and w columns touched by this rank (`layout.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank_ds import job as jobs
from lowrank_ds import linalg
from lowrank_ds.job import Job
from lowrank_ds.layout import Block
from lowrank_ds.projection import Left
from lowrank_ds.requests import Steps

_CHUNK, _CHUNK_CPU = 1 << 24, 1 << 17  # entries at a time: few kernels; half of a core's L2 cache


def _chunks(job: Job, block: Block) -> Iterator[Block]:
    return block.split(_CHUNK_CPU if job.weight.device.type == "cpu" else _CHUNK)


def chunks(job: Job) -> Iterator[Block]:
    """Blocks of this rank's entries whose temporaries stay in a core's cache."""
    return itertools.chain.from_iterable(_chunks(job, block) for block in job.layout.blocks)


def _scratch(job: Job) -> Tensor:
    """Room for one block's entries: written again and again, it costs no page faults."""
    return torch.empty(max((k.entries.stop - k.entries.start for k in chunks(job)), default=0), device=job.grad.device)


def _multiplied(a: Tensor, b: Tensor, room: Tensor) -> Tensor:
    """a * b, fp32 of a's shape (rows, columns), in `room`."""
    return torch.mul(a, b, out=room[: a.numel()].view(a.shape))


class Sums(NamedTuple):
    """Of the squared gradient: rows (l,), columns (w,); and `linalg.bound` of the gradient (0-d)."""

    rows: Tensor
    columns: Tensor
    bound: Tensor


def square_sums(job: Job) -> Sums:
    """In one pass over this rank's entries."""
    rows, columns = (torch.zeros(k, device=job.grad.device) for k in (job.layout.rows, job.layout.cols))
    room = _scratch(job)
    for chunk in chunks(job):
        grad = chunk.of(job.grad).float()
        square = _multiplied(grad, grad, room)
        rows[chunk.rows] += square.sum(1)
        columns[chunk.cols] += square.sum(0)
    return Sums(rows, columns, linalg.bound(job.grad, rows))


class Update:
    """A raw update of this rank's entries, by blocks."""

    job: Job

    def of(self, chunk: Block) -> Tensor:
        """The update (rows, columns) of a block, fp32 and finite: a temporary, or a view of state."""
        left, right = self.factors(chunk)
        return left * right

    def factors(self, chunk: Block) -> tuple[Tensor, Tensor]:
        """Two fp32 arrays that are multiplied to `of`: (rows, columns), finite, and (rows, 1) or the same or 0-d."""
        raise NotImplementedError

    def square_sum(self) -> Tensor:
        """The sum of squares of the entries held here (0-d); meaningless when not live."""
        parts = [self.of(chunk).square().sum() for chunk in chunks(self.job)]
        return torch.stack(parts).sum() if parts else torch.zeros((), device=self.job.weight.device)

    def down(self, side, basis: dict[str, Tensor]) -> Steps:
        """Its coordinates (kept, r) in a basis."""
        left, basis = isinstance(side, Left), basis["projector"]
        lines = self.job.layout.cols if left else self.job.layout.rows
        coords = torch.zeros(lines, side.rank, device=self.job.weight.device)
        for piece in jobs.pieces(self.job):  # larger than what is in a cache: these are products of matrices
            update = self.of(piece)
            if left:
                coords[piece.cols].addmm_(update.T, basis[piece.rows])
            else:
                coords[piece.rows].addmm_(update, basis[piece.cols])
        return (yield from side.lines_axis.complete(coords))


@dataclass
class Factored(Update):
    """U = r o G o c. rows: r of the rows kept here; touched: of those touched (l,). columns: c of all columns (n,)."""

    job: Job
    rows: Tensor
    touched: Tensor
    columns: Tensor

    @cached_property
    def _across(self) -> Tensor:
        """c of the columns touched here (w,)."""
        return self.columns[self.job.layout.cols_axis.window]

    @cached_property
    def _room(self) -> Tensor:
        return _scratch(self.job)

    def _scaled(self, chunk: Block) -> Tensor:
        """G o c of a block, until the next one is asked for."""
        return _multiplied(chunk.of(self.job.grad).float(), self._across[chunk.cols], self._room)

    def factors(self, chunk: Block) -> tuple[Tensor, Tensor]:
        """(G o c, r)."""
        scaled = self._scaled(chunk)
        if not getattr(self.job.live, "known", False):
            scaled = linalg.finite_(scaled)
        return scaled, self.touched[chunk.rows].unsqueeze(1)

    def square_sum(self) -> Tensor:
        """The sum of squares of the entries held here (0-d); meaningless when not live."""
        sums = self.touched.new_zeros(self.job.layout.rows)
        for chunk in chunks(self.job):
            sums[chunk.rows] += torch.linalg.vector_norm(self._scaled(chunk), dim=1).square_()
        return (sums.sqrt() * self.touched).square().sum()  # r^2 overflows where a row is empty

    def down(self, side, basis: dict[str, Tensor]) -> Steps:
        """Its coordinates (kept, r) in a basis."""
        layout = self.job.layout
        if isinstance(side, Left):
            inner, outer = self.touched, self.columns[slice(*side.lines_axis.kept[layout.rank])]
        else:
            inner, outer = self._across, self.rows
        scaled = {name: part * inner.unsqueeze(1) for name, part in basis.items()}
        coords, _ = yield from side.down(self.job.grad, scaled, False)
        return coords.mul_(outer.unsqueeze(1))


@dataclass
class Full(Update):
    """U = G / sqrt(v), v the second moment of every entry (numel,)."""

    job: Job
    moment: Tensor

    def move(self, weight: Tensor, eps: float) -> None:
        """Move the moment towards G^2 + eps; weight (0-d) is 0 when not live."""
        for chunk in chunks(self.job):
            square = chunk.of(self.job.grad).float().square().add_(eps)
            chunk.of(self.moment).lerp_(linalg.finite_(square), weight)

    def factors(self, chunk: Block) -> tuple[Tensor, Tensor]:
        """(G, 1 / sqrt(v))."""
        grad = chunk.of(self.job.grad).float()
        if not getattr(self.job.live, "known", False):
            grad = torch.nan_to_num(grad, 0.0, 0.0, 0.0)  # not in place: it may be a view of what the user sees
        return grad, chunk.of(self.moment).rsqrt()


@dataclass
class Kept(Update):
    """U = M, a momentum that is state: entries (numel,)."""

    job: Job
    momentum: Tensor

    def move(self, update: Update, size: Tensor | float, weight: Tensor) -> None:
        """Move the momentum towards size * update; weight (0-d) is 0 when not live."""
        for chunk in chunks(self.job):
            chunk.of(self.momentum).lerp_(update.of(chunk) * size, weight)

    def factors(self, chunk: Block) -> tuple[Tensor, Tensor]:
        """(M, 1)."""
        return chunk.of(self.momentum), self.momentum.new_ones(())


class LowRank(NamedTuple):
    """What joins an update: direction (touched lines, r) times the transposed basis, by the side's terms."""

    side: object
    basis: dict[str, Tensor]
    direction: Tensor


def write(job: Job, update: Update, size: Tensor, scale: Tensor | None, more: LowRank | None = None) -> None:
    """W <- (1 - lr scale wd) W - lr (size U + direction B^T), block by block, in place. size 0-d."""
    for block in jobs.to_write(job):
        weight = jobs.loaded(job, block)
        if job.weight_decay:
            weight.mul_(jobs.kept(job, scale))
        if more is not None:
            _, left, right = more.side.terms(block, more.basis, None, more.direction)
            weight.addmm_(left.to(weight.dtype), right.T.to(weight.dtype), alpha=-job.lr)
        for chunk in _chunks(job, block):
            rows = slice(chunk.rows.start - block.rows.start, chunk.rows.stop - block.rows.start)
            left, right = (part.to(weight.dtype) for part in update.factors(chunk))
            weight[rows].addcmul_(left, right * size, value=-job.lr)
        jobs.round_back(job, weight, block)
